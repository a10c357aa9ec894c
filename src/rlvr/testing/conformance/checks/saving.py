"""What `save` writes loads back as the same policy, in every format that is claimed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlvr.backends.protocol import LoadedPolicy
from rlvr.exporting.parity import Expected, compare, logprobs, tolerance
from rlvr.testing.conformance.context import CheckFailed, Context, expect, first_line, refusal, shake, tokens

_TRAINED = 4
"""Times the tolerance: by so much the trained policy differs from its base, for an untrained export to show."""


def export(context: Context, export_format: Any) -> str:
    policy = context.adapted()
    folder = context.folder() / "export"
    if export_format not in context.capabilities.export_formats:
        with refusal(f"exporting {export_format!r}, which is not claimed,"):
            context.backend.save(policy, folder, export_format)
        left = _files(folder)
        expect(not left, f"the refused export left files that look like a model: {', '.join(left)}")
        return "refused"
    allowed, texts = tolerance(export_format, policy), tokens(policy).tolist()
    base = logprobs(_inferring(context, context.policy()), texts)
    model = _inferring(context, policy)
    for seed in range(2, 8):
        if (logprobs(model, texts) - base).abs().mean() > _TRAINED * allowed.error:
            break
        shake(model, scale=0.1, seed=seed)
    expected = Expected.of(model, texts)
    try:
        context.backend.save(policy, folder, export_format)
    except Exception as error:
        raise CheckFailed(f"it is claimed, and save raised {type(error).__name__}: {first_line(error)}") from error
    expect(
        torch.equal(logprobs(_inferring(context, policy), texts), expected.logprobs),
        "saving has changed the policy that was saved",
    )
    loaded = context.backend.load_saved(folder, policy.settings)
    parity = compare(_inferring(context, loaded), expected, base=base, allowed=allowed)
    expect(not parity.problems, f"loaded back, it is another policy: {'; '.join(parity.problems)}")
    return (
        f"mean difference {parity.error:.1g} nats (the base model: {parity.from_base:.1g}), same greedy tokens"
        + _trainability(context, policy, folder, export_format)
    )


def _inferring(context: Context, policy: LoadedPolicy) -> torch.nn.Module:
    context.backend.for_inference(policy)
    return policy.model


def _trainability(context: Context, policy: LoadedPolicy, folder: Path, export_format: str) -> str:
    """An adapter is loaded for inference, or for training on."""
    if export_format != "adapter":
        return ""

    def trainable(of: LoadedPolicy) -> int:
        return sum(parameter.numel() for parameter in of.model.parameters() if parameter.requires_grad)

    frozen = trainable(context.backend.load_saved(folder, policy.settings))
    expect(frozen == 0, f"load_saved(trainable=False) left {frozen:,} parameters trainable")
    again = trainable(context.backend.load_saved(folder, policy.settings, trainable=True))
    expect(
        again == trainable(policy),
        f"load_saved(trainable=True) has {again:,} trainable parameters; the saved policy has {trainable(policy):,}",
    )
    return ", trains on"


def _files(folder: Path) -> list[str]:
    ends = (".safetensors", ".bin", ".gguf")
    return sorted(path.name for path in folder.rglob("*") if path.suffix in ends) if folder.exists() else []
