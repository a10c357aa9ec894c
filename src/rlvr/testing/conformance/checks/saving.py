"""What `save` writes loads back as the same policy, in every format that is claimed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlvr.backends.checks import lora_settings
from rlvr.backends.protocol import Capabilities, LoadedPolicy, LoraSettings
from rlvr.errors import RlvrError
from rlvr.exporting.contents import wide_matrices
from rlvr.exporting.parity import Expected, Tolerance, compare, logprobs, tolerance
from rlvr.testing.conformance.context import CheckFailed, Context, expect, first_line, refusal, shake, tokens
from rlvr.testing.conformance.spoken import difference, spoken

_TRAINED = 4
"""Times the tolerance: by so much the trained policy differs from its base, for an untrained export to show."""

_KEPT = ("r", "alpha", "dropout", "bias", "rslora", "dora")
"""Of `LoraSettings`: what an adapter's file says too. Its modules are written out there, and its start is past."""


@dataclass(frozen=True)
class Form:
    """A kind of LoRA. `part` is in the names of the parameters that the check trains, and looks for afterwards."""

    name: str
    lora: LoraSettings
    part: str


PLAIN = Form("LoRA", LoraSettings(r=4, alpha=8), "lora_")


def other_forms(claims: Capabilities) -> list[Form]:
    """Those that are claimed. With a rank of 16 rsLoRA scales by four times what LoRA does."""
    forms = []
    if claims.rslora:
        forms.append(Form("rsLoRA", LoraSettings(r=16, alpha=8, rslora=True), "lora_"))
    if claims.dora:
        forms.append(Form("DoRA", LoraSettings(r=4, alpha=8, dora=True), "magnitude"))
    if claims.lora_biases - {"none"}:
        bias: Any = "all" if "all" in claims.lora_biases else "lora_only"
        forms.append(Form(f"bias={bias!r}", LoraSettings(r=4, alpha=8, bias=bias), ".bias"))
    return forms


def export(context: Context, export_format: Any) -> str:
    """With plain LoRA; as adapter and as merged model, with every other form of it that is claimed."""
    if export_format not in context.capabilities.export_formats:
        return _refused(context, export_format)
    said = [_round_trip(context, export_format, PLAIN)]
    if export_format in ("adapter", "merged-16bit"):
        said += [_round_trip(context, export_format, form) for form in other_forms(context.capabilities)]
    if export_format == "merged-16bit":
        said.append(_sixteen_bits(context))
    return "; ".join(said)


def _refused(context: Context, export_format: Any) -> str:
    policy, folder = context.adapted(), context.folder() / "export"
    with refusal(f"exporting {export_format!r}, which is not claimed,"):
        context.backend.save(policy, folder, export_format)
    left = _files(folder)
    expect(not left, f"the refused export left files that look like a model: {', '.join(left)}")
    return "refused"


def _round_trip(context: Context, export_format: Any, form: Form) -> str:
    """Saves and loads a policy of which `form.part` is trained, and compares it with the same one before that."""
    policy, folder = context.policy(form.lora), context.folder() / "export"
    allowed, texts = tolerance(export_format, policy), tokens(policy).tolist()
    shake(policy.model, where=lambda name: form.part not in name)
    base = logprobs(_inferring(context, policy), texts)
    if not _train(context, policy, form, texts, base=base, enough=_TRAINED * allowed.error):
        return f"{form.name}: the model has none"
    model = _inferring(context, policy)
    expected = Expected.of(model, texts)
    try:
        context.backend.save(policy, folder, export_format)
    except Exception as error:
        if form is not PLAIN and isinstance(error, RlvrError):
            return f"{form.name} refused"
        raise CheckFailed(
            f"{form.name}: it is claimed, and save raised {type(error).__name__}: {first_line(error)}"
        ) from error
    expect(
        torch.equal(logprobs(_inferring(context, policy), texts), expected.logprobs),
        f"{form.name}: saving has changed the policy that was saved",
    )
    loaded = context.backend.load_saved(folder, policy.settings)
    parity = compare(_inferring(context, loaded), expected, base=base, allowed=allowed)
    expect(not parity.problems, f"{form.name}: loaded back, it is another policy: {'; '.join(parity.problems)}")
    if form is not PLAIN:
        return f"{form.name} {parity.error:.1g}"
    _expect_tokenizer(policy, loaded, folder, export_format)
    said = f"mean difference {parity.error:.1g} nats (the base model: {parity.from_base:.1g}), same greedy tokens"
    return said + (_adapter(context, policy, folder, expected, allowed) if export_format == "adapter" else "")


def _train(
    context: Context, policy: LoadedPolicy, form: Form, texts: list[list[int]], *, base: torch.Tensor, enough: float
) -> bool:
    """Moves what the form trains until log-probabilities differ by `enough`; false where there is nothing to move."""
    for seed in range(1, 10):
        shake(policy.model, scale=0.1, seed=seed, where=lambda name: form.part in name)
        if (logprobs(_inferring(context, policy), texts) - base).abs().mean() > enough:
            return True
    return any(form.part in name and weight.requires_grad for name, weight in policy.model.named_parameters())


def _inferring(context: Context, policy: LoadedPolicy) -> torch.nn.Module:
    context.backend.for_inference(policy)
    return policy.model


def _expect_tokenizer(policy: LoadedPolicy, loaded: LoadedPolicy, folder: Path, export_format: str) -> None:
    """The policy's own, in what the backend loads, and for others in the folder (a GGUF file has it within)."""
    from transformers import AutoTokenizer

    found = {"loaded back, the tokenizer": loaded.tokenizer}
    if export_format != "gguf":
        try:
            found["the tokenizer in the saved folder"] = AutoTokenizer.from_pretrained(str(folder))
        except Exception as error:
            raise CheckFailed(f"no tokenizer was saved beside the weights: {first_line(error)}") from error
    wanted = spoken(policy.tokenizer)
    for name, tokenizer in found.items():
        other = difference(tokenizer, wanted)
        expect(other is None, f"{name} is not the policy's: {other}")


def _adapter(context: Context, policy: LoadedPolicy, folder: Path, expected: Expected, allowed: Tolerance) -> str:
    """An adapter is loaded for inference, or for training on, and says in its file what it is."""
    from peft import PeftConfig

    paths = list(folder.rglob("adapter_config.json"))  # PEFT has a folder for an adapter with a name
    expect(len(paths) == 1, f"{len(paths)} files adapter_config.json were saved; one says what the adapter is")
    file: Any = PeftConfig.from_pretrained(str(paths[0].parent))
    base = file.base_model_name_or_path
    expect(
        base == policy.settings.model or not Path(policy.settings.model).is_dir(),
        f"adapter_config.json names the base {base!r}, and the policy's is {policy.settings.model!r}",
    )
    frozen = context.backend.load_saved(folder, policy.settings)
    expect(not _trainable(frozen), f"load_saved(trainable=False) left {_trainable(frozen):,} parameters trainable")
    again = context.backend.load_saved(folder, policy.settings, trainable=True)
    expect(
        _trainable(again) == _trainable(policy),
        f"load_saved(trainable=True) has {_trainable(again):,} trainable parameters; the saved policy has "
        f"{_trainable(policy):,}",
    )
    stated = {"adapter_config.json": lora_settings(file), "LoadedPolicy.lora of load_saved": frozen.lora}
    for name in _KEPT:
        wanted = getattr(policy.lora, name)
        for where, lora in stated.items():
            found = getattr(lora, name, None)
            expect(found == wanted, f"{where} says {name}={found}; the adapter that was saved has {wanted}")
    error = (logprobs(_inferring(context, again), expected.texts) - expected.logprobs).abs().mean().item()
    expect(
        error <= allowed.error,
        f"load_saved(trainable=True) gives another policy: log-probabilities differ by {error:.2g} nats on average "
        f"(allowed: {allowed.error:g}). Is its adapter a fresh one?",
    )
    return ", trains on"


def _trainable(policy: LoadedPolicy) -> int:
    return sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)


def _sixteen_bits(context: Context) -> str:
    """Whatever the checkpoint is in."""
    from rlvr.testing.tiny import save_tiny

    for dtype in (torch.bfloat16, torch.float32):
        checkpoint, folder = save_tiny(context.folder(), dtype=dtype), context.folder()
        policy = context.adapted(model=checkpoint, dtype="auto")
        context.backend.save(policy, folder, "merged-16bit")
        wide = [*wide_matrices(folder)]
        expect(not wide, f"{len(wide)} weights were not written in 16 bits, for example {wide[:1]}")
    return "16 bits, of a checkpoint in bfloat16 and of one in float32"


def _files(folder: Path) -> list[str]:
    ends = (".safetensors", ".bin", ".gguf")
    return sorted(path.name for path in folder.rglob("*") if path.suffix in ends) if folder.exists() else []
