"""`EnhancedGRPOTrainer` on the trainer that Unsloth generates for GPUs, without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unsloth


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_unsloths_generated_trainer_trains(beta):
    """Prompts are of unequal lengths, so that the columns of its log-probabilities are not TRL's."""
    script = Path(__file__).with_name("unsloth_on_cpu.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(beta)], capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert "UnslothGRPOTrainer" in found["classes"]
    assert [row["step"] for row in found["rows"]] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in found["rows"])
    assert found["rows"][0]["sampler_drift"] < 1e-5
    if beta:
        first, second = (row["kl"] for row in found["rows"])
        assert abs(first) < 1e-5  # the policy from itself
        assert second > 1e-4
