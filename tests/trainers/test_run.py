"""`rlvr.train` and `rlvr.evaluate` on a tiny model: what they leave behind, and what they refuse."""

import logging

import pytest
import wandb
from huggingface_hub import ModelCard
from transformers import TrainerCallback

import rlvr
from rlvr import ModelSettings
from rlvr.backends.protocol import ArgumentChange
from rlvr.config import TrainSettings
from rlvr.environments.base import Environment
from rlvr.errors import ConfigError, DataError, RewardError
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.tracking.run_folder import RunFolder
from rlvr.trainers import EnhancedGRPOTrainer
from rlvr.trainers.arguments import grpo_config, training_arguments
from rlvr.trainers.run import resolve_settings, training_rows

pytestmark = pytest.mark.both

SMALL = {"max_prompt_length": 64, "max_tokens": 4, "num_generations": 2, "prompts_per_step": 2, "report_to": "none"}


def first_byte_is_even(trajectory):
    return float(bool(trajectory.text) and ord(trajectory.text[0]) % 2 == 0)


def letters(trajectory):
    return float(len(trajectory.text))


@pytest.fixture
def environment():
    rows = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(12)]
    return Environment(
        name="bytes",
        train_dataset=rows[:9],
        eval_dataset=rows[9:],
        rubric=Rubric(first_byte_is_even, WeightedReward(letters, 0.0)),
    )


@pytest.fixture
def policy(model_folder):
    return rlvr.load_policy(str(model_folder), backend="hf", max_seq_length=80)


def test_an_environment_and_a_policy_made_in_python(environment, policy, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    run = rlvr.train(
        *(environment, policy, "hf"),
        **SMALL,
        callbacks=[Watch()],
        max_steps=3,
        eval_every=1,
        save_steps=2,
        learning_rate=1e-2,
        output_dir=tmp_path / "run",
    )
    assert seen == [1, 2, 3]
    assert run.policy is policy
    assert run.folder == tmp_path / "run"
    evaluations = [(row["step"], row["evaluation"]) for row in run.metrics() if "evaluation" in row]
    assert [step for step, _ in evaluations] == [0, 1, 2, 3]
    assert run.summary["eval_before"] == evaluations[0][1]
    assert run.summary["eval_after"] == evaluations[-1][1]
    assert set(run.summary["eval_after"]) == {"reward", "first_byte_is_even", "letters", "pass@1"}
    assert run.summary["tokens"] > 0
    assert [row["step"] for row in run.metrics() if "loss" in row] == [1, 2, 3]

    trained = [row for row in run.trajectories() if row["phase"] == "train"]
    assert len(trained) == 3 * 4
    assert set(trained[0]) == {
        *("step", "phase", "group", "prompt", "completion", "rewards", "reward", "advantage", "stop_reason", "adapter")
    }
    assert trained[0]["prompt"][0]["role"] == "user"
    assert trained[0]["rewards"].keys() == {"first_byte_is_even", "letters"}
    assert len({row["group"] for row in trained}) == 3 * 2
    assert (run.folder / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists()
    assert (run.folder / "adapter" / "adapter_config.json").exists()
    assert RunFolder(run.folder).config()["env"] == "bytes"


@pytest.mark.parametrize("keeps_order", [True, False])
def test_rows_are_shuffled_unless_their_order_matters(environment, policy, tmp_path, keeps_order):
    environment.keeps_order = keeps_order
    run = rlvr.train(environment, policy, "hf", **SMALL, max_steps=4, eval_samples=0, output_dir=tmp_path / "run")
    trained = [row["prompt"][-1]["content"] for row in run.trajectories()]
    in_order = [row["question"] for row in environment.train_dataset][:8]
    assert (list(dict.fromkeys(trained)) == in_order) is keeps_order


def test_evaluations_of_a_run_are_kept_by_group_too(environment, policy, tmp_path):
    environment.group_metrics_by = "kind"
    environment.eval_dataset = [
        {**row, "kind": kind} for row, kind in zip(environment.eval_dataset, "abb", strict=True)
    ]
    run = rlvr.train(environment, policy, "hf", **SMALL, max_steps=1, output_dir=tmp_path / "run")
    rows = [row for row in run.metrics() if "evaluation" in row]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        by_kind = row["evaluation_by_group"]
        assert set(by_kind) == {"kind=a", "kind=b"}
        total = by_kind["kind=a"]["letters"] + 2 * by_kind["kind=b"]["letters"]
        assert row["evaluation"]["letters"] == pytest.approx(total / 3)


def test_evaluating_does_not_change_the_training(environment, model_folder, tmp_path):
    def losses(name, **options):
        run = rlvr.train(environment, model_folder, "hf", **SMALL, **options, max_steps=2, output_dir=tmp_path / name)
        return [(row["loss"], row["reward"], row["grad_norm"]) for row in run.metrics() if "loss" in row]

    assert losses("evaluated", eval_samples=3, eval_every=1) == losses("plain", eval_samples=0)


def test_what_comes_too_late_for_objects_is_refused(environment, policy, tmp_path):
    with pytest.raises(ConfigError) as caught:
        rlvr.train(environment, policy, "hf", lora_r=4, bf16=True, max_tokens=100, output_dir=tmp_path / "run")
    assert len(caught.value.problems) == 3
    assert "lora_r was given for a policy that is loaded already" in str(caught.value)
    assert "max_prompt_length 2048 + max_tokens 100 = 2148 tokens, and the policy was loaded for 80" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match="dtype was given for a policy that is loaded already"):
        rlvr.evaluate(environment, policy, "hf", dtype="float32", max_prompt_length=64, max_tokens=4)
    with pytest.raises(ConfigError, match="options were given for an environment that exists already: levels"):
        rlvr.train(environment, policy, "hf", **SMALL, env_options={"levels": "1"}, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_weights_are_trained_without_peft(environment, model_folder, tmp_path):
    run = rlvr.train(
        *(environment, model_folder, "hf"),
        **SMALL,
        peft=False,
        max_steps=1,
        eval_samples=0,
        output_dir=tmp_path / "run",
    )
    assert run.policy.lora is None
    assert (run.folder / "model" / "model.safetensors").exists()
    assert run.summary["eval_before"] == run.summary["eval_after"] == {}


def test_a_saved_run_is_evaluated_as_it_was_at_its_end(environment, model_folder, tmp_path):
    run = rlvr.train(
        environment, model_folder, "hf", **SMALL, max_steps=2, learning_rate=0.05, output_dir=tmp_path / "run"
    )
    options = {"max_prompt_length": 64, "max_tokens": 4}
    found = rlvr.evaluate(environment, model_folder, "hf", adapter=run.folder, **options)
    assert found.metrics == pytest.approx(run.summary["eval_after"])


def test_the_engines_evaluate_alike(environment, model_folder):
    found = [
        rlvr.evaluate(
            *(environment, model_folder, "hf"),
            rollout_engine=engine,
            max_prompt_length=64,
            max_tokens=12,
            batch_size=2,
        )
        for engine in ("generate", "grouped", "auto")
    ]
    texts = [[item.trajectory.text for item in evaluation.trajectories] for evaluation in found]
    assert texts[0] == texts[1] == texts[2]
    assert found[0].metrics == found[1].metrics == found[2].metrics
    with pytest.raises(ConfigError, match="'vllm', which trains only"):
        rlvr.evaluate(environment, model_folder, "hf", rollout_engine="vllm")


def test_wandb_that_is_asked_for_without_a_key_is_kept_in_the_run_folder(
    environment, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    options = {**SMALL, "report_to": "wandb", "max_steps": 1, "eval_samples": 0}
    for name in ("first", "second"):  # each its own W&B run, though in one process
        rlvr.train(environment, model_folder, "hf", **options, output_dir=tmp_path / name)
        assert len(list((tmp_path / name / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert not (tmp_path / "wandb").exists()
    wandb.teardown()  # it keeps what the environment said when it was first used


def test_a_failing_reward_function_stops_the_run_and_leaves_what_there_is(environment, model_folder, tmp_path):
    calls = []

    def breaks(trajectory):
        calls.append(1)
        if len(calls) > 4:
            raise KeyError("answers")
        return 1.0

    environment.rubric = Rubric(first_byte_is_even, breaks)
    with pytest.raises(RewardError, match="reward function 'breaks' raised KeyError"):
        rlvr.train(environment, model_folder, "hf", **SMALL, max_steps=3, eval_samples=0, output_dir=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert len(list(folder.trajectories())) == 4
    assert (folder.checkpoints / "checkpoint-1" / "lineage.json").exists()
    assert not (folder.path / "summary.json").exists()


def test_settings_come_from_file_then_keywords(tmp_path, monkeypatch):
    monkeypatch.delenv("RLVR_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)
    settings = resolve_settings({"env": "arithmetic", "model": "org/name", "seed": 1}, {"seed": 2})
    assert settings.seed == 2
    assert settings.backend == "hf"
    assert settings.output_dir == f"outputs/{settings.run_name}"
    assert settings.run_name.startswith("arithmetic-name-hf-")
    monkeypatch.setenv("RLVR_BACKEND", "mine")
    assert resolve_settings({"env": "reasoning-gym:x", "model": "m"}).run_name.startswith("reasoning-gym-x-m-mine-")
    with pytest.raises(ConfigError, match="no model was given"):
        rlvr.train("arithmetic")


def test_several_processes_are_given_the_name_of_their_run(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = {"env": "arithmetic", "model": "m"}
    with pytest.raises(ConfigError, match=r"2 processes train, .* Give one: --run-name or --output-dir"):
        resolve_settings(asked)
    assert resolve_settings(asked, {"run_name": "mine"}).output_dir == "outputs/mine"
    assert resolve_settings(asked, {"output_dir": "mine"}).output_dir == "mine"


@pytest.mark.parametrize("main", [True, False])
def test_the_main_process_pushes_what_was_saved_with_a_model_card(
    environment, policy, tmp_path, monkeypatch, hub, main
):
    monkeypatch.setattr(EnhancedGRPOTrainer, "is_world_process_zero", lambda self: main, raising=False)
    options = {**SMALL, "max_steps": 1, "eval_samples": 0, "push_to_hub": True, "run_name": "mine"}
    run = rlvr.train(environment, policy, "hf", **options, output_dir=tmp_path / "run")
    if not main:
        assert hub == []
        return
    created, uploaded = hub
    assert created == ("create", "mine", {"private": None, "exist_ok": True})
    assert uploaded[:2] == ("upload", "me/mine")
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json"} <= set(uploaded[2])
    card = ModelCard.load(run.folder / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    for words in ("for 1 optimizer step,", "environment `bytes`", run.summary["adapter"]):
        assert words in card.text
    assert "Comparison" not in card.text
    assert rlvr.lineage(run.folder).ok


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"hub_model_id": "a/b/c"}, "hub_model_id is 'a/b/c'; it must be a repository"),
        ({"run_name": "a run"}, "run_name, which names the repository .* is 'a run'; it must be a repository"),
    ],
)
def test_what_cannot_be_pushed_to_is_refused_before_training(environment, policy, tmp_path, monkeypatch, named, says):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    with pytest.raises(ConfigError, match=says):
        rlvr.train(environment, policy, "hf", **SMALL, push_to_hub=True, **named, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_options_of_loading_in_a_file_come_too_late_for_a_loaded_policy(environment, policy, tmp_path):
    (tmp_path / "run.yaml").write_text("load-in-4bit: true\nlora_r: 4\n")
    with pytest.raises(ConfigError) as caught:
        rlvr.train(environment, policy, "hf", config=tmp_path / "run.yaml", **SMALL, output_dir=tmp_path / "run")
    assert [problem.split()[0] for problem in caught.value.problems] == ["load_in_4bit", "lora_r"]
    assert not (tmp_path / "run").exists()


def test_a_configuration_that_a_run_has_left_repeats_it(environment, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {**SMALL, "eval_samples": 0, "save_steps": 1}
    first = rlvr.train(environment, model_folder, "hf", **options, max_steps=1, run_name="first")
    rlvr.train(environment, resume_from_checkpoint="last", run_name="first", max_steps=2)
    resumed = first.folder / "config.resumed-1.yaml"
    again = rlvr.train(environment, config=resumed, run_name="again")
    elsewhere = rlvr.train(environment, config=resumed, output_dir="elsewhere")
    assert [str(run.folder) for run in (again, elsewhere)] == ["outputs/again", "elsewhere"]
    for run in (again, elsewhere):
        assert [row["step"] for row in run.metrics() if "loss" in row] == [1, 2]


def test_examples_with_long_prompts_are_left_out_and_counted(environment, policy, caplog):
    environment.train_dataset = [*environment.train_dataset, {"question": "x" * 100, "answer": ""}]
    settings = TrainSettings(max_prompt_length=64, num_generations=2, prompts_per_step=2).resolved()
    with caplog.at_level(logging.WARNING, logger="rlvr"):
        rows = training_rows(environment, policy, settings)
    assert [row["answer"] for row in rows] == [str(n + 1) for n in range(9)]
    assert "1 of 10 examples are left out" in caplog.text
    many = TrainSettings(max_prompt_length=64, num_generations=2, prompts_per_step=10).resolved()
    with pytest.raises(DataError, match="has 9 training examples, and a step takes 10"):
        training_rows(environment, policy, many)


def test_held_out_examples_with_long_prompts_are_left_out_and_counted(environment, policy, tmp_path, caplog):
    long = {"question": "x" * 100, "answer": ""}
    environment.eval_dataset = [long, *environment.eval_dataset]
    run = rlvr.train(environment, policy, "hf", **SMALL, max_steps=1, eval_samples=3, output_dir=tmp_path / "run")
    evaluated = [(row["step"], row["group"]) for row in run.trajectories() if row["phase"] == "eval"]
    assert evaluated == [(step, example) for step in (0, 1) for example in (1, 2)]
    left_out = "1 of 3 held-out examples are left out: their prompts are longer than max_prompt_length 64 tokens."
    assert [record.getMessage() for record in caplog.records].count(left_out) == 1

    options = {"max_prompt_length": 64, "max_tokens": 4, "output": tmp_path / "attempts.jsonl"}
    found = rlvr.evaluate(environment, policy, "hf", **options)
    assert [item.example for item in found.trajectories] == [1, 2, 3]
    assert "1 of 4 examples are left out" in caplog.text
    again = rlvr.evaluate(environment, policy, "hf", **options, resume=True)
    assert (again.examples, again.metrics) == (3, found.metrics)

    environment.eval_dataset = [long]
    with pytest.raises(DataError, match="every prompt of the 1 examples of environment 'bytes' is longer"):
        rlvr.evaluate(environment, policy, "hf", max_prompt_length=64, max_tokens=4)
    with pytest.raises(DataError, match="every prompt of the 1 held-out examples"):
        rlvr.train(environment, policy, "hf", **SMALL, max_steps=1, output_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


class Demanding:
    """A backend that insists on one argument."""

    def training_arguments(self, policy):
        return (
            ArgumentChange("optim", "sgd", "it has no other"),
            ArgumentChange("seed", 3, "as asked for"),
        )


def test_settings_become_training_arguments_and_the_backend_has_the_last_word(policy, tmp_path):
    settings = (
        TrainSettings(
            env="e",
            model="m",
            seed=3,
            kl_beta=0.1,
            top_k=5,
            min_p=0.2,
            max_steps=7,
            num_generations=4,
            prompts_per_step=3,
        )
        .resolved()
        .planned()
    )
    arguments, changes = training_arguments(settings, policy, Demanding(), RunFolder(tmp_path))
    assert [change.name for change in changes] == ["optim"]  # the other is what was asked for
    expected = {
        "optim": "sgd",
        "seed": 3,
        "beta": 0.1,
        "top_k": 5,
        "min_p": 0.2,
        "max_steps": 7,
        "num_generations": 4,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "output_dir": str(tmp_path / "checkpoints"),
        "bf16": False,
        "fp16": False,
        "loss_type": "dapo",
        "use_vllm": False,
    }
    assert {name: arguments[name] for name in expected} == expected


def test_every_argument_exists_in_the_installed_trl(policy, tmp_path):
    from trl import GRPOConfig

    settings = TrainSettings(env="e", model="m", rollout_engine="vllm").resolved().planned()
    arguments, _ = training_arguments(settings, policy, Demanding(), RunFolder(tmp_path))
    assert set(arguments) <= set(GRPOConfig.__dataclass_fields__)
    assert arguments["vllm_enable_sleep_mode"] is False  # on a CPU vLLM has none
    assert arguments["vllm_gpu_memory_utilization"] == GRPOConfig.vllm_gpu_memory_utilization
    assert settings.model_settings().gpu_memory_utilization == ModelSettings.gpu_memory_utilization


def test_a_vllm_server_reaches_trl(policy, tmp_path):
    server = "http://localhost:8000"
    settings = TrainSettings(env="e", model="m", rollout_engine="vllm", vllm_server=server).resolved().planned()
    config = grpo_config(training_arguments(settings, policy, Demanding(), RunFolder(tmp_path))[0])
    assert (config.use_vllm, config.vllm_mode, config.vllm_server_base_url) == (True, "server", server)
    assert config.vllm_enable_sleep_mode is False  # there is none of ours to put to sleep
    assert settings.model_settings().fast_inference == "off"  # nor is another vLLM loaded beside the policy


def test_trl_takes_the_arguments_as_they_are(policy, tmp_path):
    settings = TrainSettings(env="e", model="m", loss_type="dr_grpo", max_steps=3).resolved().planned()
    arguments, _ = training_arguments(settings, policy, Demanding(), RunFolder(tmp_path))
    config = grpo_config(arguments)
    assert {name: getattr(config, name) for name in arguments} == arguments


@pytest.mark.unsloth
def test_the_same_run_on_unsloth_by_name_alone(environment, model_folder, tmp_path):
    run = rlvr.train(
        environment, model_folder, "unsloth", **SMALL, max_steps=2, eval_samples=2, output_dir=tmp_path / "run"
    )
    assert run.summary["backend"] == "unsloth"
    assert run.policy.lora.alpha == 32  # 16 asked for, doubled as Unsloth recommends
    assert len([row for row in run.metrics() if "loss" in row]) == 2
    found = rlvr.evaluate(
        environment, model_folder, "unsloth", adapter=run.folder, limit=2, max_prompt_length=64, max_tokens=4
    )
    assert found.metrics == pytest.approx(run.summary["eval_after"])


def test_a_run_with_secrets_goes_on_only_when_they_are_given_again(tmp_path):
    given = {"env": "judged", "model": "m", "env_options": {"judgeApiKey": "hush", "levels": 2}}
    folder = RunFolder.reserve(tmp_path / "run")
    folder.begin(given, seeds={}, policy={})
    checkpoint = folder.checkpoints / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    resume = {"output_dir": str(folder.path), "resume_from_checkpoint": "last"}
    assert "hush" not in (folder.path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"judgeApiKey holds '\(not kept\)'.*: --judgeApiKey VALUE"):
        resolve_settings(resume)
    with pytest.raises(ConfigError, match="judgeApiKey"):
        resolve_settings(folder.config())  # the run repeated, with --config
    again = resolve_settings({**resume, "env_options": {"judgeApiKey": "hush"}})
    assert again.env_options == {"judgeApiKey": "hush", "levels": 2}
