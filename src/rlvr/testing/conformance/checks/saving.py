"""What `save` writes loads back as the same policy, in every format that is claimed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlvr.backends.protocol import LoadedPolicy
from rlvr.testing.conformance.context import (
    CheckFailed,
    Context,
    expect,
    first_line,
    logits,
    refusal,
    shake,
    token_logprobs,
    tokens,
)

TOLERANCE = {"adapter": 1e-4, "merged-16bit": 5e-2, "merged-4bit": 0.5, "gguf": 0.5}
"""Mean absolute difference of token log-probabilities, in nats. A merged float32 policy is rounded to 16 bits."""

GREEDY_TOKENS = 6
_TRAINED = (
    4  # times the tolerance: by so much the trained policy differs from its base, for an untrained export to show
)


def export(context: Context, export_format: Any) -> str:
    policy = context.adapted()
    folder = context.folder() / "export"
    if export_format not in context.capabilities.export_formats:
        with refusal(f"exporting {export_format!r}, which is not claimed,"):
            context.backend.save(policy, folder, export_format)
        left = _files(folder)
        expect(not left, f"the refused export left files that look like a model: {', '.join(left)}")
        return "refused"
    allowed = TOLERANCE[export_format]
    ids = tokens(policy)
    base = token_logprobs(logits(context, context.policy()), ids)
    wanted = token_logprobs(logits(context, policy), ids)
    for seed in range(2, 8):
        if (wanted - base).abs().mean() > _TRAINED * allowed:
            break
        shake(policy.model, scale=0.1, seed=seed)
        wanted = token_logprobs(logits(context, policy), ids)
    greedy = _greedy(context, policy, ids)
    try:
        context.backend.save(policy, folder, export_format)
    except Exception as error:
        raise CheckFailed(f"it is claimed, and save raised {type(error).__name__}: {first_line(error)}") from error
    expect(
        torch.equal(token_logprobs(logits(context, policy), ids), wanted),
        "saving has changed the policy that was saved",
    )
    loaded = context.backend.load_saved(folder, policy.settings)
    return _compare(context, loaded, ids, wanted=wanted, base=base, greedy=greedy, allowed=allowed) + _trainability(
        context, policy, folder, export_format
    )


def _compare(
    context: Context,
    loaded: LoadedPolicy,
    ids: torch.Tensor,
    *,
    wanted: torch.Tensor,
    base: torch.Tensor,
    greedy: torch.Tensor,
    allowed: float,
) -> str:
    """Raises if the loaded policy is another one; what is expected was computed before it was saved."""
    found = token_logprobs(logits(context, loaded), ids)
    error, from_base = (found - wanted).abs().mean().item(), (found - base).abs().mean().item()
    lost = " It is the base model: what was trained is lost." if from_base < error else ""
    expect(
        error <= allowed,
        f"loaded back, log-probabilities differ from the saved policy's by {error:.2g} nats on average; allowed: "
        f"{allowed:g}.{lost}",
    )
    after = logits(context, loaded, greedy)[:, ids.shape[1] - 1 : -1]
    chosen = greedy[:, ids.shape[1] :, None].cpu()
    gap = (after.max(-1).values - after.gather(-1, chosen).squeeze(-1)).max().item()
    expect(
        gap <= 4 * allowed,
        f"loaded back, greedy decoding chooses other tokens: the saved policy's are {gap:.2g} nats from the best",
    )
    return f"mean difference {error:.1g} nats (the base model: {from_base:.1g}), same greedy tokens"


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


def _greedy(context: Context, policy: LoadedPolicy, ids: torch.Tensor) -> torch.Tensor:
    """`ids` with the likeliest tokens after them, one full forward each: no cache, no sampler."""
    for _ in range(GREEDY_TOKENS):
        best = logits(context, policy, ids)[:, -1:].argmax(-1)
        ids = torch.cat([ids, best.to(ids.device)], dim=1)
    return ids


def _files(folder: Path) -> list[str]:
    ends = (".safetensors", ".bin", ".gguf")
    return sorted(path.name for path in folder.rglob("*") if path.suffix in ends) if folder.exists() else []
