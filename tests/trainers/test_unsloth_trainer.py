"""`EnhancedGRPOTrainer` on the trainer that Unsloth generates for GPUs, without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unsloth


def test_unsloths_generated_trainer_trains():
    """Prompts are of unequal lengths, so that the columns of its log-probabilities are not TRL's."""
    command = [sys.executable, str(Path(__file__).with_name("unsloth_on_cpu.py")), "0", "0.1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"beta"')]
    assert [run["beta"] for run in found] == [0.0, 0.1]
    for run in found:
        assert "UnslothGRPOTrainer" in run["classes"]
        assert [row["step"] for row in run["rows"]] == [1, 2]
        assert all(row["grad_norm"] > 0 for row in run["rows"])
        assert run["rows"][0]["sampler_drift"] < 1e-5
    first, second = (row["kl"] for row in found[1]["rows"])
    assert abs(first) < 1e-5  # the policy from itself
    assert second > 1e-4
