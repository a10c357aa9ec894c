"""Sampling inside the engine against transformers' own logits processors, and against exact probabilities."""

import pytest
import torch
from places import PLACES
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process

from rlvr.rollout.engine import SamplingSettings, sample_all
from rlvr.rollout.grouped import GroupedEngine
from rlvr.rollout.grouped.sampling import draw, process
from rlvr.testing.tiny import tiny_model

SETTINGS = {
    "plain": SamplingSettings(),
    "temperature": SamplingSettings(temperature=0.6),
    "top-k": SamplingSettings(top_k=5),
    "top-p": SamplingSettings(top_p=0.7),
    "min-p": SamplingSettings(min_p=0.15),
    "penalty": SamplingSettings(repetition_penalty=1.3),
    "all": SamplingSettings(temperature=1.4, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
}
VOCABULARY = 13


def oracle(settings, ids):
    """transformers' processors in the order in which `generate` applies them."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature != 1.0:
        processors.append(logits_process.TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        processors.append(logits_process.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        processors.append(logits_process.TopPLogitsWarper(settings.top_p))
    if settings.min_p is not None:
        processors.append(logits_process.MinPLogitsWarper(settings.min_p))
    return lambda logits: processors(ids, logits)


def test_the_oracle_has_the_order_of_generate():
    model = tiny_model()
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2)
    processors = model._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    assert [type(processor).__name__ for processor in processors] == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_scores_equal_those_of_transformers(settings, place):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn((50, VOCABULARY), generator=generator)
    logits[0, :4] = 1.5  # ties at the cut
    ids = torch.randint(VOCABULARY, (50, 6), generator=generator)
    logits, ids = logits.to(place.device, place.dtype).float(), ids.to(place.device)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    expected = oracle(settings, ids)(logits.clone())
    torch.testing.assert_close(process(logits, settings, seen), expected, rtol=0, atol=0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_follow_the_exact_distribution(settings, place):
    draws = 40_000
    given = 1.5 * torch.randn((1, VOCABULARY), generator=torch.Generator().manual_seed(1))
    given = given.to(place.device, place.dtype)
    logits = given.float()
    ids = torch.tensor([[0, 3, 3, 7]], device=place.device)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    exact = oracle(settings, ids)(logits.clone()).double().softmax(-1)[0]
    tokens, logprobs = draw(
        given.repeat(draws, 1),
        settings,
        generator=torch.Generator(place.device).manual_seed(2),
        seen=seen.repeat(draws, 1),
    )
    assert chi_square(tokens, exact) < critical_value(int((exact > 0).sum()) - 1)
    assert set(tokens.tolist()) <= set(exact.nonzero().flatten().tolist())
    everything = (logits / settings.temperature).log_softmax(-1)[0]  # before tokens are excluded or penalised
    torch.testing.assert_close(logprobs, everything[tokens])


def chi_square(tokens, exact):
    counts = torch.bincount(tokens, minlength=len(exact)).double()
    expected = exact * len(tokens)
    kept = expected > 0
    return float((((counts - expected) ** 2)[kept] / expected[kept]).sum())


def critical_value(degrees):
    """Of chi-square at p = 1e-4, by Wilson and Hilferty (1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.719 * spread**0.5) ** 3


def test_greedy_takes_the_likeliest_and_reports_it_at_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.5]], dtype=torch.bfloat16)
    tokens, logprobs = draw(logits, SamplingSettings(temperature=0), generator=torch.Generator())
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.float().log_softmax(-1).amax(-1))
    assert logprobs.dtype == torch.float32


def test_log_probability_by_hand():
    logits = torch.tensor([[1.0, 3.0]])
    expected = -torch.log1p(torch.exp(torch.tensor([1.0, -1.0])))  # two tokens 2 apart at temperature 2: 1 apart
    tokens, logprobs = draw(
        logits.repeat(50, 1), SamplingSettings(temperature=2.0), generator=torch.Generator().manual_seed(0)
    )
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs, expected[tokens])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["temperature", "all"])
def test_the_engine_samples_the_models_distribution(name, place):
    """The second token of many sequences, given their first, against the exact distribution."""
    settings, rows = SETTINGS[name], 3_000
    model = tiny_model(vocab_size=VOCABULARY, layers=1, **place.sizes)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)
    place.put(model)
    prompt = [5, 6, 7]
    engine = GroupedEngine(model, sampling=settings, eos_token_ids=(), seed=4, max_rows=rows, compile_layers=False)
    with engine.open([prompt] * rows, max_completion_tokens=2) as session:
        for index in range(rows):
            session.submit(index, [], 2)
        turns = session.step()
    drawn = torch.tensor([turn.token_ids for turn in turns], device=place.device)
    first = int(drawn[:, 0].mode().values)
    for ids, tokens in ((prompt, drawn[:, 0]), ([*prompt, first], drawn[drawn[:, 0] == first, 1])):
        ids = torch.tensor([ids], device=place.device)
        with torch.no_grad():
            exact = oracle(settings, ids)(model(ids).logits[:, -1].float()).double().softmax(-1)[0]
        assert len(tokens) > 300
        assert chi_square(tokens, exact) < critical_value(max(1, int((exact > 0).sum()) - 1))


def sample(engine):
    return [turn.token_ids for turn in sample_all(engine, [[4, 5]] * 3, max_completion_tokens=8)]


def test_seeds_repeat_and_rollouts_differ():
    model = tiny_model()

    def engine(seed):
        return GroupedEngine(model, sampling=SamplingSettings(), eos_token_ids=(), seed=seed)

    one, two = engine(1), engine(1)
    first, second = sample(one), sample(one)
    assert first == sample(two)
    assert first != second
    assert first != sample(engine(2))
    one.reseed(1)
    assert sample(one) == first
    assert len(set(map(tuple, first))) == 3  # the rows of a group draw their own numbers


def test_a_function_seeds_each_rollout():
    seeds = iter([1, 7, 1])
    model = tiny_model()
    engine = GroupedEngine(model, sampling=SamplingSettings(), eos_token_ids=(), seed=lambda: next(seeds))
    first, second, again = sample(engine), sample(engine), sample(engine)
    assert first == again != second
    assert first == sample(GroupedEngine(model, sampling=SamplingSettings(), eos_token_ids=(), seed=1))
    assert list(seeds) == []  # none was asked for between
