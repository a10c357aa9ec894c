"""Checks that need a process of their own. They work on tiny models, whatever model was given."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rlvr.backends.protocol import LoadedPolicy, LoraSettings
from rlvr.errors import RlvrError
from rlvr.testing.conformance.context import Context, expect, logits, refusal, shake, tokens

_REPOSITORY = "conformance/tiny"


def revision(context: Context) -> str:
    """Two revisions in a Hub cache of our own: the runner has set HF_HUB_CACHE and HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    expect(context.scratch in cache.parents, f"HF_HUB_CACHE is {cache}: this check has to run in its own process")
    folder = cache / f"models--{_REPOSITORY.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("main", "other")):
        commit = str(seed) * 40
        (folder / "refs" / name).write_text(commit)
        shutil.copytree(context.tiny(seed), folder / "snapshots" / commit, dirs_exist_ok=True)
    try:
        default = context.policy(model=_REPOSITORY, revision=None)
    except RlvrError as error:  # it reads other files than transformers' from the Hub
        context.expect_refusal("a revision of what it refuses", model=_REPOSITORY, revision="other")
        return f"refused, whatever the revision: {error}"
    _expect_weights(context, default, seed=0, revision=None)
    try:
        other = context.policy(model=_REPOSITORY, revision="other")
    except RlvrError as error:
        return f"refused: {error}"
    _expect_weights(context, other, seed=1, revision="other")
    return "each revision gives its own weights"


def _expect_weights(context: Context, found: LoadedPolicy, *, seed: int, revision: str | None) -> None:
    wanted, ids = context.policy(model=context.tiny(seed)), tokens(found)
    expect(
        torch.equal(logits(context, found, ids), logits(context, wanted, ids)),
        f"revision={revision!r} was asked for, and another one's weights were loaded",
    )


def full_finetuning(context: Context) -> str:
    if not context.capabilities.full_finetuning:
        context.expect_refusal("full_finetuning, which is not claimed,", full_finetuning=True)
        return "refused"
    policy = context.policy(full_finetuning=True)
    for when, prepare in (("once loaded", None), ("after for_training", context.backend.for_training)):
        if prepare is not None:
            prepare(policy)
        frozen = [name for name, parameter in policy.model.named_parameters() if not parameter.requires_grad]
        expect(not frozen, f"full_finetuning: {when} {len(frozen)} tensors are frozen, for example {frozen[:1]}")
    expect(policy.lora is None, "full_finetuning, and LoadedPolicy.lora is not None")
    with refusal("apply_lora on a policy that was loaded for full_finetuning"):
        context.backend.apply_lora(policy, LoraSettings())
    shake(policy.model, scale=0.01)
    wanted, folder = logits(context, policy), context.folder()
    context.backend.save(policy, folder)
    loaded = context.backend.load_saved(folder, policy.settings)
    error = (logits(context, loaded) - wanted).abs().max().item()
    expect(error < 1e-4, f"saved and loaded back, logits differ by {error:.2g}")
    return "every weight is trainable, saved and loaded back"
