"""What a session of the grouped engine refuses, and what holds from one rollout to the next."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlvr.errors import ConfigError
from rlvr.rollout.engine import SamplingSettings, sample_all
from rlvr.rollout.grouped import GroupedEngine, runner
from rlvr.rollout.grouped.cache import Cache
from rlvr.rollout.grouped.session import distinct
from rlvr.testing.tiny import tiny_model

PROMPTS = [[5, 6, 7], [9], [5, 6, 7], [5, 6, 7], [8, 8]]


def greedy(model, **settings):
    return GroupedEngine(model, sampling=SamplingSettings(temperature=0), eos_token_ids=(), **settings)


def completed(engine, prompts=PROMPTS, tokens=9):
    return [turn.token_ids for turn in sample_all(engine, prompts, max_completion_tokens=tokens)]


def test_distinct_prompts_in_order_of_appearance():
    assert distinct(PROMPTS) == ([(5, 6, 7), (9,), (8, 8)], [0, 1, 0, 0, 2])


@pytest.mark.parametrize(
    ("prompts", "tokens", "problem"),
    [
        ([], 4, "needs at least one prompt"),
        ([[3], [], []], 4, "prompt 2 has no token"),
        ([[3]], 0, "max_completion_tokens is 0"),
    ],
)
def test_open_refuses(model, prompts, tokens, problem):
    with pytest.raises(ConfigError, match=problem), greedy(model).open(prompts, max_completion_tokens=tokens):
        pass


def test_submit_refuses_and_the_session_goes_on(model):
    with greedy(model, check_every=2).open([[4, 5], [6]], max_completion_tokens=6) as session:
        session.submit(0, [], 4)
        with pytest.raises(ConfigError, match="sequence 0 was submitted while it is still sampling"):
            session.submit(0, [], 1)
        with pytest.raises(ConfigError, match="max_new_tokens is 0 for sequence 1"):
            session.submit(1, [], 0)
        with pytest.raises(ConfigError, match="would hold 7 completion tokens: 0 there, 3 appended, 4 to sample"):
            session.submit(1, [1, 2, 3], 4)
        turns = []
        while session.pending:
            turns += session.step()
        assert [len(turn.token_ids) for turn in turns] == [4]
        with pytest.raises(ConfigError, match="would hold 7 completion tokens: 4 there, 1 appended, 2 to sample"):
            session.submit(0, [1], 2)
        session.submit(0, [1], 1)  # exactly full
        assert len(session.step()[0].token_ids) == 1
        assert session.step() == []


def test_few_rows_at_a_time_complete_the_same(model):
    expected = completed(greedy(model))
    for rows in (1, 2):
        engine = greedy(model, max_rows=rows, check_every=3)
        with engine.open(PROMPTS, max_completion_tokens=9) as session:
            for index in range(len(PROMPTS)):
                session.submit(index, [], 9)
            turns = []
            while session.pending:
                ended = session.step()
                assert len(ended) <= rows
                turns += ended
        assert [turn.token_ids for turn in sorted(turns, key=lambda turn: turn.index)] == expected


def test_one_engine_serves_rollouts_of_any_shape(model):
    engine = greedy(model)
    first = completed(engine)
    assert completed(engine, [[7] * 40, [7] * 40], 30) == completed(greedy(model), [[7] * 40, [7] * 40], 30)
    assert completed(engine, [[4]], 1) == completed(greedy(model), [[4]], 1)
    assert completed(engine) == first


@pytest.mark.parametrize(("tokens", "check_every"), [(62, 4), (63, 4), (127, 4), (50, 16), (63, 16)])
def test_a_row_that_is_almost_full_ends_beside_one_that_begins(model, tokens, check_every):
    """Their cache is a multiple of 64 tokens long, and a run of token steps goes on after the full row has ended."""
    alone = completed(greedy(model), [[5, 6, 7], [8, 9]], tokens)
    with greedy(model, check_every=check_every).open([[5, 6, 7], [8, 9]], max_completion_tokens=tokens) as session:
        session.submit(0, [], tokens - 1)
        turns = []
        while session.pending:
            turns += session.step()
        session.submit(0, [], 1)
        session.submit(1, [], tokens)
        while session.pending:
            turns += session.step()
    first, last, other = (turn.token_ids for turn in turns)
    assert [first + last, other] == alone


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_weights_that_changed_between_rollouts_are_followed(part):
    base = tiny_model()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    engine = greedy(model)
    before = completed(engine)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("lora_B" in name) == (part == "adapter") and parameter.ndim > 1:
                parameter.mul_(-3.0)
    after = completed(engine)
    assert after == completed(greedy(model)) != before


def test_what_is_masked_in_a_cache_is_never_attended(model, monkeypatch):
    """A cache may hold the keys of an earlier, longer rollout: large values there change nothing."""

    class Poisoned(Cache):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            for values in (self.prompt_keys, self.prompt_values, self.suffix_keys, self.suffix_values):
                values.fill_(1e4)

    expected = completed(greedy(model))
    monkeypatch.setattr(runner, "Cache", Poisoned)
    assert completed(greedy(model)) == expected


def test_a_runner_is_kept_while_batches_differ_a_little(model, monkeypatch):
    """On CUDA its graphs are kept with it, which take seconds to make."""
    engine = greedy(model)
    engine._keep_memory = True
    longer, more = [[7] * 100, [5] * 3], [[5, 6, 7], [9], [8, 8]]
    expected = [completed(greedy(model), prompts) for prompts in (longer, more, PROMPTS)]

    assert completed(engine, longer) == expected[0]
    first = engine._runner
    assert completed(engine, more) == expected[1]
    second = engine._runner
    assert second is not first
    shape = second.cache.shape
    assert (shape.groups, shape.prompt_tokens) == (3, 128)  # of one batch and of the other
    assert [completed(engine, prompts) for prompts in (longer, more)] == expected[:2]
    assert engine._runner is second

    monkeypatch.setattr("rlvr.rollout.grouped.engine.SPARE_BYTES", 0)
    assert completed(engine, [[9]]) == [expected[1][1]]
    assert engine._runner.cache.shape.groups == 1  # more than twice what is needed is given back
