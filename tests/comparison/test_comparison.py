"""Comparing backends: the numbers by hand, the plot and refusals. `test_compared_runs.py` has whole comparisons."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imread
from other_backends import OTHER_BACKEND

from rlvr.child_process import read_task
from rlvr.cli import main
from rlvr.cli.compare import print_comparison
from rlvr.comparison import BackendRun, Comparison, compare
from rlvr.comparison.child import peak_of_process
from rlvr.comparison.plot import plot
from rlvr.errors import BackendError, ConfigError, PluginLoadError, RunFolderError, UnknownPluginError

FIRST = BackendRun(
    backend="one",
    folder="out/one",
    lora={"alpha": 16, "r": 8},
    rollout_engine="grouped",
    gradient_checkpointing=True,
    changed_arguments={"bf16": True},
    rewards=[0.25, 0.5, 0.75],
    step_seconds=[10.0, 4.0, 2.0],
    rollout_seconds=[6.0, 2.0, 1.0],
    scoring_seconds=[1.0, 0.5, 0.25],
    tokens=[900, 300, 300],
    peak_bytes=3 * 2**20,
    first_loss=0.125,
    first_grad_norm=2.0,
    first_completions=["a", "b", "c", "d"],
    first_update={"a": [0.0, 0.0], "b": [3.0, -4.0]},
    probe_ids=[[1, 2, 3]],
    probe_logprobs=[[-1.0, -2.0]],
    probe_gradient={"a": [0.0, 0.0], "b": [6.0, 8.0]},
)
OTHER = dataclasses.replace(
    FIRST,
    backend="other",
    lora=None,
    first_loss=0.0625,
    first_completions=["a", "x", "c", "y"],
    probe_logprobs=[[-1.0, -2.5]],
    probe_gradient={"a": [0.0, 5.0], "b": [6.0, 8.0]},
)


def test_the_table_by_hand():
    comparison = Comparison(env="arithmetic", model="m", as_is=False, runs=(FIRST, OTHER))
    rows = dict(comparison.rows())
    assert rows["reward, first → last step"][0] == "0.250 → 0.750"
    assert rows["step, s"][0] == "3.000"  # the median of 4 and 2: the first step does not count
    assert rows["  rollout, s"][0] == "1.500"
    assert rows["  scoring, s"][0] == "0.375"
    assert rows["  update, s"][0] == "1.125"  # the median of 1.5 and 0.75
    assert (
        rows["tokens a second"][0] == "112"
    )  # the median of 300 in 4 s and 300 in 2 s: as the times, without the first step
    assert rows["peak memory, MiB"][0] == "3"
    assert rows["start differs by, nats a token"] == ["0", "0.5"]
    assert rows["gradient differs by"] == ["0", "0.5"]  # 5 of 10
    assert rows["same completions at step 1"] == ["4 of 4", "2 of 4"]
    assert rows["update at step 1 differs by"] == ["0", "other completions"]
    assert rows["lora alpha / r"] == ["16 / 8", "no LoRA"]
    found = comparison.as_json()["backends"]["other"]
    assert found["start_differs_by_nats"] == 0.5
    assert found["first_loss_differs_by"] == 0.0625
    assert (found["gradient_differs_by"], found["first_update_differs_by"]) == (0.5, None)
    assert not {"first_update", "probe_gradient"} & {*found}
    assert found["update_seconds"] == [3.0, 1.5, 0.75]


def test_the_losses_of_the_first_step_are_compared_with_the_first_run(capsys):
    third = dataclasses.replace(FIRST, backend="third", first_loss=-0.375)
    print_comparison(Comparison(env="arithmetic", model="m", as_is=False, runs=(FIRST, OTHER, third)))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("loss at step 1 differs")] == [
        "loss at step 1 differs by 0.062 between one and other",  # 0.0625, to two digits
        "loss at step 1 differs by 0.5 between one and third",
    ]


def test_a_loss_or_a_gradient_norm_that_is_not_finite_is_said(capsys):
    other = dataclasses.replace(OTHER, first_loss=None, first_grad_norm=None)
    comparison = Comparison(env="arithmetic", model="m", as_is=False, runs=(FIRST, other))
    rows = dict(comparison.rows())
    assert rows["loss at step 1"] == ["0.125000", "not finite"]
    assert rows["gradient norm at step 1"] == ["2.000000", "not finite"]
    found = comparison.as_json()["backends"]["other"]
    assert (found["first_grad_norm"], found["first_loss_differs_by"]) == (None, None)
    print_comparison(comparison)
    assert "loss at step 1 is not finite, and not compared between one and other" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("update", "differs_by", "text"),
    [
        ({"a": [0.0, 0.0], "b": [3.0, -4.0]}, 0, "0"),
        ({"a": [0.0, 0.0], "b": [-3.0, 4.0]}, 2, "2"),
        ({"a": [0.0, 0.0], "b": [6.0, -8.0]}, 1, "1"),
        ({"a": [3.0, 4.0], "b": [3.0, -4.0]}, 1, "1"),
        ({"b": [3.0, -4.0]}, None, "not comparable"),
        ({"a": [0.0, 0.0], "b": [float("nan"), -4.0]}, None, "not comparable"),
    ],
    ids=["same", "opposite", "twice as large", "another tensor moved", "other tensors", "not finite"],
)
def test_updates_and_gradients_are_compared_as_a_share_of_their_norm(update, differs_by, text):
    other = dataclasses.replace(FIRST, first_update=update, probe_gradient=update)
    first = dataclasses.replace(FIRST, probe_gradient=FIRST.first_update)
    assert other.update_difference(first) == other.gradient_difference(first) == differs_by
    rows = dict(Comparison(env="e", model="m", as_is=True, runs=(first, other)).rows())
    assert rows["update at step 1 differs by"] == ["0", text]
    assert rows["gradient differs by"] == ["0", text]


def test_a_first_step_without_an_update_is_not_called_agreement():
    still = dataclasses.replace(FIRST, first_update={"a": [0.0, 0.0], "b": [0.0, 0.0]})
    assert still.update_difference(still) is None
    rows = dict(Comparison(env="e", model="m", as_is=True, runs=(still, still)).rows())
    assert rows["update at step 1 differs by"] == ["no update", "no update"]
    rows = dict(Comparison(env="e", model="m", as_is=True, runs=(still, FIRST)).rows())
    assert rows["update at step 1 differs by"] == ["no update", "not comparable"]


def test_the_table_says_how_backends_sample_and_checkpoint_where_they_differ():
    def rows(other):
        return dict(Comparison(env="e", model="m", as_is=True, runs=(FIRST, other)).rows())

    assert not {"rollout engine", "gradient checkpointing"} & {*rows(FIRST)}
    found = rows(dataclasses.replace(FIRST, rollout_engine="generate", gradient_checkpointing=False))
    assert found["rollout engine"] == ["grouped", "generate"]
    assert found["gradient checkpointing"] == ["on", "off"]


def test_policies_that_read_other_tokens_are_not_compared():
    other = dataclasses.replace(OTHER, probe_ids=[[1, 2, 4]])
    assert other.probe_difference(FIRST) is other.gradient_difference(FIRST) is None
    rows = dict(Comparison(env="e", model="m", as_is=True, runs=(FIRST, other)).rows())
    assert rows["start differs by, nats a token"] == ["0", "other tokens"]


def test_one_step_alone_is_its_own_median():
    assert dataclasses.replace(FIRST, rewards=[0.5]).steady([2.5]) == 2.5


def test_steps_on_the_same_rollouts_share_their_time_and_their_tokens(tmp_path):
    run = dataclasses.replace(
        FIRST,
        rewards=[0.25, None, 0.5, None, 0.75],
        step_seconds=[10.0, 1.0, 3.0, 1.0, 8.0],
        rollout_seconds=[8.0, 0.0, 2.0, 0.0, 6.0],
        scoring_seconds=[1.0, 0.0, 0.0, 0.0, 0.0],
        tokens=[900, 0, 400, 0, 400],
    )
    assert run.batch_rewards == [(1, 0.25), (3, 0.5), (5, 0.75)]
    comparison = Comparison(env="e", model="m", as_is=False, runs=(run,))
    rows = dict(comparison.rows())
    assert rows["reward, first → last step"] == ["0.250 → 0.750"]
    assert rows["step, s"] == ["5.000"]  # the median of 2 and 8
    assert rows["  rollout, s"] == ["3.500"]  # of 1 and 6
    assert rows["  update, s"] == ["1.500"]  # of 1 and 2
    assert rows["tokens a second"] == ["75"]  # of 400 in 4 s and 400 in 8 s
    assert comparison.as_json()["backends"]["one"]["rewards"] == [0.25, None, 0.5, None, 0.75]
    plot(comparison, tmp_path / "c.png")


def test_the_plot_draws_every_reward_and_stacks_the_parts_of_a_step(monkeypatch, tmp_path):
    figures = []

    class KeptFigure(Figure):
        def __init__(self, **options):
            super().__init__(**options)
            figures.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", KeptFigure)
    plot(Comparison(env="arithmetic", model="models/tiny", as_is=False, runs=(FIRST, OTHER)), tmp_path / "c.png")
    reward, times, speed, memory = figures[0].axes
    drawn = [(line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) for line in reward.lines]
    assert drawn == [("one", [1, 2, 3], [0.25, 0.5, 0.75]), ("other", [1, 2, 3], [0.25, 0.5, 0.75])]
    bars = {part.get_label(): [(bar.get_x(), bar.get_width()) for bar in part] for part in times.containers}
    assert bars == {"rollout": [(0, 1.5)] * 2, "scoring": [(1.5, 0.375)] * 2, "update": [(1.875, 1.125)] * 2}
    assert [bar.get_width() for bar in speed.patches] == [112.5, 112.5]
    assert [bar.get_width() for bar in memory.patches] == [3, 3]
    pixels = imread(tmp_path / "c.png")
    assert pixels.shape == (975, 1500, 4)
    for part in times.containers:
        assert (abs(pixels - part[0].get_facecolor()) < 0.01).all(axis=-1).sum() > 1000, part.get_label()


def test_the_plot_says_what_it_shows(tmp_path):
    with rc_context({"svg.fonttype": "none"}):
        plot(Comparison(env="arithmetic", model="models/tiny", as_is=False, runs=(FIRST, OTHER)), tmp_path / "c.svg")
    picture = ElementTree.parse(tmp_path / "c.svg")
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"arithmetic, tiny", "mean reward", "seconds a step (median)", "rollout", "scoring", "update"} <= {*texts}
    assert {"tokens a second", "peak memory, MiB"} <= {*texts}
    assert texts.count("one") == texts.count("other") == 4  # a line and bars
    assert texts[: texts.index("step")] == ["1", "2", "3"]


def test_the_reward_of_a_single_step_is_seen(tmp_path):
    run = dataclasses.replace(FIRST, rewards=[0.5], step_seconds=[2.0], rollout_seconds=[1.0], scoring_seconds=[0.5])
    assert dict(Comparison(env="e", model="m", as_is=False, runs=(run,)).rows())["reward, first → last step"] == [
        "0.500 → 0.500"
    ]
    plot(Comparison(env="arithmetic", model="m", as_is=False, runs=(run, run)), tmp_path / "c.png")
    middle = imread(tmp_path / "c.png")[200:400, 300:600, :3]  # of the rewards
    assert (middle < 0.7).any()


@pytest.mark.parametrize("installed", [True, False])
def test_a_comparison_has_a_picture_where_matplotlib_is(monkeypatch, tmp_path, capsys, installed):
    comparison = Comparison(env="arithmetic", model="m", as_is=False, runs=(FIRST, OTHER))
    monkeypatch.setattr("rlvr.comparison.compare", lambda *arguments, **options: comparison)
    if not installed:
        monkeypatch.setattr("rlvr.comparison.plot.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "arithmetic", "--backends", "one,other", "-m", "m", "--output-dir", str(tmp_path)])
    assert not stop.value.code
    assert (tmp_path / "comparison.png").exists() == installed
    assert ('pip install "rlvr[docs]"' in capsys.readouterr().out) != installed


@pytest.mark.parametrize("backends", [[], ["hf"], ["hf", "hf"]], ids=str)
def test_fewer_than_two_backends_are_refused(tmp_path, backends):
    with pytest.raises(ConfigError, match="at least two different"):
        compare("arithmetic", "m", backends, steps=1, output_dir=tmp_path / "out")


def test_what_cannot_run_is_refused_before_anything_does(tmp_path, other_backend):
    with pytest.raises(UnknownPluginError, match="unknown backend 'hff'"):
        compare("arithmetic", "m", ["hf", "hff"], steps=1, output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="learning_rate"):
        compare("arithmetic", "m", ["hf", "other"], steps=1, output_dir=tmp_path / "out", learning_rate=-1)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "notes.txt").touch()
    with pytest.raises(RunFolderError, match="holds other files"):
        compare("arithmetic", "m", ["hf", "other"], steps=1, output_dir=tmp_path / "held")
    assert not (tmp_path / "out").exists()


def test_a_backend_that_cannot_be_loaded_is_found_before_anything_is_trained(tmp_path, monkeypatch, install_backend):
    install_backend("other", OTHER_BACKEND.replace('name = "other"', "protocol_version = 99"))
    monkeypatch.setattr("rlvr.comparison._run", lambda *arguments: pytest.fail("trains"))
    with pytest.raises(PluginLoadError, match=r"'other' \(other 1.0\) is broken.*written for version 99"):
        compare("arithmetic", "m", ["hf", "other"], steps=1, output_dir=tmp_path / "out")
    (tmp_path / "site" / "other_plugin.py").write_text(
        OTHER_BACKEND.replace("    from", "    import os; os._exit(7)\n    from", 1)
    )
    with pytest.raises(BackendError, match="backend 'other' cannot be loaded: the process ended with exit code 7"):
        compare("arithmetic", "m", ["hf", "other"], steps=1, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_run_that_fails_leaves_what_the_others_measured(tmp_path, monkeypatch, capsys, other_backend, as_json):
    def run(settings, folder):
        if settings["backend"] == "hf":
            raise BackendError("the run with backend 'hf' ended with exit code 1; disk on fire")
        return OTHER

    monkeypatch.setattr("rlvr.comparison._try_to_load", lambda name: None)
    monkeypatch.setattr("rlvr.comparison._run", run)
    line = ["compare", "arithmetic", "--backends", "hf,other", "-m", "m", "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*line, *(["--json"] if as_json else [])])
    assert stop.value.code == 1
    shown = capsys.readouterr()
    assert shown.err == "rlvr: the run with backend 'hf' ended with exit code 1; disk on fire\n"
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(kept["backends"]) == ["other"]
    assert "disk on fire" in kept["failed"]["hf"]
    assert (tmp_path / "out" / "comparison.png").exists()
    if as_json:
        assert json.loads(shown.out) == kept
    else:
        assert "2 of 4" not in shown.out  # it is compared with itself, as the first that finished
        assert "4 of 4" in shown.out


def test_what_was_measured_is_kept_where_a_later_run_is_interrupted(tmp_path, monkeypatch, other_backend):
    def run(settings, folder):
        if settings["backend"] == "other":
            raise KeyboardInterrupt
        return FIRST

    monkeypatch.setattr("rlvr.comparison._try_to_load", lambda name: None)
    monkeypatch.setattr("rlvr.comparison._run", run)
    with pytest.raises(KeyboardInterrupt):
        compare("arithmetic", "m", ["hf", "other"], steps=1, output_dir=tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "comparison.json").read_text())["backends"]) == ["one"]


def test_runs_that_all_fail_are_an_error_with_their_last_lines(tmp_path, other_backend):
    says = r"(?s)backend 'hf' ended with exit code 2.*no-such-model.*does not exist.*backend 'other' ended with"
    with pytest.raises(BackendError, match=says):
        compare("arithmetic", str(tmp_path / "no-such-model"), ["hf", "other"], steps=1, output_dir=tmp_path / "out")


def test_secrets_are_not_on_the_command_line_of_a_process(tmp_path, monkeypatch, other_backend):
    lines, tasks = [], []

    def record(command, **options):
        lines.append(" ".join(command))
        tasks.append(read_task(Path(command[-1])))
        return subprocess.CompletedProcess(command, returncode=0, stdout="")

    monkeypatch.setattr("rlvr.comparison.subprocess.run", record)
    secret = {"env_options": {"api_key": "hush"}}
    with pytest.raises(BackendError):
        compare("arithmetic", "m", ["hf", "other"], steps=1, output_dir=tmp_path / "out", **secret)
    assert "hush" not in "".join(lines)
    assert {"api_key": "hush"} in [task.get("settings", {}).get("env_options") for task in tasks]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_the_peak_memory_of_a_process_is_its_own_and_not_its_parents():
    program = "from rlvr.comparison.child import peak_of_process; print(peak_of_process())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 2**20 < int(child.stdout) < peak_of_process() / 2  # this one has torch


def test_a_process_gets_no_precision_that_a_trainer_of_this_one_exported(tmp_path, monkeypatch, other_backend):
    given = []

    def record(command, **options):
        given.append(options["env"])
        return subprocess.CompletedProcess(command, returncode=0, stdout="")

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("rlvr.comparison.subprocess.run", record)
    with pytest.raises(BackendError):
        compare("arithmetic", "m", ["hf", "other"], steps=1, output_dir=tmp_path / "out")
    assert len(given) == 4  # to load it and to train, each backend
    assert not any("ACCELERATE_MIXED_PRECISION" in variables for variables in given)
