"""Optimizer steps through `EnhancedGRPOTrainer`, with the training arguments that the backend asks for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from rlvr.backends.protocol import LoadedPolicy, LoraSettings
from rlvr.errors import AdapterError
from rlvr.testing.conformance.checks.saving import PLAIN, Form, other_forms
from rlvr.testing.conformance.context import (
    CheckFailed,
    Context,
    expect,
    expect_fine_grained,
    plain_name,
    quantized,
)
from rlvr.testing.conformance.trainer import (
    LEARNING_RATES,
    STEPS,
    changed,
    checksum,
    copied,
    held,
    trained,
    trainer_for,
)

KL_OF_ITSELF = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Nats a token: what rounding makes of the KL divergence of a policy from itself, by the dtype it is computed in."""


def arguments(context: Context) -> str:
    import dataclasses

    import trl

    policy = context.policy(LoraSettings(r=4))
    known = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    changes = context.backend.training_arguments(policy)
    for change in changes:
        expect(change.name in known, f"training_arguments changes {change.name!r}, which GRPOConfig does not have")
        expect(change.reason, f"training_arguments changes {change.name} and gives no reason")
    return ", ".join(f"{change.name}={change.value}" for change in changes) or "changes nothing"


def adapter_only(context: Context) -> str:
    """With plain weights, with each other form of LoRA that is claimed, and with each quantization."""
    claims = context.capabilities
    said = [_adapter_only(context, PLAIN)]
    said += [_adapter_only(context, form, f"{form.name}: ") for form in other_forms(claims)]
    for name in quantized(claims):
        said.append(_adapter_only(context, PLAIN, f"{name}: ", dtype="auto", quantization=name))
    return "; ".join(said)


def _adapter_only(context: Context, form: Form, way: str = "", **settings: Any) -> str:
    """`way` begins what it says."""
    policy = context.policy(form.lora, **settings)
    adapter = {plain_name(name) for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    if form is not PLAIN and not any(form.part in name for name in adapter):
        return f"{way}the model has none"
    expect(adapter, f"{way}the policy has no trainable adapter")
    before = copied(held(policy))
    trainer = trainer_for(context, policy)
    now = held(policy)
    frozen = sorted(name for name in adapter & now.keys() if not now[name].requires_grad)
    expect(
        not frozen,
        f"{way}{len(frozen)} of {len(adapter)} tensors that apply_lora made trainable are frozen in training, for "
        f"example {frozen[:1]}",
    )
    trainer.train()
    made = trainer.state.global_step
    expect(made == STEPS, f"{way}{made} steps were made; {STEPS} were asked for")
    now = held(policy)
    gone = sorted(before.keys() - now.keys())
    expect(not gone, f"{way}after training {len(gone)} tensors are not in the model any more, for example {gone[:1]}")
    expect_fine_grained({name: now[name] for name in adapter if _is_factor(name)}, way)
    moved = changed(policy, before)
    base = sorted(name for name in moved if not (_is_factor(name) or form.part in name))
    expect(not base, f"{way}training changed {len(base)} tensors of the base model, for example {base[:1]}")
    still = sorted(adapter - moved)
    expect(not still, f"{way}{STEPS} steps left {len(still)} adapter tensors unchanged, for example {still[:1]}")
    return f"{way}{len(moved)} adapter tensors changed, factors in float32, {len(before) - len(moved)} others did not"


def reference(context: Context) -> str:
    """The KL of the first step is that of the policy from itself, also where the adapter was trained before."""
    from rlvr.trainers.canary import computed_in

    for learning_rate in LEARNING_RATES:
        trainer, note = _with_reference(context, learning_rate)
        trainer.train()
        divergence = [row["kl"] for row in trainer.state.log_history if "kl" in row]
        allowed = KL_OF_ITSELF.get(computed_in(trainer), KL_OF_ITSELF[torch.bfloat16])
        expect(
            len(divergence) == 3,
            f"the KL term was logged {len(divergence)} times in 3 steps with beta=0.1; the trainer's beta is "
            f"{trainer.args.beta:g}: do training_arguments change it?",
        )
        expect(
            abs(divergence[0]) <= allowed,
            f"at the first step the policy is {divergence[0]:.2g} nats a token from its reference, which is then not "
            f"the model as given; allowed: {allowed:g}",
        )
        if max(divergence[1:]) > allowed:
            return f"KL {', '.join(f'{value:.2g}' for value in divergence)}, {note}"
    raise CheckFailed(f"the reference moves with the policy: KL {divergence} over three steps")


def _with_reference(context: Context, learning_rate: float) -> tuple[Any, str]:
    """A trainer with beta > 0, and what it starts from."""
    model = context.model_without_dropout
    note = context.note_on(model)
    options: dict[str, Any] = {"beta": 0.1, "max_steps": 3, "learning_rate": learning_rate}
    try:
        policy = context.adapted(model=model)
        return trainer_for(context, policy, **options), f"from an adapter trained before{note}"
    except AdapterError as error:  # Unsloth's trainer takes the base model, so that only a fresh adapter will do
        policy = context.policy(LoraSettings(r=4), model=model)
        return trainer_for(context, policy, **options), f"from a fresh adapter; another is refused: {error}{note}"


def resumes(context: Context) -> str:
    """A run is taken up at its checkpoint and makes one step, which the first run has made without a break."""
    folder = context.folder()
    options: dict[str, Any] = {"folder": folder, "max_steps": STEPS + 1}
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": STEPS}
    first = context.policy(LoraSettings(r=4))
    whole = _Seen(first)
    trainer_for(context, first, callbacks=[whole], reward=whole.reward, **options, **saving).train()
    second = context.policy(LoraSettings(r=4))
    resumed = _Seen(second)
    trainer = trainer_for(context, second, callbacks=[resumed], reward=resumed.reward, **options)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
    start = min(resumed.weights, default=None)
    expect(start == STEPS, f"training went on at step {start}; the checkpoint is of step {STEPS}")
    left, found = whole.weights[STEPS], resumed.weights[STEPS]
    other = [name for name in left if not torch.equal(left[name], found.get(name, torch.empty(0)))]
    expect(not other, f"{len(other)} of {len(left)} trained tensors are not those of the checkpoint: {other[:1]}")
    expect(
        resumed.has_moments[STEPS] == whole.has_moments[STEPS],  # plain SGD has none
        "the optimizer started anew: its moments were not loaded",
    )
    expect(trainer.state.global_step == STEPS + 1, f"it stopped at step {trainer.state.global_step}")
    asked, meant = (sorted(set(seen.prompts.get(STEPS, []))) for seen in (resumed, whole))
    expect(asked == meant, f"after the checkpoint it rolls out {asked}; without a break it was {meant}")
    now = trained(second)
    expect(any(not torch.equal(left[name], now[name]) for name in left), "the step after resuming changed nothing")
    return f"{len(left)} tensors, optimizer, step and data are as they were left"


class _Seen(TrainerCallback):
    """What a run has at the beginning of each step, and the prompts that it then rolls out, by the step's number."""

    def __init__(self, policy: LoadedPolicy):
        self._policy = policy
        self._step = 0
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.has_moments: dict[int, bool] = {}
        self.prompts: dict[int, list[str]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, optimizer = state.global_step, kwargs.get("optimizer")
        self.weights[step] = trained(self._policy)
        self.has_moments[step] = bool(optimizer is not None and optimizer.state_dict()["state"])
        self._step = step

    def reward(self, trajectory: Any) -> float:
        self.prompts.setdefault(self._step, []).append(trajectory.prompt[-1]["content"])
        return checksum(trajectory)


def _is_factor(name: str) -> bool:
    """Or another tensor of LoRA's own, such as a magnitude."""
    return "lora_" in name
