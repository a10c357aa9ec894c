"""What the grouped engine computes, seen in what it asks of the decoder: each token once, rows until they end."""

import pytest

from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped import GroupedEngine, runner

PROMPT, OTHER = [*range(3, 14)], [*range(20, 25)]  # 11 tokens and 5


@pytest.fixture
def computed(model):
    """(rows, tokens of each) of every forward pass."""
    shapes = []

    def heard(module, args, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))

    model.model.register_forward_pre_hook(heard, with_kwargs=True)
    return shapes


def opened(model, batch, *, check_every):
    sampling = SamplingSettings(temperature=0)
    engine = GroupedEngine(model, sampling=sampling, eos_token_ids=(), check_every=check_every)
    return engine.open(batch, max_completion_tokens=64)


def finish(session):
    while session.pending:
        session.step()


def test_a_prompt_is_computed_once_for_its_group_and_a_later_turn_computes_what_is_new(model, computed):
    """A last token, of a prompt, a turn or a tool result, is what the next token step computes."""
    with opened(model, [PROMPT, OTHER, PROMPT], check_every=4) as session:
        for new_ids in ([], [30, 31, 32], [40, 41]):
            for index in range(3):
                session.submit(index, new_ids, 4)
            finish(session)
    steps = [(3, 1)] * 4
    # with the last token of the turn before it, all but the last token of each result
    assert computed == [(1, 10 + 4), *steps, (3, 3), *steps, (3, 2), *steps]


def test_rows_whose_turn_is_over_leave_the_batch(model, computed):
    with opened(model, [PROMPT] * 4, check_every=2) as session:
        for index, budget in enumerate([6, 2, 7, 4]):
            session.submit(index, [], budget)
        finish(session)
    assert computed == [(1, 10), *[(4, 1)] * 2, *[(3, 1)] * 2, *[(2, 1)] * 2, (1, 1)]


def test_prompts_are_packed_up_to_a_limit(model, computed, monkeypatch):
    monkeypatch.setattr(runner, "PREFILL_TOKENS", 16)
    prompts = [[3 + length] * length for length in (9, 12, 6, 20, 16, 1)]
    with opened(model, prompts, check_every=4):
        pass
    assert computed == [(1, 8), (1, 11 + 5), (1, 19), (1, 15)]  # without their last tokens


def test_tool_results_are_padded_together_up_to_a_limit(model, computed, monkeypatch):
    monkeypatch.setattr(runner, "EXTEND_TOKENS", 16)
    with opened(model, [PROMPT] * 6, check_every=4) as session:
        for index in range(6):
            session.submit(index, [], 4)
        finish(session)
        computed.clear()
        for index, count in enumerate((6, 2, 20, 1, 13, 8)):
            session.submit(index, [30] * count, 4)
        finish(session)
    assert computed == [(1, 20), (1, 13), (2, 8), (2, 2), *[(6, 1)] * 4]
