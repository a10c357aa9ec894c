from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.generate import GenerateEngine, end_token_ids, model_generate
from rlvr.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [20, 21]]


def greedy_one_by_one(model, ids, budget, ends):
    """The slow twin: no batch, no padding, no cache."""
    sampled = []
    while len(sampled) < budget and not (sampled and sampled[-1] in ends):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *sampled]])).logits[0, -1]
        sampled.append(int(logits.argmax()))
    return sampled


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_is_the_slow_twin(model, tokenizer, batch_size):
    first = greedy_one_by_one(model, PROMPTS[0], 8, ())
    end = first[4]  # a token that greedy sampling does come to, so that ends are seen
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    ends = end_token_ids(model, tokenizer)
    generate = model_generate(model, tokenizer, SamplingSettings(temperature=0), batch_size=batch_size)
    with GenerateEngine(generate, end_token_ids=ends).open(PROMPTS, max_completion_tokens=8) as session:
        budgets = [8, 5, 8, 1]
        for index, budget in enumerate(budgets):
            session.submit(index, [], budget)
        assert session.pending == 4
        turns = session.step()
        assert session.pending == 0
        assert session.step() == []
        expected = [greedy_one_by_one(model, p, b, ends) for p, b in zip(PROMPTS, budgets, strict=True)]
        assert [turn.token_ids for turn in turns] == expected
        assert [turn.ended for turn in turns] == [ids[-1] in ends for ids in expected]
        assert turns[0].ended
        session.submit(1, [30, 31], 4)
        (turn,) = session.step()
        assert turn.index == 1
        assert turn.token_ids == greedy_one_by_one(model, [*PROMPTS[1], *expected[1], 30, 31], 4, ends)


def test_the_models_own_generation_config_is_left_out_and_restored(model, tokenizer):
    own = model.generation_config
    try:
        model.generation_config = config = GenerationConfig(
            do_sample=True, top_k=1, repetition_penalty=5.0, suppress_tokens=list(range(100)), max_length=3,
            eos_token_id=[2, 77],
        )  # fmt: skip
        assert end_token_ids(model, tokenizer) == {2, 77}
        ids, _ = model_generate(model, tokenizer, SamplingSettings(temperature=0))([PROMPTS[0]], [8])
        assert ids == [greedy_one_by_one(model, PROMPTS[0], 8, {2, 77})]
        assert model.generation_config is config
    finally:
        model.generation_config = own


def test_samples_follow_the_softmax_at_the_temperature(model, tokenizer):
    """4,000 draws of one token against the model's own probabilities, within 5 standard deviations."""
    generate = model_generate(model, tokenizer, SamplingSettings(temperature=0.7), batch_size=4000, seed=1)
    ids, logprobs = generate([PROMPTS[0]] * 4000, [1] * 4000)
    assert logprobs is None
    with torch.no_grad():
        probabilities = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor(ids).flatten(), minlength=len(probabilities))
    spread = (4000 * probabilities * (1 - probabilities)).sqrt() + 0.2
    assert ((counts - 4000 * probabilities).abs() <= 5 * spread).all()


def test_seed_and_training_mode(model, tokenizer):
    settings = SamplingSettings(top_p=0.9, top_k=50, min_p=0.01)
    before = torch.random.get_rng_state()
    model.train()
    try:
        runs = [model_generate(model, tokenizer, settings, seed=seed)(PROMPTS, [6] * 4)[0] for seed in (3, 3, 4)]
        assert model.training
    finally:
        model.eval()
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_peft_model(tokenizer):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_model(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])).eval()
    ids, _ = model_generate(wrapped, tokenizer, SamplingSettings(temperature=0))(PROMPTS, [5] * 4)
    assert ids == [greedy_one_by_one(wrapped, prompt, 5, {2}) for prompt in PROMPTS]


def test_samples_beyond_the_budget_are_cut_with_their_logprobs():
    def generate(ids, budgets):
        assert (ids, budgets) == ([[1], [2]], [2, 3])
        return [[5, 6, 9], [7, 9]], [[-0.1, -0.2, -0.3], [-0.4, -0.5]]

    with GenerateEngine(generate, end_token_ids=[9]).open([[1], [2]], max_completion_tokens=3) as session:
        session.submit(1, [], 3)
        session.submit(0, [], 2)
        first, second = session.step()
    assert (first.token_ids, first.ended, first.logprobs) == ([5, 6], False, [-0.1, -0.2])
    assert (second.token_ids, second.ended, second.logprobs) == ([7, 9], True, [-0.4, -0.5])
