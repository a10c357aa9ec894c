"""A fused model beside its twin, which the fused functions leave alone."""

from __future__ import annotations

import torch

INPUT = torch.arange(3, 23).view(2, 10)


def outputs_and_gradients(model, input_ids=INPUT):
    model.zero_grad()
    logits = model(input_ids=input_ids.to(model.device)).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(model.device)
    (logits.float() * weights).mean().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, own, *, value=1e-6, gradient=1e-5):
    (logits, gradients), (expected, expected_gradients) = map(outputs_and_gradients, (model, own))
    torch.testing.assert_close(logits, expected, rtol=value, atol=value * expected.abs().max().item())
    assert gradients.keys() == expected_gradients.keys()
    for name, wanted in expected_gradients.items():
        error = (gradients[name] - wanted).norm() / wanted.norm().clamp(min=1e-8)
        assert error < gradient, f"{name}: {error:.1e}"
