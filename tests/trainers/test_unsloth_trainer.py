"""`EnhancedGRPOTrainer` on the trainer that Unsloth generates for GPUs, without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unsloth


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    command = [sys.executable, str(Path(__file__).with_name("unsloth_on_cpu.py"))]
    environment = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("unsloth"))}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"')]


def test_unsloths_generated_trainer_trains(lines):
    """Prompts are of unequal lengths, so that the columns of its log-probabilities are not TRL's."""
    found = {line["run"]: line for line in lines if "rows" in line}
    assert list(found) == ["beta 0", "beta", "every weight"]
    for run in found.values():
        assert "UnslothGRPOTrainer" in run["classes"]
        assert [row["step"] for row in run["rows"]] == [1, 2]
        assert all(row["grad_norm"] > 0 for row in run["rows"])
        assert run["rows"][0]["sampler_drift"] < 1e-5
    for name in ("beta", "every weight"):
        first, second = (row["kl"] for row in found[name]["rows"])
        assert abs(first) < 1e-5  # the policy from itself, as it was given
        assert second > 1e-4


def test_evaluation_generates_and_scores_only(lines):
    (found,) = (line for line in lines if "forwards" in line)
    assert found["forwards"] == 0
    assert found["reward"] > 0


def test_tool_text_is_not_in_the_loss(lines):
    (found,) = (line for line in lines if "tools" in line)
    from_formula, with_tool_text = found["tools"]
    assert found["ignored"] > 0
    assert from_formula < 0.02  # Unsloth computes some of it in half precision
    assert with_tool_text > 0.1


def test_a_runs_training_arguments_are_those_of_the_other_backend(lines):
    """By itself Unsloth masks truncated completions and widens the clip for dapo, and drops the scaling of dr_grpo."""
    found = {line["loss_type"]: line for line in lines if "is_unsloths" in line}
    common = {
        "is_unsloths": True,
        "scale_rewards": "group",
        "epsilon": 0.2,
        "mask_truncated_completions": False,
        "beta": 0.0,
    }
    for loss_type, epsilon_high in (("dapo", 0.2), ("dr_grpo", 0.2), ("cispo", 5.0), ("grpo", 0.2)):
        assert found[loss_type] == {**common, "loss_type": loss_type, "epsilon_high": epsilon_high}


def test_unsloth_shares_prompts_in_our_trainer_where_it_does_in_its_own(lines):
    """Its loss shares them where a step has one prompt: it shuffles the rows of several. Its reference always does."""
    found = {line["prompts"]: line for line in lines if "prompts" in line}
    reference, loss, check = False, True, False  # whether gradients were on
    assert found[1]["unsloths"] == [reference, check, loss, reference, loss]
    assert found[2]["unsloths"] == [reference, reference]
    for line in found.values():
        ours = line["ours"]
        assert ours[-len(line["unsloths"]) :] == line["unsloths"]  # after the canary's
        assert not any(ours[: -len(line["unsloths"])])
        assert line["without"] == []
        assert all(distance < 0.01 for distance in line["distances"])
