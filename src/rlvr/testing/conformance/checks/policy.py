"""The numbers: token ids, log-probabilities, gradients and memory, against a float32 reference."""

from __future__ import annotations

import gc
from typing import Any

import torch

from rlvr.backends.protocol import LoadedPolicy, LoraSettings
from rlvr.testing.conformance.checks.settings import FLOATS
from rlvr.testing.conformance.context import (
    Context,
    expect,
    expect_fine_grained,
    logits,
    lora_layers,
    quantized,
    token_logprobs,
    tokens,
)
from rlvr.testing.conformance.reference import Pairs, Reference, own_tokenizer
from rlvr.testing.conformance.spoken import difference

LOGPROB_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Mean absolute difference of token log-probabilities, in nats."""

GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 2e-2}
"""Norm of the difference over the norm of the reference's gradient, all factors together."""

_SLOPE = 0.2
"""In nats: by so much the loss is to differ between two points along the gradient. Far above rounding, and little
enough to be nearly linear."""

_SLOPE_SHARES = (0.6, 1.6)
"""What share of it may be found. Noise of 8-bit arithmetic and curvature leave 0.9 to 1.1."""

_FAR = 1024  # tokens

MEMORY_TOLERANCE = 0.1
_WORTH_ASKING_CUDA = 64 * 2**20  # bytes; below, what libraries keep beside the weights counts for too much
_LARGE: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "layers": 4, "heads": 16}
"""240 million parameters: in 4 bits they are worth asking CUDA, and so is an adapter of `_RANK`."""
_RANK = 64


def dtypes_to_compare(context: Context) -> list[str]:
    return [name for name in FLOATS if name in context.capabilities.dtypes]


def log_probabilities(context: Context) -> str:
    measured, model = [], context.readable_model
    for dtype in dtypes_to_compare(context):
        for what, load in (("base", context.policy), ("adapted", context.adapted)):
            policy = load(model=model, dtype=dtype)
            error = expect_logprobs(context, policy, model, dtype, f"{what} policy in {dtype}")
            measured.append(f"{dtype} {what} {error:.1g}")
    return f"mean difference in nats: {', '.join(measured)}; {_far(context, model)}{context.note_on(model)}"


def expect_logprobs(context: Context, policy: LoadedPolicy, model: str, dtype: str, what: str) -> float:
    """The mean difference from the reference, in nats."""
    ids = tokens(policy)
    found = token_logprobs(logits(context, policy), ids)
    wanted = Reference.of(policy, model=model, weights_dtype=FLOATS[dtype]).logprobs(ids)
    error, allowed = (found - wanted).abs().mean().item(), LOGPROB_TOLERANCE[dtype]
    expect(
        error <= allowed,
        f"{what}: log-probabilities differ from the float32 reference by {error:.2g} nats on average; allowed: "
        f"{allowed:g}",
    )
    return error


def _far(context: Context, model: str) -> str:
    """Positions that the other checks do not reach, up to the max_seq_length that was asked for."""
    dtype, length = dtypes_to_compare(context)[0], min(_FAR, _longest(context.policy(model=model)))
    policy = context.policy(model=model, dtype=dtype, max_seq_length=length)
    known = tokens(policy).flatten()
    drawn = torch.randint(len(known), (1, length), generator=torch.Generator().manual_seed(5))
    ids = known[drawn.to(known.device)]
    found = token_logprobs(logits(context, policy, ids), ids)
    wanted = Reference.of(policy, model=model, weights_dtype=FLOATS[dtype]).logprobs(ids)
    error, allowed = (found - wanted)[:, length // 4 :].abs().mean().item(), LOGPROB_TOLERANCE[dtype]
    expect(
        error <= allowed,
        f"max_seq_length={length}, {dtype}: log-probabilities after token {length // 4} differ from the float32 "
        f"reference by {error:.2g} nats on average; allowed: {allowed:g}. Are positions scaled, or tokens forgotten?",
    )
    return f"up to token {length} {error:.1g}"


def _longest(policy: LoadedPolicy) -> int:
    return getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or _FAR


def tokenizer(context: Context) -> str:
    """Ids, chat rendering and end of turn; the pad token may be another one."""
    model = context.readable_model
    other = difference(context.policy(model=model).tokenizer, own_tokenizer(model))
    expect(other is None, f"the policy's tokenizer is not the model's own: {other}")
    return f"ids and chat rendering are the model's own{context.note_on(model)}"


def gradients(context: Context) -> str:
    """With gradient checkpointing as the backend does it by default, in training mode; of one pass and of two. On
    quantized weights, of which there is no reference, the gradient is compared with the policy's own loss."""
    measured, model = [], context.model_without_dropout
    for dtype in dtypes_to_compare(context):
        error = expect_gradients(context, context.adapted(model=model, dtype=dtype), model, dtype)
        measured.append(f"{dtype} {error:.1g}")
    said = f"relative difference: {', '.join(measured)}{context.note_on(model)}"
    slopes = [f"{name} {_expect_slope(context, name):.0%}" for name in quantized(context.capabilities)]
    return said + (
        f"; of the change of the loss that they say, of a tiny model: {', '.join(slopes)}" if slopes else ""
    )


def expect_gradients(context: Context, policy: LoadedPolicy, model: str, dtype: str) -> float:
    """The difference from the reference over its norm."""
    trained = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
    expect_fine_grained(trained, f"{dtype}: ")
    ids = tokens(policy)
    loss, wanted = Reference.of(policy, model=model, weights_dtype=FLOATS[dtype]).loss_and_gradients(ids)
    found_loss, found = _gradients(context, policy, ids)
    allowed = GRADIENT_TOLERANCE[dtype]
    expect(abs(found_loss - loss) < LOGPROB_TOLERANCE[dtype], f"{dtype}: the loss is {found_loss:.5f}, not {loss:.5f}")
    without = [name for name, (a, b) in found.items() if a is None or b is None]
    expect(not without, f"{dtype}: {len(without)} adapted layers got no gradient, for example {without[:1]}")
    error = _relative_difference(found, wanted)
    expect(
        error <= allowed,
        f"{dtype}: the adapter's gradients differ from the float32 reference by {error:.2g} of their norm; "
        f"allowed: {allowed:g}",
    )
    _, found = _gradients(context, policy, ids)
    error = _relative_difference(found, {name: (2 * a, 2 * b) for name, (a, b) in wanted.items()})
    expect(
        error <= allowed,
        f"{dtype}: after a second backward pass the adapter's gradients are not the sum of both, but "
        f"{error:.2g} of its norm off; allowed: {allowed:g}. Are gradients written where they should be added?",
    )
    return error


def _expect_slope(context: Context, quantization: str) -> float:
    """The loss follows the gradient g of all factors, of a tiny model: L(x + εg) − L(x − εg) = 2ε|g|² for a small ε.

    Returns:
        The share of that change that was found.
    """
    policy = context.adapted(model=context.tiny(), dtype="auto", quantization=quantization)
    ids = tokens(policy)
    _, found = _gradients(context, policy, ids)
    without = [name for name, (a, b) in found.items() if a is None or b is None]
    expect(
        found and not without,
        f"{quantization}: {len(without)} of {len(found)} adapted layers got no gradient, for example {without[:1]}",
    )
    along = {weight: weight.grad.clone() for weight in policy.model.parameters() if weight.grad is not None}
    square = sum((gradient.float() ** 2).sum().item() for gradient in along.values())
    expect(square > 0, f"{quantization}: the adapter's gradients are zero")
    losses = []
    for way in (1, -2):  # to x + εg, and from there to x − εg
        with torch.no_grad():
            for weight, gradient in along.items():
                weight.add_(way * _SLOPE / (2 * square) * gradient)
        losses.append(_loss(context, policy, ids).item())
    share = (losses[0] - losses[1]) / _SLOPE
    least, most = _SLOPE_SHARES
    expect(
        least <= share <= most,
        f"{quantization}: between two points along the adapter's gradient the loss changes by {share:.0%} of what the "
        f"gradient says, from {losses[1]:.4f} to {losses[0]:.4f}; allowed: {least:.0%} to {most:.0%}",
    )
    return share


Gradients = dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]
"""Of A and B, by the name of their layer."""


def _relative_difference(found: Gradients, wanted: Pairs) -> float:
    """The norm of the difference over that of what is wanted, all factors together."""
    pairs = [(x, y) for name in wanted for x, y in zip(found[name], wanted[name], strict=True) if x is not None]
    difference = sum(((x - y) ** 2).sum() for x, y in pairs) ** 0.5
    return float(difference / sum((y**2).sum() for _, y in pairs) ** 0.5)


def _gradients(context: Context, policy: LoadedPolicy, ids: torch.Tensor) -> tuple[float, Gradients]:
    """The loss of one more backward pass, and the gradients after it."""
    loss = _loss(context, policy, ids)
    loss.backward()
    found = {}
    for name, layer in lora_layers(policy.model).items():
        adapter = layer.active_adapters[0]
        grads = (part[adapter].weight.grad for part in (layer.lora_A, layer.lora_B))
        found[name] = tuple(None if grad is None else grad.float().cpu() for grad in grads)
    return loss.item(), found  # type: ignore[return-value]


def _loss(context: Context, policy: LoadedPolicy, ids: torch.Tensor) -> torch.Tensor:
    """Of the training forward."""
    context.backend.for_training(policy)
    with torch.random.fork_rng():
        return policy.model(input_ids=ids, labels=ids).loss


def memory(context: Context) -> str:
    """For every dtype and quantization that is claimed, and by itself for what an adapter adds.

    On CUDA the allocator is asked, with a model that is large enough; elsewhere the policy's own tensors are counted.
    """
    from rlvr.testing.tiny import save_tiny

    on_cuda = torch.cuda.is_available() and context.device != "cpu"
    model = context.model
    if on_cuda and context.given_model is None:
        model = str(save_tiny(context.scratch / "large", dtype=torch.bfloat16, **_LARGE))
    ways = [{"dtype": dtype} for dtype in ("auto", *dtypes_to_compare(context))]
    ways += [{"dtype": "auto", "quantization": name} for name in quantized(context.capabilities)]
    return ", ".join(_memory(context, model=model, on_cuda=on_cuda, **way) for way in ways)


def _memory(context: Context, *, on_cuda: bool, **settings: Any) -> str:
    """Checks one way to load, and forgets the policy before the next one is loaded."""
    before = _allocated() if on_cuda else 0
    policy = context.policy(**settings)
    ask_cuda = on_cuda and storage_bytes(policy.model) > _WORTH_ASKING_CUDA

    def measure() -> tuple[int, int]:
        taken = _allocated() - before if ask_cuda else storage_bytes(policy.model)
        return context.backend.memory_in_use(policy), taken

    name = settings.get("quantization", settings["dtype"])
    stated, taken = measure()
    _expect_close(f"{name}: of the policy without an adapter", stated, taken)
    policy = context.backend.apply_lora(policy, LoraSettings(r=_RANK))
    with_adapter, taken_with_adapter = measure()
    _expect_close(f"{name}: of the adapter", with_adapter - stated, taken_with_adapter - taken)
    return f"{name}: {with_adapter:,} bytes of {taken_with_adapter:,}"


def _expect_close(what: str, stated: int, taken: int) -> None:
    expect(
        abs(stated - taken) <= MEMORY_TOLERANCE * taken,
        f"{what}, memory_in_use counts {stated:,} bytes, and the weights take {taken:,}; allowed: "
        f"{MEMORY_TOLERANCE:.0%} off",
    )


def _allocated() -> int:
    """Bytes that were asked of CUDA's allocator and not given back, without its rounding."""
    gc.collect()  # a policy of another check must not go while this one is measured
    return torch.cuda.memory_stats().get("requested_bytes.all.current", 0)


def storage_bytes(model: torch.nn.Module) -> int:
    """Bytes of the memory behind parameters and buffers, however many of them share it."""
    tensors = [plain for tensor in (*model.parameters(), *model.buffers()) for plain in _plain_tensors(tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a tensor subclass (torchao's quantized weights) is made of; itself for any other."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain_tensors(getattr(tensor, name))]
