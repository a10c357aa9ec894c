"""The grouped engine against its slow twin, transformers' `generate` on the full ids, in float32."""

import random

import pytest
import torch

from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped import GroupedEngine, runner
from rlvr.testing.tiny import tiny_model

EOS = 2
GREEDY = SamplingSettings(temperature=0)
MODELS = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 6, "final_logit_softcapping": 20.0},
    "phi3": {},
    "phi3-sliding": {"sliding_window": 9},
    "qwen2-untied": {"tie_word_embeddings": False},
    "qwen2-one-head": {"heads": 2, "kv_heads": 1},
}


def random_prompts(count, lengths, seed=0):
    source = random.Random(seed)
    return [[source.randrange(3, 259) for _ in range(source.choice(lengths))] for _ in range(count)]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    model = tiny_model(request.param.split("-")[0], layers=3, **MODELS[request.param])
    with torch.no_grad():  # sharper distributions, so that greedy decoding does not run into ties
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


def generate_greedily(model, ids, max_new_tokens, eos=(EOS,), **settings):
    """The slow twin: one sequence, all of its ids, transformers' own cache and masks."""
    output = model.generate(
        torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos),
        pad_token_id=0,
        **settings,
    )
    return output[0, len(ids) :].tolist()


def play(session, budgets):
    for index, budget in budgets.items():
        session.submit(index, [], budget)
    turns = {}
    while session.pending:
        turns.update((turn.index, turn) for turn in session.step())
    return turns


def common_tokens(model, prompt, count=3):
    """Tokens that greedy decoding reaches at different times, to serve as ends of turn."""
    return generate_greedily(model, prompt, 12, eos=())[2::4][:count]


def test_greedy_tokens_equal_generate_with_ragged_groups_and_early_ends(model):
    prompts = random_prompts(4, [1, 2, 9, 17])
    batch = [prompts[i] for i in (0, 1, 2, 3, 2, 1, 2)]
    eos = common_tokens(model, prompts[2])
    engine = GroupedEngine(model, sampling=GREEDY, eos_token_ids=eos)
    budgets = dict(enumerate([20, 3, 20, 11, 5, 20, 20]))
    with engine.open(batch, max_completion_tokens=20) as session:
        turns = play(session, budgets)
    for index, budget in budgets.items():
        expected = generate_greedily(model, batch[index], budget, eos)
        assert turns[index].token_ids == expected, index
        assert turns[index].ended == (expected[-1] in eos)
    assert any(turn.ended for turn in turns.values())
    assert len({len(turn.token_ids) for turn in turns.values()}) > 2


def test_turns_equal_generate_on_the_full_ids_while_others_run_or_wait(model):
    prompts = random_prompts(2, [11, 14], seed=1)
    batch = [prompts[0], prompts[1], prompts[0]]
    engine = GroupedEngine(model, sampling=GREEDY, eos_token_ids=(EOS,), check_every=2)
    tool_ids = random_prompts(6, [1, 2, 13], seed=2)
    histories = [list(ids) for ids in batch]
    turns_left = [3, 2, 3]
    budgets = [5, 6, 9]
    played = []
    with engine.open(batch, max_completion_tokens=64) as session:
        for index in (0, 1):  # sequence 2 joins later
            session.submit(index, [], budgets[index])
        joined = False
        while session.pending:
            for turn in session.step():
                played.append((turn.token_ids, list(histories[turn.index]), budgets[turn.index]))
                histories[turn.index] += turn.token_ids
                turns_left[turn.index] -= 1
                if turns_left[turn.index]:
                    new_ids = tool_ids.pop()
                    histories[turn.index] += new_ids
                    budgets[turn.index] = 7
                    session.submit(turn.index, new_ids, 7)
            if not joined:
                session.submit(2, [], budgets[2])
                joined = True
    assert turns_left == [0, 0, 0]
    for sampled, history, budget in played:
        assert sampled == generate_greedily(model, history, budget), len(history)


def play_turns(engine, batch, tool_results, budget):
    """A turn of every sequence, and one more after each of its tool results: (ids before the turn, its own)."""
    histories, played = [list(ids) for ids in batch], []
    with engine.open(batch, max_completion_tokens=200) as session:
        for results in ([[]] * len(batch), *tool_results):
            for index, new_ids in enumerate(results):
                histories[index] += new_ids
                session.submit(index, new_ids, budget)
            while session.pending:
                for turn in session.step():
                    played.append((list(histories[turn.index]), turn.token_ids))
                    histories[turn.index] += turn.token_ids
    assert len(played) == len(batch) * (1 + len(tool_results))
    return played


def assert_as_generate(model, played, budget, eos=(), **settings):
    for history, sampled in played:
        assert sampled == generate_greedily(model, history, budget, eos, **settings), len(history)


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_a_turn_without_an_end_has_all_of_its_tokens(model):
    engine = GroupedEngine(model, sampling=GREEDY, eos_token_ids=())
    for budget in (1, 2, 9):
        played = play_turns(engine, [[5, 6], [7]], [[[8, 9], [9]], [[], [3]]], budget)
        assert [len(sampled) for _, sampled in played] == [budget] * 6


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_a_turn_after_a_tool_result_ends_where_generate_ends(model):
    batch, results = random_prompts(3, [8], seed=8), random_prompts(3, [4], seed=9)

    def played(eos):
        engine = GroupedEngine(model, sampling=GREEDY, eos_token_ids=eos)
        return play_turns(engine, batch, [results], 8)

    later = [sampled for _, sampled in played(eos=())[3:]]
    eos = [later[0][2], later[1][1]]
    turns = played(eos)
    assert_as_generate(model, turns, 8, eos)
    assert len({len(sampled) for _, sampled in turns[3:]}) == 3


@pytest.mark.parametrize("model", ["qwen2", "mistral-sliding"], indirect=True)
def test_prompts_of_several_forward_passes(model, monkeypatch):
    """`PREFILL_TOKENS` is where the next one begins."""
    monkeypatch.setattr(runner, "PREFILL_TOKENS", 16)
    batch = [random_prompts(1, [length], seed=length)[0] for length in (9, 12, 5, 20, 16)]
    engine = GroupedEngine(model, sampling=GREEDY, eos_token_ids=())
    assert_as_generate(model, play_turns(engine, batch, [], 6), 6)


@pytest.mark.parametrize("model", ["qwen2", "mistral-sliding"], indirect=True)
def test_tool_results_of_several_forward_passes(model, monkeypatch):
    """`EXTEND_TOKENS` is where the next one begins."""
    monkeypatch.setattr(runner, "EXTEND_TOKENS", 16)
    batch = random_prompts(6, [3, 8], seed=4)
    results = [random_prompts(1, [length], seed=length)[0] for length in (6, 2, 20, 1, 13, 7)]
    engine = GroupedEngine(model, sampling=GREEDY, eos_token_ids=())
    assert_as_generate(model, play_turns(engine, batch, [results, results[::-1]], 5), 5)


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_the_repetition_penalty_counts_what_the_sequence_holds_and_nothing_else(model):
    """Its prompt, its own tokens and its tool results, not those of the rollout before it in the same memory."""
    sampling = SamplingSettings(temperature=0, repetition_penalty=1.5)
    engine = GroupedEngine(model, sampling=sampling, eos_token_ids=())
    engine._keep_memory = True  # as on CUDA
    kept = []
    for seed in (5, 6):
        batch, results = random_prompts(3, [40], seed), random_prompts(3, [60], 10 + seed)
        assert_as_generate(model, play_turns(engine, batch, [results], 8), 8, repetition_penalty=1.5)
        kept.append(engine._runner)
    assert kept[0] is kept[1]


def test_logprobs_are_those_of_a_full_forward(model):
    prompts = random_prompts(3, [1, 8, 20], seed=3)
    batch = [prompts[i] for i in (0, 1, 1, 2)]
    sampling = SamplingSettings(temperature=0.7, top_k=20, top_p=0.9)
    engine = GroupedEngine(model, sampling=sampling, eos_token_ids=(EOS,))
    with engine.open(batch, max_completion_tokens=16) as session:
        turns = play(session, dict.fromkeys(range(4), 16))
    for index, turn in turns.items():
        ids = torch.tensor([batch[index] + turn.token_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(batch[index]) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(turn.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=1e-5, rtol=1e-5)
