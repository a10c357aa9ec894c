"""An evaluation that was stopped and goes on gives what one that was not stopped gives."""

import json

import pytest
from chat_server import ChatServer, completion
from safetensors.torch import load_file, save_file

import rlvr
from rlvr.environments.base import Environment
from rlvr.errors import ConfigError, InfrastructureError, RewardError, RunFolderError
from rlvr.rewards.rubric import Rubric, WeightedReward
from rlvr.tracking.adapter_hash import adapter_hash, hash_of

pytestmark = pytest.mark.both

OPTIONS = {"max_prompt_length": 64, "max_tokens": 6, "samples": 3, "batch_size": 4}


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def even(trajectory):
    return float(bool(trajectory.text) and ord(trajectory.text[0]) % 2 == 0)


def letters(trajectory):
    return float(len(trajectory.text)) if trajectory.text else None


def environment(*more, answer=1):
    rows = [{"question": f"{n}+1", "answer": str(n + answer), "half": n < 3} for n in range(5)]
    return Environment(
        name="bytes",
        train_dataset=rows,
        rubric=Rubric(even, WeightedReward(letters, 0.5), *more),
        group_metrics_by="half",
    )


def evaluate(model_folder, path, env=None, **options):
    return rlvr.evaluate(env or environment(), model_folder, "hf", output=path, **{**OPTIONS, **options})


def numbers(found):
    return found.as_json(), [(t.example, t.attempt, t.trajectory.completion) for t in found.trajectories]


@pytest.mark.parametrize("engine", ["grouped", "generate"])
@pytest.mark.parametrize("sampling", [{"seed": 3}, {"samples": 1, "temperature": 0.0}], ids=["sampled", "greedy"])
def test_stopped_anywhere_and_resumed_it_is_the_same(model_folder, tmp_path, engine, sampling):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    options = {**sampling, "rollout_engine": engine}
    expected = evaluate(model_folder, whole, **options)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(expected.trajectories) == 5 * (3 if "seed" in sampling else 1)
    for kept in (0, 1, len(lines) - 2):  # nothing, within a batch, all but two
        part.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])  # and half a line
        part.with_name("part.jsonl.settings.json").write_bytes((tmp_path / "whole.jsonl.settings.json").read_bytes())
        found = evaluate(model_folder, part, resume=True, **options)
        assert numbers(found) == numbers(expected)
        assert part.read_bytes() == whole.read_bytes()


def test_a_crash_leaves_what_was_scored_and_it_is_not_played_again(model_folder, tmp_path):
    path, scored = tmp_path / "a.jsonl", []

    def breaks(trajectory):
        scored.append(trajectory)
        if len(scored) == 7:
            raise RuntimeError("oops")
        return 1.0

    with pytest.raises(RewardError, match="oops"):
        evaluate(model_folder, path, environment(breaks))
    assert len(path.read_text().splitlines()) == 6
    found = evaluate(model_folder, path, environment(breaks), resume=True)
    assert len(found.trajectories) == 15
    assert len(scored) == 7 + 9
    again = evaluate(model_folder, path, environment(breaks), resume=True)  # nothing is missing
    assert len(scored) == 16
    assert again.as_json() == found.as_json()


def test_a_row_is_the_full_record(model_folder, tmp_path):
    found = evaluate(model_folder, tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    weights = adapter_hash(rlvr.load_policy(str(model_folder), backend="hf", lora=None).model)
    for row, item in zip(rows, found.trajectories, strict=True):
        assert row == {
            "example": item.example,
            "attempt": item.attempt,
            "prompt": [{"role": "user", "content": f"{item.example}+1"}],
            "completion": item.trajectory.completion,
            "rewards": item.rewards,
            "reward": item.reward,
            "passed": item.passed,
            "stop_reason": str(item.trajectory.stop_reason),
            "tokens": item.tokens,
            "failure": None,
            "adapter": weights,
        }
    assert [(row["example"], row["attempt"]) for row in rows] == [(e, a) for e in range(5) for a in range(3)]
    settings = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    assert (settings["environment"], settings["samples"], settings["temperature"]) == ("bytes", 3, 1.0)


def test_attempts_at_an_example_differ_even_where_they_are_in_different_batches(model_folder, tmp_path):
    """With the same random numbers for every batch, the second four attempts would repeat the first."""
    for engine in ("grouped", "generate"):
        found = rlvr.evaluate(
            environment(), model_folder, "hf", samples=8, batch_size=4, limit=1, rollout_engine=engine, max_tokens=6
        )
        texts = [item.trajectory.text for item in found.trajectories]
        assert texts[:4] != texts[4:]


def through(server, path, **options):
    return rlvr.evaluate(
        environment(), "served", api_base_url=server.url, api_retries=0, samples=2, output=path, **options
    )


def test_failed_infrastructure_is_tried_again_by_resuming(tmp_path):
    down = [True]

    def answer(body):
        question = body["messages"][0]["content"]
        return (503, "down") if down[0] and question in ("0+1", "3+1") else completion(question)

    path = tmp_path / "a.jsonl"
    with ChatServer(answer) as server:
        first = through(server, path)
        failures = [json.loads(line)["failure"] for line in path.read_text().splitlines()]
        asked = len(server.requests)
        down[0] = False
        second = through(server, path, resume=True)
    assert first.excluded == 4
    assert sum("status 503: down" in failure for failure in failures if failure) == 4
    assert second.excluded == 0
    assert (asked, len(server.requests)) == (10, 14)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((row["example"], row["attempt"]) for row in kept) == [(e, a) for e in range(5) for a in range(2)]
    assert {row["adapter"] for row in kept} == {None}  # the server's weights are not known
    assert second.metrics["letters"] == 3.0


def test_where_all_attempts_fail_there_is_nothing_to_report(tmp_path):
    says = "all 10 attempts failed.*status 500: out of order"
    with ChatServer(lambda body: (500, "out of order")) as server, pytest.raises(InfrastructureError, match=says):
        through(server, tmp_path / "a.jsonl")


def test_other_settings_are_refused_by_name(model_folder, tmp_path):
    path = tmp_path / "a.jsonl"
    evaluate(model_folder, path, limit=2)
    before = path.read_bytes()
    with pytest.raises(RunFolderError) as caught:
        evaluate(model_folder, path, limit=2, resume=True, temperature=0.5, seed=9)
    assert "temperature was 1.0 and is 0.5" in str(caught.value)
    assert "seed was 0 and is 9" in str(caught.value)
    assert "max_tokens" not in str(caught.value)
    other = environment()
    other.system_prompt = "Other prompts."
    with pytest.raises(RunFolderError, match="prompts was '"):
        evaluate(model_folder, path, other, limit=2, resume=True)
    with pytest.raises(RunFolderError, match="examples was 2 and is 3"):
        evaluate(model_folder, path, limit=3, resume=True)
    assert path.read_bytes() == before


def test_other_weights_under_the_same_name_are_refused(model_folder, tmp_path):
    adapter, path = tmp_path / "adapter", tmp_path / "a.jsonl"
    rlvr.load_backend("hf").save(rlvr.load_policy(str(model_folder), backend="hf"), adapter)
    evaluate(model_folder, path, adapter=adapter, limit=2)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    before = hash_of(tensors)
    rows = path.read_bytes()
    assert {json.loads(line)["adapter"] for line in rows.splitlines()} == {before}

    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    path.write_bytes(b"".join(rows.splitlines(keepends=True)[:4]))
    says = (
        f"other weights made the attempts in .*: their hash was {before}, and that of the policy is {hash_of(tensors)}"
    )
    with pytest.raises(RunFolderError, match=says):
        evaluate(model_folder, path, adapter=adapter, limit=2, resume=True)
    assert len(path.read_bytes().splitlines()) == 4

    path.write_bytes(b"")  # nothing was made with the other weights
    evaluate(model_folder, path, adapter=adapter, limit=2, resume=True)
    assert len(path.read_bytes().splitlines()) == 6


def test_what_cannot_be_resumed(model_folder, tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(ConfigError, match="resume was given without output"):
        evaluate(model_folder, None, resume=True)
    evaluate(model_folder, path, limit=1)
    with pytest.raises(RunFolderError, match="exists, and nothing is written over"):
        evaluate(model_folder, path, limit=1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{broken\n" + lines[2])
    with pytest.raises(RunFolderError, match="line 2 of"):
        evaluate(model_folder, path, limit=1, resume=True)
    (tmp_path / "a.jsonl.settings.json").write_text("[1]")
    with pytest.raises(RunFolderError, match="cannot go on with"):
        evaluate(model_folder, path, limit=1, resume=True)


def test_a_loaded_policy_is_not_behind_an_api(model_folder):
    policy = rlvr.load_policy(str(model_folder), backend="hf", max_seq_length=80)
    with pytest.raises(ConfigError, match="a loaded policy was given with api_base_url"):
        rlvr.evaluate(environment(), policy, api_base_url="http://127.0.0.1:9/v1", max_prompt_length=64, max_tokens=6)


def test_resuming_what_was_never_begun_begins(model_folder, tmp_path):
    found = evaluate(model_folder, tmp_path / "a.jsonl", limit=1, resume=True)
    assert len(found.trajectories) == len((tmp_path / "a.jsonl").read_text().splitlines()) == 3
