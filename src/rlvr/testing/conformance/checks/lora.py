"""Every field of `LoraSettings`, measured on the layers themselves and not on what a configuration says."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlvr.backends.checks import linear_names
from rlvr.backends.protocol import CHOICES, LoadedPolicy, LoraSettings
from rlvr.errors import RlvrError
from rlvr.testing.conformance.context import (
    CheckFailed,
    Context,
    dtype_name,
    expect,
    expect_random_states,
    factors,
    first_line,
    logits,
    lora_layers,
    plain_name,
    quantized,
    random_states,
    refusal,
)

SCALE_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3, "quantized": 5e-2}
"""Relative, of what an adapter's output is multiplied by."""

FRESH_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Mean absolute difference of the logits."""


def applied_once(context: Context) -> str:
    from peft import PeftModel

    base = context.policy()
    expected = linear_layers(base.model)
    names = {name for name, _ in base.model.named_parameters()}
    policy = context.policy(LoraSettings(r=4))
    wrappers = [name for name, module in policy.model.named_modules() if isinstance(module, PeftModel)]
    expect(len(wrappers) <= 1, f"{len(wrappers)} PeftModels are nested in one another")
    layers = lora_layers(policy.model)
    inner = [name for name, layer in layers.items() if hasattr(layer.base_layer, "lora_A")]
    expect(not inner, f"adapters are wrapped in adapters, for example at {inner[0] if inner else ''}")
    adapters = {adapter for layer in layers.values() for adapter in layer.lora_A}
    expect(len(adapters) == 1, f"{len(adapters)} adapters were applied: {', '.join(sorted(adapters)) or 'none'}")
    expect(set(layers) == set(expected), _difference("adapted layers", set(layers), set(expected)))
    beside = [plain_name(n) for n, p in policy.model.named_parameters() if p.requires_grad and plain_name(n) in names]
    expect(not beside, f"the base weights are trainable too: {', '.join(beside[:3])}")
    trainable = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    meant = sum(4 * (layer.in_features + layer.out_features) for layer in expected.values())
    expect(trainable == meant, f"{trainable:,} parameters are trainable; r=4 on these layers makes {meant:,}")
    with refusal("a second apply_lora on the same policy"):
        context.backend.apply_lora(policy, LoraSettings(r=4))
    return f"{len(layers)} layers, {trainable:,} trainable parameters"


def rank(context: Context) -> str:
    for r in (2, 8):
        policy = context.policy(LoraSettings(r=r))
        found = {factors(layer)[0].shape[0] for layer in lora_layers(policy.model).values()}
        expect(found == {r}, f"r={r} was asked for, and the factors have rank {', '.join(map(str, sorted(found)))}")
        _stated(policy, "r", r)
    return "2 and 8 are honoured"


def alpha(context: Context) -> str:
    """With plain weights, and with each quantization that is claimed."""
    scales = [_alpha(context, asked, multiplier) for asked, multiplier in ((4, 1), (32, 1), (8, 3), (8, None))]
    for name in quantized(context.capabilities):
        scales.append(f"{name} {_alpha(context, 32, 1, dtype='auto', quantization=name)}")
    return f"scales {', '.join(scales)}, as stated"


def _alpha(context: Context, asked: int, multiplier: float | None, **settings: Any) -> str:
    """The scale."""
    policy = context.policy(LoraSettings(r=8, alpha=asked, alpha_multiplier=multiplier), **settings)
    lora, quantization = policy.lora, policy.settings.quantization
    way, rounding = ("", dtype_name(policy)) if quantization == "none" else (f"{quantization}: ", "quantized")
    expect(lora is not None, "LoadedPolicy.lora is None on a policy with an adapter")
    assert lora is not None
    if multiplier is not None:
        _stated(policy, "alpha", asked * multiplier)
    elif lora.alpha != asked:
        said = any("alpha" in note for note in policy.notes)
        expect(said, f"alpha={asked} became {lora.alpha} by default, and no note says so")
    for name, scale in _scales(policy).items():
        expect(
            abs(scale * lora.r / lora.alpha - 1) < SCALE_TOLERANCE[rounding],
            f"{way}alpha={asked} (multiplier {multiplier}): the adapter at {name} is scaled by {scale:g}, "
            f"and LoadedPolicy.lora says {lora.alpha} / {lora.r} = {lora.alpha / lora.r:g}",
        )
    return f"{scale:g}"


def rslora(context: Context) -> str:
    asked = LoraSettings(r=16, alpha=8, alpha_multiplier=1, rslora=True)
    if not context.capabilities.rslora:
        context.expect_refusal("rslora, which is not claimed,", asked)
        return "refused"
    policy = _claimed(context, asked)
    _stated(policy, "rslora", True)
    for name, scale in _scales(policy).items():
        expect(
            abs(scale / (8 / 16**0.5) - 1) < SCALE_TOLERANCE[dtype_name(policy)],
            f"rslora, alpha 8, r 16: the adapter at {name} is scaled by {scale:g}, not 8 / sqrt(16) = 2",
        )
    return "alpha / sqrt(r)"


def dropout(context: Context) -> str:
    asked = LoraSettings(r=4, dropout=0.5)
    if not context.capabilities.lora_dropout:
        context.expect_refusal("lora dropout, which is not claimed,", asked)
        return "refused"
    policy = _claimed(context, asked)
    _stated(policy, "dropout", 0.5)
    context.backend.for_training(policy)
    for name, rate in _dropped(policy).items():
        expect(
            abs(rate - 0.5) < 0.15,
            f"dropout=0.5 was asked for, and in training {rate:.0%} of what the adapter at {name} is given is dropped",
        )
    context.backend.for_inference(policy)
    expect(not any(_dropped(policy).values()), "dropout acts in inference too")
    policy = context.policy(LoraSettings(r=4, dropout=0.0))
    context.backend.for_training(policy)
    expect(not any(_dropped(policy).values()), "dropout=0 was asked for, and in training something is dropped")
    return "half is dropped in every layer, in training only"


def targets(context: Context) -> str:
    base = context.policy()
    chosen = tuple(linear_names(base.model)[:2])
    expected = {name for name in linear_layers(base.model) if name.rpartition(".")[2] in chosen}
    policy = context.policy(LoraSettings(r=4, target_modules=chosen))
    _stated(policy, "target_modules", chosen)
    found = set(lora_layers(policy.model))
    expect(found == expected, _difference(f"target_modules={chosen}: adapted layers", found, expected))
    context.expect_refusal(
        "target_modules=('no_such_module',)", LoraSettings(r=4, target_modules=(chosen[0], "no_such_module"))
    )
    one = sorted(expected)[0]
    said = [_one_layer(context, one, way, asked) for way, asked in (("full name", (one,)), ("regex", re.escape(one)))]
    return f"{', '.join(chosen)}: {len(found)} layers; {', '.join(said)}; unknown names are refused"


def _one_layer(context: Context, name: str, way: str, asked: str | tuple[str, ...]) -> str:
    """One layer of many with the same last name, by what names it alone."""
    try:
        policy = context.policy(LoraSettings(r=4, target_modules=asked))
    except RlvrError:
        return f"a {way} is refused"
    found = set(lora_layers(policy.model))
    expect(found == {name}, _difference(f"target_modules={asked!r}, a {way}: adapted layers", found, {name}))
    return f"a {way} is honoured"


def bias(context: Context) -> str:
    base = context.policy()
    all_biases = {name for name, _ in base.model.named_parameters() if name.rpartition(".")[2] == "bias"}
    chosen = _module_with_bias(base.model)
    adapted = {name for name in linear_layers(base.model) if name.rpartition(".")[2] in chosen}
    meant = {
        "none": set(),
        "all": all_biases,
        "lora_only": {name for name in all_biases if name.rpartition(".")[0] in adapted},
    }
    honoured = []
    for name in CHOICES["bias"]:
        asked = LoraSettings(r=4, target_modules=tuple(chosen), bias=name)  # type: ignore[arg-type]
        if name not in context.capabilities.lora_biases:
            context.expect_refusal(f"bias={name!r}, which is not claimed,", asked)
            continue
        policy = _claimed(context, asked)
        _stated(policy, "bias", name)
        trained = {plain_name(n) for n, p in policy.model.named_parameters() if p.requires_grad}
        trained = {n for n in trained if n.rpartition(".")[2] == "bias"}
        expect(trained == meant[name], _difference(f"bias={name!r}: trained biases", trained, meant[name]))
        honoured.append(name)
    return f"honoured: {', '.join(honoured)}; the others are refused"


def dora(context: Context) -> str:
    asked = LoraSettings(r=4, dora=True)
    if not context.capabilities.dora:
        context.expect_refusal("dora, which is not claimed,", asked)
        return "refused"
    policy = _claimed(context, asked)
    _stated(policy, "dora", True)
    layers = lora_layers(policy.model)
    magnitudes = [p for n, p in policy.model.named_parameters() if "magnitude" in n and p.requires_grad]
    expect(
        len(magnitudes) == len(layers),
        f"dora was asked for, and {len(magnitudes)} of {len(layers)} layers have a magnitude that is trained",
    )
    _same_function(context, policy, "dora")
    return f"{len(magnitudes)} magnitudes"


def init(context: Context) -> str:
    base, honoured = context.policy(), []
    name, plain = min(linear_layers(base.model).items(), key=lambda layer: layer[1].weight.numel())
    weight = plain.weight.detach().float().cpu()
    for start, (meaning, holds) in STARTS.items():
        asked = LoraSettings(r=4, alpha=8, alpha_multiplier=1, init=start)  # type: ignore[arg-type]
        if start not in context.capabilities.lora_inits:
            context.expect_refusal(f"init={start!r}, which is not claimed,", asked)
            continue
        policy = _claimed(context, asked)
        _stated(policy, "init", start)
        a, b = factors(lora_layers(policy.model)[name])
        expect(holds(a, b, weight), f"init={start!r} means {meaning}; the factors of {name} are others")
        _same_function(context, policy, f"init={start!r}")
        honoured.append(start)
    return f"honoured: {', '.join(honoured)}; the others are refused"


def _best(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The matrix of this rank that is nearest to the weight (Eckart and Young)."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def _near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).norm() < 0.05 * wanted.norm())


STARTS: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]]] = {
    "default": (
        "a uniform A within 1/sqrt(in), and B = 0",
        lambda a, b, w: not b.any() and a.abs().max() < 1.01 * w.shape[1] ** -0.5,
    ),
    "gaussian": (
        "a normal A with standard deviation 1/r, and B = 0",
        lambda a, b, w: not b.any() and abs(a.std() * len(a) - 1) < 0.3,
    ),
    "pissa": (
        "B·A = the largest r singular values of the weight, over s",
        lambda a, b, w: _near(2 * b @ a, _best(w, 4)),
    ),
    "olora": ("a B with orthonormal columns", lambda a, b, w: _near(b.T @ b, torch.eye(len(a)))),
    "orthogonal": (
        "A and B other than 0 with B·A = 0",
        lambda a, b, w: b.any() and (b @ a).norm() < 0.05 * b.norm() * a.norm(),
    ),
}
"""Start → what it makes of A (r, in) and B (out, r), and whether it holds, given the checkpoint's weight (out, in)."""


def seed(context: Context) -> str:
    before = random_states()
    one, again, other = (
        factors(next(iter(lora_layers(context.policy(LoraSettings(r=4, seed=value)).model).values())))[0]
        for value in (1, 1, 2)
    )
    expect_random_states(before, "applying a LoRA")
    expect(torch.equal(one, again), "one seed gave two different starts")
    expect(not torch.equal(one, other), "two seeds gave the same start: the seed is ignored")
    return "the seed decides the start"


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Every linear layer of a model without adapters but its output head, by name."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def _module_with_bias(model: Any) -> list[str]:
    """Last part of the name of one linear layer, of one with a bias if there is any."""
    with_bias = [name.rpartition(".")[2] for name, layer in linear_layers(model).items() if layer.bias is not None]
    return (with_bias or linear_names(model))[:1]


@torch.no_grad()
def _shaken(layer: Any) -> Any:
    """The layer with a B that is no longer zero."""
    b = layer.lora_B[layer.active_adapters[0]].weight
    b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(3)))
    return layer


def _as_input(policy: LoadedPolicy, layer: Any, x: torch.Tensor) -> torch.Tensor:
    """On the layer's device and in its dtype, or, where its weight is quantized, in that of the embeddings."""
    weight = layer.base_layer.weight
    if not weight.is_floating_point():
        weight = policy.model.get_input_embeddings().weight
    return x.to(policy.model.device, weight.dtype)


@torch.no_grad()
def _scales(policy: LoadedPolicy) -> dict[str, float]:
    """What each adapter's output B·A·x is multiplied by, by least squares over its layer's real output."""
    policy.model.eval()
    scales = {}
    for name, layer in lora_layers(policy.model).items():
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(4))
        x = _as_input(policy, _shaken(layer), x)
        added = (layer(x) - layer.base_layer(x)).float().cpu()
        a, b = factors(layer)
        plain = x.float().cpu() @ a.T @ b.T
        scales[name] = ((added * plain).sum() / (plain * plain).sum()).item()
    return scales


@torch.no_grad()
def _dropped(policy: LoadedPolicy) -> dict[str, float]:
    """The share of inputs that each adapter drops: A and B take the first input to the first output, and it is 1."""
    rates = {}
    for name, layer in lora_layers(policy.model).items():
        adapter = layer.active_adapters[0]
        for part in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
            part.zero_()
            part[0, 0] = 1
        x = torch.zeros(512, layer.in_features)
        x[:, 0] = 1
        x = _as_input(policy, layer, x)
        added = (layer(x) - layer.base_layer(x))[:, 0]  # 0, or the scale over what is not dropped
        rates[name] = (added.abs() < 0.5).float().mean().item()
    return rates


def _same_function(context: Context, policy: LoadedPolicy, what: str) -> None:
    """A fresh adapter leaves the model as it was."""
    base, found = logits(context, context.policy()), logits(context, policy)
    error, allowed = (found - base).abs().mean().item(), FRESH_TOLERANCE[dtype_name(policy)]
    expect(
        error < allowed,
        f"{what}: the fresh adapter changes the model, logits by {error:.2g} on average; allowed: {allowed:g}",
    )


def _stated(policy: LoadedPolicy, name: str, value: object) -> None:
    found = getattr(policy.lora, name, None)
    expect(found == value, f"LoadedPolicy.lora says {name}={found}; {value} was asked for")


def _claimed(context: Context, lora: LoraSettings) -> LoadedPolicy:
    """Loads with a LoRA that the backend claims: a refusal is a finding."""
    try:
        return context.policy(lora)
    except Exception as error:
        raise CheckFailed(
            f"{lora}: capabilities() claims it, and it raised {type(error).__name__}: {first_line(error)}"
        ) from error


def _difference(what: str, found: set[str], expected: set[str]) -> str:
    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "") or "none"

    return f"{what}: missing {some(sorted(expected - found))}; too many: {some(sorted(found - expected))}"
