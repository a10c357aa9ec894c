"""What `save` writes loads back as the same policy, in every format that is claimed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlvr.backends.checks import lora_settings
from rlvr.backends.protocol import CHOICES, Capabilities, LoadedPolicy, LoraSettings
from rlvr.errors import RlvrError
from rlvr.exporting.contents import wide_matrices
from rlvr.exporting.parity import Expected, Parity, Tolerance, compare, logprobs, tolerance
from rlvr.exporting.writers import settings_to_load
from rlvr.testing.conformance.context import (
    LIVELY,
    CheckFailed,
    Context,
    dtype_name,
    expect,
    first_line,
    quantized,
    refusal,
    shake,
    tokens,
)
from rlvr.testing.conformance.spoken import difference, spoken

_TRAINED = 4
"""Times the tolerance: by so much the trained policy differs from its base, for an untrained export to show."""

_CHECKPOINTS = {"adapter": (torch.bfloat16,), "merged-16bit": (torch.bfloat16, torch.float32)}

_SMOOTH: dict[str, Any] = {"initializer_range": 0.05}
"""Of a model whose rounding to 4 bits moves log-probabilities by little, as it does with trained ones."""

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
    """With plain LoRA; adapters and merged models also with its other forms, of checkpoints in 16 and 32 bits, and on
    quantized weights."""
    claims = context.capabilities
    if export_format not in claims.export_formats:
        return _refused(context, export_format)
    said = [_plain(context, export_format)]
    if export_format in ("adapter", "merged-16bit"):
        said += [_other_form(context, export_format, form) for form in other_forms(claims)]
        said += [_on_checkpoint(context, export_format, dtype) for dtype in _CHECKPOINTS[export_format]]
        said += [_on_quantized(context, export_format, name) for name in quantized(claims)]
    return "; ".join(said)


def _refused(context: Context, export_format: Any) -> str:
    policy, folder = context.adapted(), context.folder() / "export"
    with refusal(f"exporting {export_format!r}, which is not claimed,"):
        context.backend.save(policy, folder, export_format)
    left = _files(folder)
    expect(not left, f"the refused export left files that look like a model: {', '.join(left)}")
    return "refused"


@dataclass(frozen=True)
class Exported:
    """A policy, what was saved of it, and how that compares once it is loaded back."""

    policy: LoadedPolicy
    loaded: LoadedPolicy
    folder: Path
    expected: Expected
    allowed: Tolerance
    parity: Parity


def _plain(context: Context, export_format: Any) -> str:
    from rlvr.testing.tiny import save_tiny

    model = {"model": save_tiny(context.folder(), **_SMOOTH)} if export_format == "merged-4bit" else {}
    exported = _round_trip(context, export_format, PLAIN, PLAIN.name, **model)
    parity = exported.parity
    _expect_tokenizer(exported, export_format)
    said = f"mean difference {parity.error:.1g} nats (the base model: {parity.from_base:.1g}), same greedy tokens"
    said += ", of a tiny model" if model and context.given_model is not None else ""
    return said + (_adapter(context, exported) if export_format == "adapter" else "")


def _other_form(context: Context, export_format: Any, form: Form) -> str:
    if not _parts(context.policy(form.lora), form):
        return f"{form.name}: the model has none"
    try:
        exported = _round_trip(context, export_format, form, form.name)
    except SaveRefused:
        return f"{form.name} refused"
    return f"{form.name} {exported.parity.error:.1g}"


def _on_checkpoint(context: Context, export_format: Any, dtype: torch.dtype) -> str:
    """As `dtype="auto"` loads a checkpoint in this dtype."""
    from rlvr.testing.tiny import save_tiny

    name = f"of a checkpoint in {str(dtype).removeprefix('torch.')}"
    checkpoint = save_tiny(context.folder(), dtype=dtype, **LIVELY)
    exported = _round_trip(context, export_format, PLAIN, name, model=checkpoint, dtype="auto")
    wide = [*wide_matrices(exported.folder)] if export_format == "merged-16bit" else []
    expect(not wide, f"{name}: {len(wide)} weights were not written in 16 bits, for example {wide[:1]}")
    found, wanted = dtype_name(exported.loaded), dtype_name(exported.policy)
    expect(
        found == wanted or dtype is torch.float32,  # in 16 bits, a merged model is no longer what "auto" took it for
        f"{name}: loaded back with the policy's settings, weights are in {found}; the policy's are in {wanted}",
    )
    return f"{name} {exported.parity.error:.1g}"


def _on_quantized(context: Context, export_format: Any, quantization: str) -> str:
    """A merged model holds other weights than the quantized ones, so that a backend may refuse it."""
    from rlvr.testing.tiny import save_tiny

    name = f"on weights in {quantization}"
    settings: dict[str, Any] = {
        "model": save_tiny(context.folder(), **_SMOOTH),
        "dtype": "auto",
        "quantization": quantization,
    }
    try:
        exported = _round_trip(context, export_format, PLAIN, name, **settings)
    except SaveRefused as error:
        expect(export_format != "adapter", f"{name}: an adapter cannot be saved: {error}")
        return f"{name} refused"
    return f"{name} {exported.parity.error:.1g}"


class SaveRefused(CheckFailed):
    """`save` raised an `RlvrError`: a finding, unless the check allows it."""


def _round_trip(context: Context, export_format: Any, form: Form, name: str, **settings: Any) -> Exported:
    """Saves and loads a policy of which `form.part` is trained, and compares it with the same one before that."""
    policy = context.policy(form.lora, **settings)
    texts = tokens(policy).tolist()
    shake(policy.model, where=lambda name: form.part not in name)
    base = logprobs(inferring(context, policy), texts)
    times = 1 if export_format == "merged-4bit" else _TRAINED  # adapters that do more are rounded badly
    _train(context, policy, form, texts, base=base, enough=times * tolerance(export_format, policy).error)
    expected = Expected.of(inferring(context, policy), texts)
    return saved_and_loaded(context, policy, export_format, name, expected=expected, base=base)


def saved_and_loaded(
    context: Context, policy: LoadedPolicy, export_format: Any, name: str, *, expected: Expected, base: torch.Tensor
) -> Exported:
    """Saves the policy, which is to stay as it is, and loads it back as the same one.

    Args:
        name: begins the findings.
        base: log-probabilities of `expected.texts` before training, (N,) in nats.

    Raises:
        SaveRefused: by an `RlvrError`.
    """
    folder, allowed = context.folder() / "export", tolerance(export_format, policy)
    _save(context, policy, folder, export_format, name)
    expect(
        torch.equal(logprobs(inferring(context, policy), expected.texts), expected.logprobs),
        f"{name}: saving has changed the policy that was saved",
    )
    loaded = context.backend.load_saved(folder, settings_to_load(export_format, policy.settings))
    parity = compare(inferring(context, loaded), expected, base=base, allowed=allowed)
    expect(not parity.problems, f"{name}: loaded back, it is another policy: {'; '.join(parity.problems)}")
    return Exported(policy, loaded, folder, expected, allowed, parity)


def _save(context: Context, policy: LoadedPolicy, folder: Path, export_format: Any, name: str) -> None:
    try:
        context.backend.save(policy, folder, export_format)
    except Exception as error:
        finding = f"{name}: it is claimed, and save raised {type(error).__name__}: {first_line(error)}"
        raise (SaveRefused if isinstance(error, RlvrError) else CheckFailed)(finding) from error


def _train(
    context: Context, policy: LoadedPolicy, form: Form, texts: list[list[int]], *, base: torch.Tensor, enough: float
) -> None:
    """Moves what the form trains until log-probabilities differ by `enough`."""
    for seed in range(1, 10):
        shake(policy.model, scale=0.1, seed=seed, where=lambda name: form.part in name)
        if (logprobs(inferring(context, policy), texts) - base).abs().mean() > enough:
            return


def _parts(policy: LoadedPolicy, form: Form) -> list[str]:
    """What the form trains of this model: biases, for one, it may have none."""
    return [name for name, weight in policy.model.named_parameters() if form.part in name and weight.requires_grad]


def inferring(context: Context, policy: LoadedPolicy) -> torch.nn.Module:
    context.backend.for_inference(policy)
    return policy.model


def _expect_tokenizer(exported: Exported, export_format: str) -> None:
    """The policy's own, in what the backend loads, and for others in the folder (a GGUF file has it within)."""
    from transformers import AutoTokenizer

    found = {"loaded back, the tokenizer": exported.loaded.tokenizer}
    if export_format != "gguf":
        try:
            found["the tokenizer in the saved folder"] = AutoTokenizer.from_pretrained(str(exported.folder))
        except Exception as error:
            raise CheckFailed(f"no tokenizer was saved beside the weights: {first_line(error)}") from error
    wanted = spoken(exported.policy.tokenizer)
    for name, tokenizer in found.items():
        other = difference(tokenizer, wanted)
        expect(other is None, f"{name} is not the policy's: {other}")


def _adapter(context: Context, exported: Exported) -> str:
    """An adapter is loaded for inference, or for training on, on what is claimed, and says in its file what it is."""
    from peft import PeftConfig

    policy, folder = exported.policy, exported.folder
    expected, allowed = exported.expected, exported.allowed
    paths = list(folder.rglob("adapter_config.json"))  # PEFT has a folder for an adapter with a name
    expect(len(paths) == 1, f"{len(paths)} files adapter_config.json were saved; one says what the adapter is")
    file: Any = PeftConfig.from_pretrained(str(paths[0].parent))
    base = file.base_model_name_or_path
    expect(
        base == policy.settings.model or not Path(policy.settings.model).is_dir(),
        f"adapter_config.json names the base {base!r}, and the policy's is {policy.settings.model!r}",
    )
    unclaimed: Any = sorted(set(CHOICES["quantization"]) - context.capabilities.quantizations)
    for name in unclaimed:
        with refusal(f"load_saved with quantization={name!r}, which is not claimed,"):
            context.backend.load_saved(folder, replace(policy.settings, quantization=name))
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
    error = (logprobs(inferring(context, again), expected.texts) - expected.logprobs).abs().mean().item()
    expect(
        error <= allowed.error,
        f"load_saved(trainable=True) gives another policy: log-probabilities differ by {error:.2g} nats on average "
        f"(allowed: {allowed.error:g}). Is its adapter a fresh one?",
    )
    return ", trains on"


def _trainable(policy: LoadedPolicy) -> int:
    return sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)


def _files(folder: Path) -> list[str]:
    ends = (".safetensors", ".bin", ".gguf")
    return sorted(path.name for path in folder.rglob("*") if path.suffix in ends) if folder.exists() else []
