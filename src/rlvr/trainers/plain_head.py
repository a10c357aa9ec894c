"""TRL's output head in plain PyTorch, for where TRL's own needs Triton and there is none.

TRL 1.15 computes log-probabilities in a Triton kernel only, and fails on a machine without a GPU. TRL 1.16 has a
fallback of its own.
"""

from __future__ import annotations

import functools

import torch
from torch.utils.checkpoint import checkpoint

_TOKENS_AT_ONCE = 1024  # logits of so many tokens are in memory at a time, in the backward pass too

PerToken = tuple[torch.Tensor | None, ...]


def provide_plain_head() -> None:
    """Puts `PlainHead` in the place of TRL's kernel, if that cannot run here."""
    import trl
    from packaging.version import Version
    from trl.trainer import utils

    if not hasattr(utils, "_ChunkedLogProbFunction"):
        return
    triton_only = Version(trl.__version__) < Version("1.16")
    if utils._ChunkedLogProbFunction is None or (triton_only and not torch.cuda.is_available()):
        vars(utils)["_ChunkedLogProbFunction"] = PlainHead


class PlainHead:
    """What TRL 1.15 calls as an autograd function; here autograd differentiates it by itself."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> PerToken:
        """
        Args:
            hidden: (N, H). weight: (V, H). bias: (V,). targets: (N,) token ids.
            chunk_size: of the vocabulary, for TRL's kernel; not used.

        Returns:
            `log_probs`, `entropy`, `log_sum_sq_probs`, `mean_logits`, `is_top1`: (N,) each, None if not in `outputs`.
            The first two are differentiable, as in TRL.
        """
        score = functools.partial(
            _per_token,
            weight=weight,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            scale=scale,
            outputs=outputs,
        )
        parts = [
            checkpoint(score, rows, ids, use_reentrant=False)
            for rows, ids in zip(hidden.split(_TOKENS_AT_ONCE), targets.split(_TOKENS_AT_ONCE), strict=True)
        ]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))


def _per_token(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> PerToken:
    logits = torch.nn.functional.linear(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    )
    logits = logits.float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    log_p = logits.log_softmax(-1)
    return (
        log_p.gather(-1, targets[:, None]).squeeze(-1),
        -(log_p.exp() * log_p).sum(-1) if "entropy" in outputs else None,
        (2 * log_p).logsumexp(-1).detach() if "log_sum_sq_probs" in outputs else None,
        logits.mean(-1).detach() if "mean_logits" in outputs else None,
        logits.argmax(-1) == targets if "is_top1" in outputs else None,
    )
