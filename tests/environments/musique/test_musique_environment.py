from __future__ import annotations

import json
from dataclasses import fields

import pytest
from scripted import ScriptedEngine

from rlvr.environments.musique import DEFAULT_DATASETS, musique
from rlvr.environments.musique.plugin import rlvr_environment
from rlvr.environments.musique.rewards import Weights, musique_rubric
from rlvr.errors import EnvironmentDefinitionError
from rlvr.rollout.chat import ChatRenderer
from rlvr.rollout.episodes import play
from rlvr.testing.tiny import tiny_tokenizer
from rlvr.types import StopReason, Trajectory, Turn

ROW = {"question": "q", "references": ["Ann Lee", "B. Lee"], "supporting": [3, 7], "hops": 3}


def finished(*, answer=None, citations=(), seen=(), failed=0, turns=2, row=ROW):
    state = {"seen": list(seen)}
    if answer is not None:
        state |= {"answer": answer, "citations": list(citations), "done": True}
    message = {"role": "assistant", "content": ""}
    played = [Turn(message) for _ in range(turns - 1)] + [Turn(message, failed_calls=failed)]
    return Trajectory(row, (), tuple(played), StopReason.COMPLETED, state)


def scores(trajectory, **weights):
    return musique_rubric(Weights(**weights)).score(trajectory)


def test_scores_by_hand():
    # answer: one of two words; seen: 3 right of {3, 1, 2, 7} → recall 1, precision ½; cited {3, 1} → ½ and ½
    got = scores(finished(answer="the lee", citations=[3, 1], seen=[3, 1, 2, 7], turns=4))
    f1 = 2 * 1 * 0.5 / 1.5
    reward = 1.5 * (0.9 * 0 + 1.0 * f1 + 1.0 * 1 + 0.4 * 0.5 + 0.6 * 0.5 + 0.1 * 1) / 4.0
    assert got == pytest.approx(
        {
            "reward": reward,
            "exact_match": 0,
            "f1": f1,
            "support_f1": 0.5,
            "retrieval_recall": 1,
            "retrieval_precision": 0.5,
            "citation_precision": 0.5,
            "citation_recall": 0.5,
            "format": 1,
            "turns": 4,
        }
    )


def test_a_perfect_rollout_is_worth_half_its_hops():
    for hops in (2, 3, 4):
        row = {**ROW, "hops": hops}
        got = scores(finished(answer="b. lee!", citations=[7, 3], seen=[3, 7], row=row))
        assert got["reward"] == pytest.approx(hops / 2)


def test_nothing_found_nothing_said():
    got = scores(finished(turns=1))
    assert got == {name: (1 if name == "turns" else 0) for name in got}


def test_an_answer_that_is_empty_or_a_failed_call_is_no_format():
    assert scores(finished(answer=" "))["format"] == 0
    assert scores(finished(answer="x", failed=1))["format"] == 0


def test_an_answer_is_needed_even_where_the_reference_normalises_to_nothing():
    row = {**ROW, "references": ["The"]}
    assert scores(finished(row=row))["exact_match"] == 0
    assert scores(finished(answer="a", row=row))["exact_match"] == 1


def test_questions_without_supporting_documents():
    row = {**ROW, "references": ["unanswerable"], "supporting": [], "hops": 2}
    got = scores(finished(answer="Unanswerable", seen=[1], row=row))
    assert got["support_f1"] is got["retrieval_recall"] is got["retrieval_precision"] is None
    assert got["reward"] == pytest.approx(1.0)  # (0.9 + 1.0 + 0.1) / 2.0


def test_weights():
    trajectory = finished(answer="Ann Lee", citations=[], seen=[1])
    only = {field.name: 0.0 for field in fields(Weights)}
    assert scores(trajectory, **{**only, "exact_match": 2.0})["reward"] == pytest.approx(1.5)
    assert scores(trajectory, **{**only, "citation": 2.0})["reward"] == 0
    rubric = musique_rubric(Weights())
    assert [name for name, weight in zip(rubric.names, rubric.weights, strict=True) if weight] == ["reward"]
    assert rubric.names[0] == "exact_match"  # what counts as solved
    with pytest.raises(EnvironmentDefinitionError, match="one must be above"):
        Weights(**only)
    with pytest.raises(EnvironmentDefinitionError, match="none may be below 0"):
        Weights(f1=-1)


@pytest.fixture(scope="module")
def env():
    return musique(datasets="sample", retriever="lexical", sample_size=6, sample_eval_size=4, max_tool_failures=2)


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def run(env, tokenizer, row, turns):
    end = tokenizer.eos_token_id
    (rollout,) = play(
        env,
        [row],
        engine=ScriptedEngine([[[*tokenizer.encode(turn), end] for turn in turns]], end_id=end),
        renderer=ChatRenderer(tokenizer, tools=env.tools),
        max_completion_tokens=20_000,
    )
    return rollout.trajectory


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def solved(env, tokenizer):
    """A rollout that searches hop by hop and answers rightly."""
    row = next(row for row in env.train_dataset if row["hops"] == 3)
    by_idx = {p["idx"]: p for p in row["paragraphs"]}
    searches = [call("retrieve_documents", query=by_idx[idx]["title"], top_n=1) for idx in row["supporting"]]
    answer = call("complete", reasoning="so", final_answer=row["answer"], cited_doc_ids=row["supporting"])
    return row, run(env, tokenizer, row, [*searches, answer])


def test_a_solved_question(env, solved):
    row, trajectory = solved
    assert trajectory.stop_reason is StopReason.COMPLETED
    assert trajectory.state["seen"] == row["supporting"]
    got = env.rubric.score(trajectory)
    assert got["exact_match"] == got["f1"] == got["support_f1"] == got["retrieval_recall"] == got["format"] == 1
    assert got["retrieval_precision"] == 1
    assert got["reward"] == pytest.approx(1.5)
    assert got["turns"] == 4


def test_what_the_model_sees(env, solved):
    row, trajectory = solved
    first = trajectory.turns[0].replies[0]
    paragraph = next(p for p in row["paragraphs"] if p["idx"] == row["supporting"][0])
    assert first["content"] == f"[{paragraph['idx']}] {paragraph['title']}\n{paragraph['paragraph_text']}"
    system, user = trajectory.prompt
    assert system["role"] == "system"
    assert user["content"] == row["question"]


def test_tools_and_their_limits(env, tokenizer):
    row = env.train_dataset[0]
    turns = [
        call("get_document", doc_id=5),
        call("retrieve_documents", query="zzz"),
        call("retrieve_documents", query="x", top_n=50) + call("get_document", doc_id=999),
        call("get_document", doc_id="five"),
    ]
    trajectory = run(env, tokenizer, row, turns)
    replies = [reply["content"] for turn in trajectory.turns for reply in turn.replies]
    assert replies[0].startswith("[5] ")
    assert replies[1:] == [
        "No document matches.",
        "error: retrieve_documents failed with ValueError: top_n must be from 1 to 10, got 50",
        "error: get_document failed with ValueError: there is no document 999",
    ]
    assert trajectory.stop_reason is StopReason.TOOL_FAILURES
    assert trajectory.state["seen"] == [5]


def test_a_retriever_that_cannot_work_stops_the_run_and_is_not_told_to_the_model(tokenizer):
    class Broken:
        def search(self, paragraphs, query, *, top_n):
            raise EnvironmentDefinitionError("the index is gone")

    env = musique(datasets="sample", sample_size=2, retriever=Broken())
    with pytest.raises(EnvironmentDefinitionError, match="the index is gone"):
        run(env, tokenizer, env.train_dataset[0], [call("retrieve_documents", query="x")])


def test_stopping_without_a_tool_call_and_at_the_last_turn(env, tokenizer):
    row = env.train_dataset[0]
    assert run(env, tokenizer, row, ["I do not know"]).stop_reason is StopReason.NO_TOOL_CALL
    turns = [call("get_document", doc_id=1)] * env.max_turns
    assert run(env, tokenizer, row, turns).stop_reason is StopReason.MAX_TURNS


def test_rollouts_of_one_row_do_not_share_their_state(env):
    row = env.train_dataset[0]
    first, second = env.new_state(row), env.new_state(row)
    first["seen"].append(1)
    first["paragraphs"].pop()
    assert second["seen"] == []
    assert len(second["paragraphs"]) == len(row["paragraphs"]) == 20


def test_the_sample_environment(env):
    assert (len(env.train_dataset), len(env.eval_dataset), env.group_metrics_by) == (6, 4, "hops")
    assert {row["hops"] for row in env.train_dataset} == {2, 3, 4}
    assert [tool.__name__ for tool in env.tools] == ["retrieve_documents", "get_document", "complete"]


def test_plugin_options_reach_the_environment(tmp_path):
    env = rlvr_environment(
        datasets="sample",
        retriever="golden",
        sample_size=3,
        sample_eval_size=2,
        sample_hops="2",
        sample_paragraphs=5,
        noise=0.0,
        max_turns=4,
        f1_weight=0.0,
        answerable_only=False,
    )
    assert {len(row["paragraphs"]) for row in env.train_dataset if row["answerable"]} == {2}
    assert env.max_turns == 4
    assert "unanswerable" in env.system_prompt
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(json.dumps({**row, "id": "2hop__x"}) for row in env.train_dataset))
    own = rlvr_environment(datasets=str(file), retriever="lexical", eval_datasets=str(file), answerable_only=False)
    assert len(own.train_dataset) == len(own.eval_dataset) == 3
    assert rlvr_environment(datasets=str(file), retriever="lexical", answerable_only=False).eval_dataset is None


def test_the_default_is_the_public_dataset():
    import inspect

    assert inspect.signature(rlvr_environment).parameters["datasets"].default == DEFAULT_DATASETS


def test_schemas_have_no_state(env, tokenizer):
    for schema in ChatRenderer(tokenizer, tools=env.tools).tools:
        assert "state" not in schema["function"]["parameters"]["properties"]
        assert "self" not in schema["function"]["parameters"]["properties"]


@pytest.mark.parametrize("fewer_hops_first", [True, False])
def test_questions_in_order_of_hops_are_trained_on_in_that_order(fewer_hops_first):
    env = musique(datasets="sample", retriever="lexical", sample_size=6, fewer_hops_first=fewer_hops_first)
    assert env.keeps_order is fewer_hops_first
