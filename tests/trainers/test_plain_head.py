"""TRL's head in plain PyTorch, against the definitions written out, and put in place only where it is needed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import trl

from rlvr.trainers import plain_head
from rlvr.trainers.plain_head import PlainHead, provide_plain_head

pytestmark = pytest.mark.both

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, generator=generator, requires_grad=True)
    weight = torch.randn(11, 4, generator=generator, requires_grad=True)
    bias = torch.randn(11, generator=generator)
    return hidden, weight, bias, torch.randint(11, (7,), generator=generator)


def test_each_output_is_its_definition(inputs):
    hidden, weight, bias, targets = inputs
    found = PlainHead.apply(hidden, weight, bias, targets, 0.7, 5, 3.0, 0.5, ALL)
    for n in range(7):
        logits = [3.0 * math.tanh(float(hidden[n] @ weight[v] + bias[v]) * 0.5 / 3.0) / 0.7 for v in range(11)]
        total = sum(map(math.exp, logits))
        p = [math.exp(logit) / total for logit in logits]
        expected = (
            math.log(p[targets[n]]),
            -sum(x * math.log(x) for x in p),
            math.log(sum(x * x for x in p)),
            sum(logits) / 11,
            float(max(p) == p[targets[n]]),
        )
        assert [float(column[n]) for column in found] == pytest.approx(expected, abs=1e-5)


def test_outputs_not_asked_for_are_none(inputs):
    hidden, weight, _, targets = inputs
    log_probs, *others = PlainHead.apply(hidden, weight, None, targets, 1.0, 5)
    assert log_probs.shape == (7,)
    assert others == [None] * 4


def test_gradients_are_those_of_the_whole_in_one_piece(inputs, monkeypatch):
    hidden, weight, bias, targets = inputs

    def gradients(tokens_at_once):
        monkeypatch.setattr(plain_head, "_TOKENS_AT_ONCE", tokens_at_once)
        log_probs, entropy, *_ = PlainHead.apply(hidden, weight, bias, targets, 0.7, 5, outputs=("entropy",))
        return torch.autograd.grad((log_probs + 0.3 * entropy).sum(), (hidden, weight))

    for one, other in zip(gradients(100), gradients(2), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("version", "kernel", "gpu", "replaced"),
    [
        ("1.15.0", None, False, True),
        ("1.15.0", "triton", False, True),
        ("1.15.0", "triton", True, False),
        ("1.15.0", None, True, True),
        ("1.16.0", "own fallback", False, False),
        ("1.16.0", "triton", True, False),
    ],
)
def test_it_replaces_only_a_kernel_that_cannot_run(monkeypatch, version, kernel, gpu, replaced):
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", kernel, raising=False)
    monkeypatch.setattr(trl, "__version__", version)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: gpu))
    provide_plain_head()
    assert (utils._ChunkedLogProbFunction is PlainHead) is replaced
