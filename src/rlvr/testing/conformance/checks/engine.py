"""An inference engine beside the model, where one is claimed: rollouts are drawn from the policy that is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlvr.backends.protocol import LoadedPolicy, LoraSettings
from rlvr.testing.conformance.checks.plugin import answer_of
from rlvr.testing.conformance.checks.policy import (
    LOGPROB_TOLERANCE,
    dtypes_to_compare,
    expect_gradients,
    expect_logprobs,
)
from rlvr.testing.conformance.checks.sampling import follows
from rlvr.testing.conformance.checks.settings import claimed
from rlvr.testing.conformance.context import Context, expect, first_line, logits, shake, token_logprobs, tokens
from rlvr.testing.conformance.trainer import changed, copied, held

_SHAPE: dict[str, Any] = {
    "hidden_size": 256, "heads": 4, "kv_heads": 2, "intermediate_size": 512, "initializer_range": 0.05,
}  # fmt: skip
"""Heads of 64 numbers, for which engines have kernels, and weights that two programs in half precision agree on."""


_BY_DEFAULT = """
import json, os, rlvr
error = None
try:
    rlvr.load_policy({model!r}, backend={name!r}, lora=None, device={device!r}, gpu_memory_utilization={share})
except Exception as raised:
    error = f"{{type(raised).__name__}}: {{raised}}"
print(json.dumps(error), flush=True)
os._exit(0)  # an engine may print while it ends
"""

_SHARE = 0.3  # of a GPU's memory, which others may use too


def fast_inference(context: Context) -> str:
    """With `gpu_memory_utilization`, which has a meaning only beside an inference engine."""
    auto = _by_default(context)
    policy = context.policy(fast_inference="off", gpu_memory_utilization=0.5)
    expect(not hasattr(policy.model, "vllm_engine"), "fast_inference='off', and the model came with an engine")
    if not context.capabilities.fast_inference:
        context.expect_refusal("fast_inference='on', which is not claimed,", fast_inference="on")
        return f"refused, {auto}; without it gpu_memory_utilization has nothing to limit"
    return f"off and on are honoured, {auto}; beside the engine {_beside(context)}"


def _by_default(context: Context) -> str:
    """All settings but the model and the device are left at their defaults, `fast_inference="auto"` among them.

    That may start an engine where one is claimed, with no more memory than here, and a process has one at most: there
    it is done in another.
    """
    from rlvr.backends import load_policy

    model, error = _engine_model(context), None
    if not context.capabilities.fast_inference:
        try:
            load_policy(model, backend=context.backend, lora=None, device=context.device)
        except Exception as raised:
            error = f"{type(raised).__name__}: {first_line(raised)}"
    elif context.name is None:
        return "'auto' is not loaded, since this process can have one engine"
    else:
        program = _BY_DEFAULT.format(model=model, name=context.name, device=context.device, share=_SHARE)
        error = answer_of(context, program)
    expect(
        error is None, f"with all settings left at their defaults, such as fast_inference='auto', it raised {error}"
    )
    return "'auto' loads"


def _engine_model(context: Context) -> str:
    from rlvr.testing.tiny import save_tiny

    return str(save_tiny(context.scratch / "for-engine", **_SHAPE))


def _beside(context: Context) -> str:
    """All of it with one policy: a second one, with an engine of its own, may not be had in a process."""
    given = context.given_model is not None
    model = context.model_without_dropout if given else _engine_model(context)
    dtype = "bfloat16" if "bfloat16" in context.capabilities.dtypes else dtypes_to_compare(context)[0]
    policy = claimed(context, model=model, dtype=dtype, fast_inference="on", gpu_memory_utilization=_SHARE)
    policy = context.backend.apply_lora(policy, LoraSettings(r=8, alpha=8))
    shake(policy.model)
    expect(
        context.changes(policy).get("use_vllm"),
        "fast_inference='on' is claimed, and training_arguments do not set use_vllm: whatever engine the model came "
        "with, rollouts are sampled without it",
    )
    logprobs = expect_logprobs(context, policy, model, dtype, f"fast_inference='on', {dtype}")
    gradients = expect_gradients(context, policy, model, dtype)
    policy.model.zero_grad(set_to_none=True)
    before = copied({name: tensor for name, tensor in held(policy).items() if not tensor.requires_grad})
    followed = follows(context, lambda: policy, engine="auto", temperature=1.0)
    base = sorted(changed(policy, before))
    expect(not base, f"fast_inference='on': training changed {len(base)} frozen tensors, for example {base[:1]}")
    return (
        f"log-probabilities {logprobs:.1g} nats off, gradients {gradients:.1g} of their norm; {followed}; saved "
        f"{_expect_saved(context, policy, dtype):.1g} nats off{context.note_on(model) if given else ''}"
    )


def _expect_saved(context: Context, policy: LoadedPolicy, dtype: str) -> float:
    """Loaded back without an engine it is the same policy; the mean difference in nats."""
    folder, ids = context.folder(), tokens(policy)
    context.backend.save(policy, folder)
    loaded = context.backend.load_saved(folder, replace(policy.settings, fast_inference="off"))
    found, wanted = (token_logprobs(logits(context, which, ids), ids) for which in (loaded, policy))
    error, allowed = (found - wanted).abs().mean().item(), LOGPROB_TOLERANCE[dtype]
    expect(
        error <= allowed,
        f"an adapter trained with fast_inference='on' was loaded back as another policy, {error:.2g} nats off on "
        f"average; allowed: {allowed:g}",
    )
    return error
