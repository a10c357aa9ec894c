"""The commands as a user runs them: real, in this process, on a tiny model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from chat_server import ChatServer, completion
from typer.main import get_command

import rlvr
from rlvr.cli import COMMANDS, build_app
from rlvr.cli.environments import described_arguments
from rlvr.cli.options import environment_flag
from rlvr.plugins.manager import environment_options
from rlvr.tracking.run_folder import RunFolder

pytestmark = pytest.mark.both

SHORT = "--max-prompt-length 64 --max-tokens 6 --num-generations 2 --prompts-per-step 2 --eval-samples 3"
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "vllm", "unsloth", "wandb")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["preflight", "--help"],
        ["train", "arithmetic", "--help"],
        ["backends"],
        ["export", "--help"],
        ["lineage", "--help"],
        ["backends", "--json"],
        ["environments"],
        ["environments", "arithmetic"],
        ["train", "arithmetic", "--model", "m", "--dry-run"],
    ],
    ids=" ".join,
)
def test_looking_around_loads_nothing_heavy(arguments):
    program = (
        "import sys\nfrom rlvr.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("HEAVY []")


def test_the_summaries_of_the_commands_fit_on_their_lines(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = command("--help").out.split("Commands:\n")[1].splitlines()[: len(COMMANDS)]
    assert {line.split()[0] for line in listed} == set(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_help_groups_the_options_and_shows_defaults(command):
    outcome = command("train", "--help")
    assert outcome.code == 0
    for words in ("Task and model", "Rollouts", "Training", "LoRA", "Memory and precision", "Run", "(default 8)"):
        assert words in outcome.out
    assert "--env-seed" not in outcome.out


def test_help_of_an_environment_lists_its_options(command):
    outcome = command("train", "arithmetic", "--help")
    assert outcome.code == 0
    assert "Options of environment arithmetic" in outcome.out
    assert "--levels" in outcome.out
    assert "--env-seed" in outcome.out  # training has a --seed of its own


def test_listings(command):
    backends = json.loads(command("backends", "--json").out)
    assert {"name", "distribution", "version", "available", "reason"} == set(backends[0])
    assert "hf" in [row["name"] for row in backends]
    assert "arithmetic" in command("environments").out
    options = json.loads(command("environments", "countdown", "--json").out)
    assert options[0] == {
        "option": "--numbers",
        "type": "int",
        "default": 3,
        "required": False,
        "meaning": "how many numbers a puzzle has, 2 to 6.",
    }
    assert "how many numbers a puzzle has" in command("train", "countdown", "--help").out


NOISY = """
print("noise at import")
from rlvr import Environment, Rubric, hookimpl

def reward(trajectory):
    print("noise at a reward")
    return 1.0

@hookimpl
def rlvr_environment(levels: int = 3):
    print("noise as it is made")
    return Environment(name="noisy", train_dataset=[{"question": "hello"}], rubric=Rubric(reward))

@hookimpl
def rlvr_backend():
    raise AssertionError("it is not asked for")
"""


@pytest.fixture
def noisy(tmp_path, monkeypatch):
    """Installed plugins, a backend and an environment, that print wherever their code runs."""
    info = tmp_path / "site" / "noisy-1.0.dist-info"
    info.mkdir(parents=True)
    for kind in ("backend", "environment"):
        other = {"backend": "rlvr_environment", "environment": "rlvr_backend"}[kind]
        (tmp_path / "site" / f"noisy_{kind}.py").write_text(NOISY.replace(f"@hookimpl\ndef {other}", f"def {other}"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[rlvr.backends]\nnoisy = noisy_backend\n[rlvr.environments]\nnoisy = noisy_environment\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for kind in ("backend", "environment"):
        sys.modules.pop(f"noisy_{kind}", None)


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize(
    "line",
    [
        "backends --json",
        "backends check hf --only lazy-plugin --json",
        "environments --json",
        "environments noisy --json",
        "evaluate noisy -m {model} --max-tokens 4 --max-prompt-length 64 --json",
    ],
)
def test_json_is_alone_on_standard_output_whatever_plugins_print(command, model_folder, line):
    outcome = command(*line.format(model=model_folder).split())
    assert outcome.code == 0, outcome.err
    json.loads(outcome.out)
    assert "noise at import" in outcome.err


@pytest.mark.usefixtures("noisy")
def test_the_yaml_of_a_dry_run_is_alone_too(command):
    outcome = command("train", "noisy", "-m", "m", "--dry-run")
    assert yaml.safe_load(outcome.out)["env"] == "noisy"
    assert "noise at import" in outcome.err


def test_every_option_of_an_environment_is_described(command):
    for row in rlvr.list_environments():
        for option in json.loads(command("environments", row.name, "--json").out):
            assert option["meaning"], (row.name, option["option"])


@pytest.mark.parametrize(
    ("docstring", "meanings"),
    [
        ("", {}),
        ("It does.\n\nReturns:\n    a: b", {}),
        (
            "It does.\n\nArgs:\n    a: one,\n        continued: here.\n    b_2: two\n\nReturns:\n    c: three",
            {"a": "one, continued: here.", "b_2": "two"},
        ),
    ],
)
def test_arguments_are_read_from_a_docstring(docstring, meanings):
    assert described_arguments(docstring) == meanings


def test_a_dry_run_prints_what_a_run_would_use_and_writes_nothing(command, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "env: arithmetic\nmodel: m\nseed: 5\nenv_options: {levels: '1', train_size: 50}\n"
    )
    outcome = command("train", "--config", "run.yaml", "--seed", "6", "--levels", "2", "--dry-run")
    assert outcome.code == 0
    config = yaml.safe_load(outcome.out)
    assert config["seed"] == 6
    assert config["env_options"] == {"levels": "2", "train_size": 50}
    assert config["backend"] == "hf"
    assert config["prompts_per_step"] == 8
    assert config["batch_size"] is config["gradient_accumulation_steps"] is None  # the model decides
    assert config["learning_rate"] == 1e-5
    assert config["output_dir"].startswith("outputs/arithmetic-m-hf-")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    (tmp_path / "again.yaml").write_text(outcome.out)
    assert yaml.safe_load(command("train", "--config", "again.yaml", "--dry-run").out) == config


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--peft"], {"peft": True}),
        (["--no-peft"], {"peft": False}),
        (["--bf16"], {"bf16": True, "dtype": "bfloat16"}),
        (["--no-gradient-checkpointing"], {"gradient_checkpointing": False}),
        (["--lora-target-modules", "q_proj,v_proj"], {"lora_target_modules": "q_proj,v_proj"}),
        (["--num-generations=4", "--temperature=0.7"], {"num_generations": 4, "temperature": 0.7}),
        (["--env-seed", "4", "--seed", "3"], {"seed": 3, "env_options": {"seed": 4}}),
        (["--train-size=7"], {"env_options": {"train_size": 7}}),
    ],
)
def test_flags_become_settings(command, flags, expected):
    config = yaml.safe_load(command("train", "arithmetic", "-m", "m", *flags, "--dry-run").out)
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["train", "evaluate", "compare"])
def test_no_option_of_an_environment_hides_behind_one_of_the_command(command, name):
    """`--config` of reasoning-gym would be taken for the command's own file."""
    own = {flag for option in get_command(build_app(name)).commands[name].params for flag in option.opts}
    for row in rlvr.list_environments():
        options = environment_options(row.name)
        assert not own & {environment_flag(option) for option in options}, row.name
    written = ["train", "reasoning-gym:countdown", "-m", "m", "--env-config", '{"min_numbers": 3}', "--dry-run"]
    assert yaml.safe_load(command(*written).out)["env_options"] == {"config": '{"min_numbers": 3}'}


def test_a_run_from_the_command_line_is_resumed_and_evaluated(command, model_folder):
    first = command("train", "arithmetic", "-m", model_folder, *SHORT.split(), "--max-steps", 2, "--output-dir", "run")
    assert first.code == 0, first.err
    assert "Everything is in run" in first.out
    folder = RunFolder(Path("run"))
    assert [row["step"] for row in folder.metrics() if "reward" in row] == [1, 2]
    assert len([row for row in folder.trajectories() if row["phase"] == "train"]) == 2 * 4
    assert len([row for row in folder.trajectories() if row["phase"] == "eval"]) == 2 * 3
    summary = folder.summary()
    assert summary["steps"] == 2
    assert summary["backend"] == "hf"
    assert {"exact_match", "reward", "pass@1"} <= summary["eval_before"].keys() & summary["eval_after"].keys()

    again = ("train", "--resume-from-checkpoint", "last", "--output-dir", "run")
    kept = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    done = command(*again)
    assert done.code == 2
    assert "has done all that the run was to do, 2 steps" in done.err
    other = command(*again, "--max-steps", 3, "--lora-r", 4, "-m", "other")
    assert other.code == 2
    assert "lora_r was 16 in the run that is to go on, and is 4" in other.err
    assert "model was" in other.err
    assert kept == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}

    resumed = command(*again, "--max-steps", 3)
    assert resumed.code == 0, resumed.err
    assert [row["step"] for row in folder.metrics() if "reward" in row] == [1, 2, 3]
    assert folder.summary()["steps"] == 3
    assert folder.summary()["eval_before"] == summary["eval_before"]
    assert folder.config()["max_steps"] == 3
    assert yaml.safe_load(Path("run/config.yaml").read_text())["max_steps"] == 2

    evaluated = command(
        *("evaluate", "arithmetic", "-m", model_folder, "--adapter", "run", "--samples", 2, "--limit", 3),
        *("--max-tokens", 6, "--max-prompt-length", 64, "--json", "--output", "attempts.jsonl", "--levels", 1),
    )
    assert evaluated.code == 0, evaluated.err
    found = json.loads(evaluated.out)
    assert (found["examples"], found["samples"]) == (3, 2)
    assert {"pass@1", "pass@2", "exact_match", "reward"} <= found["metrics"].keys()
    assert list(found["groups"]) == ["level=1"]
    assert found["intervals"].keys() == found["metrics"].keys()
    assert len(Path("attempts.jsonl").read_text().splitlines()) == 6


def sums(body):
    """Adds; every fifth problem wrongly."""
    numbers = [int(number) for number in body["messages"][-1]["content"].strip("=").split("+")]
    return completion(str(sum(numbers) + (sum(numbers) % 5 == 0)), completion_tokens=3)


def test_a_model_behind_an_api_is_evaluated_and_resumed(command, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SERVER_KEY", "sk-secret\n")
    line = ("evaluate", "arithmetic", "--levels", 1, "-m", "served", "--limit", 20, "--samples", 2)
    with ChatServer(sums) as server:
        line = (*line, "--api-base-url", server.url, "--api-key-env", "SERVER_KEY", "--output", "a.jsonl")
        shown = command(*line, "--concurrency", 4)
        assert shown.code == 0, shown.err
        assert len(server.requests) == 40
        assert 1 <= server.most <= 4
        assert server.requests[0][1]["Authorization"] == "Bearer sk-secret"
        rows = Path("a.jsonl").read_text().splitlines(keepends=True)
        Path("a.jsonl").write_text("".join(rows[:31]) + rows[31][:50])
        resumed = command(*line, "--resume", "--json", "--concurrency", 2, "--api-retries", 1, "--api-timeout", 60)
        assert resumed.code == 0, resumed.err
        assert len(server.requests) == 49
    found = json.loads(resumed.out)
    solved = [json.loads(row)["passed"] for row in rows]
    assert found["metrics"]["pass@1"] == pytest.approx(sum(solved) / 40)
    low, high = found["intervals"]["pass@1"]
    assert f"{found['metrics']['pass@1']:.3f} [{low:.3f}, {high:.3f}]" in shown.out
    assert "20 held-out examples × 2 attempts · 120 tokens" in shown.out
    assert len(Path("a.jsonl").read_text().splitlines()) == 40
    written = [path.read_text() for path in Path().iterdir()]
    assert not any("sk-secret" in text for text in (*written, shown.out, shown.err, resumed.out, resumed.err))


def test_an_evaluation_of_training_examples_says_so(command, model_folder):
    Path("my.jsonl").write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n")
    line = ("evaluate", "dataset", "--datasets", "my.jsonl", "--eval-fraction", 0, "-m", model_folder)
    shown = command(*line, "--max-tokens", 4, "--max-prompt-length", 64)
    assert shown.code == 0, shown.err
    assert "1 training example × 1 attempt ·" in shown.out


def test_a_refusal_of_the_api_is_one_message(command, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with ChatServer(lambda body: (401, {"error": {"message": "bad key sk-secret"}})) as server:
        outcome = command("evaluate", "arithmetic", "-m", "served", "--api-base-url", server.url, "--limit", 2)
    assert outcome.code == 2
    assert "refused a request with status 401: bad key ***" in outcome.err
    assert "Traceback" not in outcome.err
    assert "sk-secret" not in outcome.err


def test_preflight_says_what_it_found_and_exits_by_it(command, model_folder):
    line = ("preflight", "arithmetic", "--levels", 1, "-m", model_folder, "--max-tokens", 4, "--max-prompt-length", 64)
    hopeless = command(*line, "--prompts", 3, "--num-generations", 4)
    assert hopeless.code == 1
    assert "Traceback" not in hopeless.err
    assert "problem  groups" in hopeless.out
    found = json.loads(command(*line, "--prompts", 2, "--num-generations", 2, "--json").out)
    assert found["numbers"]["completions"] == 4
    assert {finding["level"] for finding in found["findings"]} <= {"ok", "warning", "problem"}


def test_preflight_exits_with_0_where_there_are_warnings_only(command, monkeypatch):
    from rlvr.trainers.preflight import Finding, Preflight

    found = Preflight(findings=[Finding("warning", "difficulty", "too easy")], numbers={})
    monkeypatch.setattr("rlvr.trainers.preflight.preflight", lambda *args, **options: found)
    outcome = command("preflight", "arithmetic", "-m", "m")
    assert outcome.code == 0
    assert "warning  difficulty  too easy" in outcome.out


def test_without_arguments_the_quickstart_runs(command, monkeypatch, model_folder):
    built = []
    short = {"max_prompt_length": 64, "max_tokens": 4, "num_generations": 2, "prompts_per_step": 2, "max_steps": 5}

    def settings(*, seed):
        return {"env": "arithmetic", "env_options": {"seed": seed}, "model": "tiny", "seed": seed, **short}

    def prepare(*, seed):
        built.append(seed)
        shutil.copytree(model_folder, "tiny", dirs_exist_ok=True)

    monkeypatch.setattr("rlvr.quickstart.settings", settings)
    monkeypatch.setattr("rlvr.quickstart.prepare", prepare)

    config = yaml.safe_load(command("train", "--seed", 3, "--dry-run").out)
    assert config["env_options"] == {"seed": 3}
    assert config["output_dir"].startswith("outputs/quickstart-")
    assert not Path("outputs").exists()

    outcome = command("train", "--max-steps", 1, "--eval-samples", 2, "--output-dir", "quick")
    assert outcome.code == 0, outcome.err
    assert RunFolder(Path("quick")).summary()["steps"] == 1
    assert command("train", "--output-dir", "quick").code == 2
    assert command("train", "--num-generations", 1, "--output-dir", "other").code == 2
    assert built == [0]  # the last two were refused before a model was built
    assert not Path("other").exists()


def test_several_processes_of_the_quickstart_need_a_name(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = command("train", "--dry-run", "--batch-size", 64)
    assert refused.code == 2
    assert "Give one: --run-name or --output-dir" in refused.err
    named = command("train", "--dry-run", "--batch-size", 64, "--run-name", "mine")
    assert yaml.safe_load(named.out)["output_dir"] == "outputs/mine"


def test_runs_that_begin_in_one_second_have_names_of_their_own(command, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form, *_: "now")
    Path("outputs/arithmetic-m-hf-now").mkdir(parents=True)
    Path("outputs/arithmetic-m-hf-now-2").mkdir()
    config = yaml.safe_load(command("train", "arithmetic", "-m", "m", "--dry-run").out)
    assert (config["run_name"], config["output_dir"]) == ("arithmetic-m-hf-now-3", "outputs/arithmetic-m-hf-now-3")
