"""Which sampler and which training forward `rlvr.train` takes, and what its summary says of them."""

import pytest
from short_runs import SMALL, environment

import rlvr
from rlvr.tracking.run_folder import RunFolder
from rlvr.trainers.sharding import launched_to_shard

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


ROWS = {
    "batch_size": None,
    "prompts_per_step": 4,
    "num_generations": 8,
    "max_prompt_length": 256,
    "max_tokens": 8,
    "max_steps": 1,
}


@pytest.mark.parametrize(("attention", "sizes"), [("sdpa", (32, 1)), ("eager", (8, 4))])
def test_micro_batches_are_large_where_prompts_are_shared_alone(model_folder, tmp_path, attention, sizes):
    """4 prompts of 8 completions each; with rows of their own 32 completions would take four times the memory."""
    run = train(model_folder, tmp_path / "run", **ROWS, attention=attention)
    assert run.summary["shared_prefix"] is (attention == "sdpa")
    config = RunFolder(run.folder).config()
    assert (config["batch_size"], config["gradient_accumulation_steps"]) == sizes


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_the_launcher_says_whether_weights_will_be_sharded(monkeypatch, variable):
    assert not launched_to_shard()
    monkeypatch.setenv(variable, "true")
    assert launched_to_shard()
