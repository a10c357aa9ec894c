"""Checks that need a process of their own. They work on tiny models, whatever model was given."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rlvr.backends.protocol import LoadedPolicy, LoraSettings
from rlvr.errors import RlvrError
from rlvr.exporting.parity import Expected, logprobs
from rlvr.testing.conformance.checks.saving import SaveRefused, inferring, saved_and_loaded
from rlvr.testing.conformance.context import Context, expect, logits, refusal, tokens
from rlvr.testing.conformance.trainer import trainer_for

_REPOSITORY = "conformance/tiny"


def revision(context: Context) -> str:
    """Two revisions in a Hub cache of our own: the runner has set HF_HUB_CACHE and HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    expect(context.scratch in cache.parents, f"HF_HUB_CACHE is {cache}: this check has to run in its own process")
    _add_revision(context, cache, "main", seed=0)
    _say_in_template(_add_revision(context, cache, "other", seed=1), "other")
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
    said: Any = other.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    expect(said.startswith("other"), "revision='other' was asked for, and another one's tokenizer was loaded")
    _expect_loaded_on(context, "other")
    return "each revision gives its own weights and tokenizer, also under a saved adapter"


def _add_revision(context: Context, cache: Path, name: str, *, seed: int) -> Path:
    """A tiny model as a revision in a Hub cache; its folder."""
    folder, commit = cache / f"models--{_REPOSITORY.replace('/', '--')}", str(seed) * 40
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / name).write_text(commit)
    return Path(shutil.copytree(context.tiny(seed), folder / "snapshots" / commit))


def _say_in_template(folder: Path, word: str) -> None:
    """What the tokenizer of this folder renders begins with the word."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = word + tokenizer.chat_template
    tokenizer.save_pretrained(folder)


def _expect_loaded_on(context: Context, revision: str) -> None:
    """An adapter that was trained on a revision is loaded back onto that revision."""
    policy, folder = context.adapted(model=_REPOSITORY, revision=revision), context.folder()
    context.backend.save(policy, folder)
    loaded = context.backend.load_saved(folder, policy.settings)
    error = (logits(context, loaded) - logits(context, policy)).abs().max().item()
    expect(
        error < 1e-3,
        f"an adapter on revision={revision!r} was loaded back on another one's weights: logits differ by {error:.2g}",
    )


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
    texts = tokens(policy).tolist()
    base = logprobs(inferring(context, policy), texts)
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    trainer_for(context, policy).train()
    still = [name for name, parameter in policy.model.named_parameters() if torch.equal(parameter, before[name])]
    expect(not still, f"full_finetuning: training left {len(still)} tensors unchanged, for example {still[:1]}")
    expected = Expected.of(inferring(context, policy), texts)
    formats = [name for name in context.capabilities.export_formats if name != "merged-4bit"]  # it rounds too much
    said = [_whole(context, policy, name, expected, base) for name in formats]
    return f"every weight is trained, saved and loaded back; nats off: {', '.join(said)}"


def _whole(context: Context, policy: LoadedPolicy, export_format: Any, expected: Expected, base: torch.Tensor) -> str:
    """The whole model in one format, of which all but "adapter", the one that ends a run, may be refused."""
    name = f"full_finetuning, {export_format}"
    try:
        exported = saved_and_loaded(context, policy, export_format, name, expected=expected, base=base)
    except SaveRefused:
        if export_format == "adapter":
            raise
        return f"{export_format} refused"
    return f"{export_format} {exported.parity.error:.1g}"
