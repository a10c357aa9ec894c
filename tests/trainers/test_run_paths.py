"""Which sampler and which training forward `rlvr.train` takes, and what its summary says of them."""

import pytest
from short_runs import SMALL, environment

import rlvr
from rlvr.tracking.run_folder import RunFolder

pytestmark = pytest.mark.both

PROMPT = len("_user\n0+1_\n_assistant\n")  # tokens: bytes, and a special token for each _
GROUP = SMALL["num_generations"]
RUN = {
    "max_tokens": 1,  # so that every completion has as many
    "batch_size": GROUP,
    "max_steps": 3,
    "eval_samples": 0,
}


def train(model_folder, folder, **options):
    return rlvr.train(environment(), str(model_folder), "hf", **{**SMALL, **RUN, **options}, output_dir=folder)


def paths(run):
    """What the run says of them, the same in its folder."""
    names = ("rollout_engine", "shared_prefix", "token_ratio_saved")
    kept = RunFolder(run.folder).summary()
    assert {name: kept[name] for name in names} == {name: run.summary[name] for name in names}
    return tuple(run.summary[name] for name in names)


def checked(run):
    """The steps whose rollouts the canary looked at."""
    return [row["step"] for row in run.metrics() if "sampler_drift" in row]


def test_both_fast_paths_are_taken_without_being_asked_for(model_folder, tmp_path):
    run = train(model_folder, tmp_path / "run")
    computed = (PROMPT - 1) + GROUP  # of each row its last token of the prompt, from which its completion follows
    padded = GROUP * (PROMPT + 1)
    assert paths(run) == ("grouped", True, pytest.approx(1 - computed / padded))
    assert checked(run) == [1, 3]  # the first rollout and the last


def test_what_is_asked_for_instead_is_done(model_folder, tmp_path):
    run = train(model_folder, tmp_path / "run", rollout_engine="generate", shared_prefix="off", canary_every=1)
    assert paths(run) == ("generate", False, 0.0)
    assert checked(run) == [1, 2, 3]
