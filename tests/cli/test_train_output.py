"""What `rlvr train` says at the end of a run."""

from types import SimpleNamespace

import pytest

from rlvr.cli.train import print_run

pytestmark = pytest.mark.both


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        (True, "packed rows with shared prompts saved 62% of the padded tokens"),
        (False, "no shared prompts in training"),
    ],
)
def test_the_last_lines_name_both_paths_and_what_they_saved(tmp_path, capsys, shares, says):
    summary = {
        "steps": 1, "seconds": 2.4, "backend": "hf", "rollout_engine": "grouped", "shared_prefix": shares,
        "token_ratio_saved": 0.62 * shares, "eval_before": {}, "eval_after": {},
    }  # fmt: skip
    print_run(SimpleNamespace(summary=summary, folder=tmp_path))
    assert f"1 step in 2 s · backend hf · rollouts by grouped · {says}\n" in capsys.readouterr().out
