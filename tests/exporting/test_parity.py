"""The comparison of an export with the trained policy, on models whose logits are written down in a table."""

import json
import math

import numpy as np
import pytest
import torch

from rlvr.backends.protocol import LoadedPolicy, ModelSettings
from rlvr.exporting.parity import TOLERANCES, Expected, Tolerance, compare, logprobs, tolerance
from rlvr.exporting.texts import FIXED, MOST_TRAJECTORIES, probe_texts
from rlvr.testing.tiny import tiny_model

pytestmark = pytest.mark.both

TEXTS = [[0, 1, 2, 3, 0, 2], [3, 3, 1], [2, 0, 1, 1, 3, 0, 2, 1]]
LOOSE = Tolerance(error=0.5, loss=0.25)


class Bigram(torch.nn.Module):
    """Logits of the next token by the last one: `table` (V, V)."""

    device = torch.device("cpu")

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        self.logits = self.table[ids]
        return self


@pytest.fixture
def tables():
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4, 4, generator=generator)
    return base, base + 0.2 * torch.randn(4, 4, generator=generator)


def compared(table, tables, allowed=LOOSE, texts=TEXTS):
    base, trained = tables
    expected = Expected.of(Bigram(trained), texts)
    return compare(Bigram(table), expected, base=logprobs(Bigram(base), texts), allowed=allowed)


def test_log_probabilities_are_those_of_the_softmax():
    table = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]])
    found = logprobs(Bigram(table), [[0, 1, 1], [0, 0]])
    assert found.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 2), math.log(1 / 4)])


def test_the_trained_policy_itself_is_an_export_without_fault(tables):
    parity = compared(tables[1], tables, Tolerance(0.0, 0.0))
    assert parity.problems == []
    assert parity.doubt is None
    assert (parity.error, parity.greedy_gap) == (0, 0)
    assert parity.kept == pytest.approx(1)
    assert parity.from_base == parity.trained > 0
    assert parity.same_greedy == parity.greedy_tokens == 3 * 12
    assert parity.tokens == 5 + 2 + 7
    assert json.loads(json.dumps(parity.as_json()))["ok"]


def test_the_base_is_found_though_it_is_within_the_tolerance(tables):
    parity = compared(tables[0], tables)
    assert parity.error < LOOSE.error
    assert parity.kept == 0
    (problem,) = parity.problems
    assert "shows 0% of what was trained (allowed: 75% to 125%): it is the base model" in problem


@pytest.mark.parametrize(("share", "is_fine"), [(0.5, False), (0.9, True), (2.0, False)])
def test_a_wrong_alpha_is_found_though_it_is_within_the_tolerance(tables, share, is_fine):
    base, trained = tables
    parity = compared(base + share * (trained - base), tables)
    assert parity.error < LOOSE.error
    assert parity.kept == pytest.approx(share, abs=0.06)
    assert (parity.problems == []) is is_fine


def test_kept_is_the_slope_of_a_regression_through_the_origin(tables):
    base, trained = tables
    table = trained + 0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
    parity = compared(table, tables)
    x = (logprobs(Bigram(trained), TEXTS) - logprobs(Bigram(base), TEXTS)).double()
    y = (logprobs(Bigram(table), TEXTS) - logprobs(Bigram(base), TEXTS)).double()
    (slope,), (rest,), _, _ = np.linalg.lstsq(x[:, None].numpy(), y.numpy(), rcond=None)
    assert parity.kept == pytest.approx(slope)
    assert parity.kept_error == pytest.approx((rest / (len(x) - 1) / (x @ x).item()) ** 0.5)


def test_another_model_is_found(tables):
    parity = compared(torch.randn(4, 4, generator=torch.Generator().manual_seed(9)) * 3, tables)
    assert "differ from the trained policy's by" in parity.problems[0]
    assert any("decodes other tokens greedily" in problem for problem in parity.problems)


def test_what_is_not_a_number_is_no_parity(tables):
    parity = compared(torch.full((4, 4), math.nan), tables)
    assert len(parity.problems) == 2


def test_training_that_rounding_hides_is_in_doubt_and_no_problem(tables):
    base, _ = tables
    trained = base + 1e-3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    rounded = trained + 3e-2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    parity = compared(rounded, (base, trained))
    assert parity.problems == []
    assert "rounding hides whether the training was kept" in parity.doubt


def test_nothing_trained_is_nothing_to_lose(tables):
    base, _ = tables
    parity = compared(base, (base, base))
    assert parity.problems == []
    assert parity.kept is None
    assert "does not differ from its base" in parity.doubt


def test_every_format_and_dtype_has_a_tolerance():
    assert set(TOLERANCES) == {"adapter", "merged-16bit", "merged-4bit", "gguf"}
    for by_dtype in TOLERANCES.values():
        assert set(by_dtype) == {"float32", "bfloat16", "float16", "quantized"}
    settings = ModelSettings(model="m")
    policy = LoadedPolicy(model=tiny_model().bfloat16(), tokenizer=None, settings=settings)
    assert tolerance("adapter", policy) == TOLERANCES["adapter"]["bfloat16"]
    quantized = LoadedPolicy(
        model=tiny_model(), tokenizer=None, settings=ModelSettings(model="m", quantization="4bit")
    )
    assert tolerance("merged-16bit", quantized) == TOLERANCES["merged-16bit"]["quantized"]


# Texts


def rows(count):
    for n in range(count):
        yield {"phase": "eval", "prompt": "never", "completion": "this"}
        prompt, completion = {"role": "user", "content": f"{n}+1"}, {"role": "assistant", "content": str(n + 1)}
        yield {"phase": "train", "prompt": [prompt], "completion": [completion]}


def test_texts_are_the_newest_trajectories_and_fixed_ones(tokenizer):
    texts = [tokenizer.decode(ids) for ids in probe_texts(tokenizer, rows(MOST_TRAJECTORIES + 5))]
    assert len(texts) == MOST_TRAJECTORIES + len(FIXED)
    assert texts[0] == "<|im_start|>user\n5+1<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n"
    assert texts[-len(FIXED) :] == list(FIXED)
    short = probe_texts(tokenizer, rows(1), max_tokens=10)
    assert {len(ids) for ids in short} == {10}


def test_prompts_that_are_plain_texts(tokenizer):
    (ids, *_) = probe_texts(tokenizer, [{"phase": "train", "prompt": "1+1=", "completion": "2"}])
    assert tokenizer.decode(ids) == "1+1=2"
