"""Optimizer steps through `EnhancedGRPOTrainer`, with the training arguments that the backend asks for."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rlvr.backends.protocol import LoadedPolicy, LoraSettings
from rlvr.errors import AdapterError, SamplerDriftError
from rlvr.testing.conformance.context import CheckFailed, Context, expect, logits, plain_name

STEPS = 2
KL_OF_ITSELF = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Nats a token: what rounding makes of the KL divergence of a policy from itself, by the dtype it is computed in."""

_MOVED = 3  # times the sampler's allowed drift: by so much a step has to move the policy, for staleness to show

_COMPLETIONS = 64  # of 16 tokens at most: enough to tell a temperature of 0.7 from one of 0.8
_STANDARD_ERRORS = 5  # a right sampler is beyond once in a million


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
    policy = context.policy(LoraSettings(r=4))
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    adapters = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    trainer = trainer_for(context, policy)
    trainer.train()
    expect(trainer.state.global_step == STEPS, f"{trainer.state.global_step} steps were made; {STEPS} were asked for")
    now = dict(policy.model.named_parameters())
    changed = {name for name, tensor in before.items() if name in now and not torch.equal(tensor, now[name])}
    base = sorted(plain_name(name) for name in changed if not _is_adapters(name))
    expect(not base, f"training changed {len(base)} tensors of the base model, for example {base[:1]}")
    still = sorted(plain_name(name) for name in adapters - changed)
    expect(
        not still, f"{STEPS} steps left {len(still)} of the adapter's tensors as they were, for example {still[:1]}"
    )
    expect(adapters, "the policy has no trainable adapter")
    return f"{len(changed)} adapter tensors changed, {len(before) - len(changed)} others did not"


def sampler(context: Context) -> str:
    """Sampled log-probabilities against the training forward's, with transformers' generate and the engine chosen."""
    from rlvr.trainers.canary import bound_of

    measured = []
    for engine, temperature in (("generate", 0.7), ("auto", 1.0)):
        policy = context.adapted()
        trainer = trainer_for(
            context, policy, rollout_engine=engine, temperature=temperature, max_steps=1, learning_rate=0.05
        )
        off = _expect_drawn(context, policy, trainer, temperature)
        drifts = [_drift(context, policy, trainer, "before a step")]
        probe = _training_logprobs(trainer)
        trainer.train()
        moved = (_training_logprobs(trainer) - probe).abs().mean().item()
        bound = bound_of(trainer)
        expect(
            moved > _MOVED * bound,
            f"the step moved the policy by {moved:.2g} nats, too little to tell a stale sampler from the policy",
        )
        drifts.append(_drift(context, policy, trainer, f"after a step that moved the policy by {moved:.2g} nats"))
        measured.append(
            f"{trainer.engine.name} {drifts[0]:.1g} and {drifts[1]:.1g}, drawn within {abs(off):.1f} errors"
        )
    return f"mean difference in nats before and after: {'; '.join(measured)}"


def _expect_drawn(context: Context, policy: LoadedPolicy, trainer: Any, temperature: float) -> float:
    """Tokens are drawn from the policy at this temperature: they have the log-probabilities that it gives them.

    With p the policy's own distribution at a place, and x the token drawn there, log p(x) + H(p) has mean 0 and
    variance Σ p log² p − H², whatever was drawn before. The sum over places is nearly normal.

    Returns:
        By how many standard errors the sum is off.
    """
    from rlvr.rollout.engine import sample_all

    prompt = _prompt_ids(policy)[0]
    context.backend.for_inference(policy)
    turns = sample_all(trainer.engine, [prompt] * _COMPLETIONS, max_completion_tokens=16)
    drawn, meant, variances = [], [], []
    for turn in turns:
        row = torch.tensor([prompt + turn.token_ids], device=policy.model.device)
        values = (logits(context, policy, row)[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        mean = (values.exp() * values).sum(-1)
        drawn.append(values.gather(-1, torch.tensor(turn.token_ids)[:, None]).squeeze(-1))
        meant.append(mean)
        variances.append((values.exp() * values**2).sum(-1) - mean**2)
    context.backend.for_training(policy)
    found, expected = torch.cat(drawn), torch.cat(meant)
    off = ((found - expected).sum() / torch.cat(variances).sum() ** 0.5).item()
    expect(
        abs(off) <= _STANDARD_ERRORS,
        f"{trainer.engine.name} does not draw from the policy at temperature {temperature:g}: {len(found)} tokens "
        f"have a mean log-probability of {found.mean():.3f}, and should have {expected.mean():.3f}: {abs(off):.0f} "
        f"standard errors off; allowed: {_STANDARD_ERRORS}. Is the temperature, top_k or top_p another one?",
    )
    return off


def _drift(context: Context, policy: LoadedPolicy, trainer: Any, when: str) -> float:
    from rlvr.rollout.engine import sample_all
    from rlvr.trainers.canary import check_sampler, check_samples

    prompts = _prompt_ids(policy)
    context.backend.for_inference(policy)
    turns = sample_all(trainer.engine, prompts, max_completion_tokens=8)
    context.backend.for_training(policy)
    ids = [turn.token_ids for turn in turns]
    samples = (prompts, ids, [[1] * len(row) for row in ids])
    logprobs = [turn.logprobs for turn in turns if turn.logprobs is not None]
    try:
        found = [check_samples(trainer, *samples)]
        if logprobs:
            found.append(check_sampler(trainer, *samples, logprobs))
    except SamplerDriftError as error:
        raise CheckFailed(f"{when}: {error}") from error
    return max(drift.mean_difference for drift in found if drift is not None)


def _training_logprobs(trainer: Any) -> torch.Tensor:
    """What the training forward gives for fixed tokens."""
    prompts = [ids[:8] for ids in _prompt_ids_of(trainer.processing_class)]
    ids = torch.tensor(prompts, device=trainer.accelerator.device)
    with torch.no_grad():
        values, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 7)
    return values.float().cpu()


def reference(context: Context) -> str:
    """The KL of the first step is that of the policy from itself, also where the adapter was trained before."""
    from rlvr.trainers.canary import computed_in

    policy, note = context.adapted(), "from an adapter trained before"
    try:
        trainer = trainer_for(context, policy, beta=0.1, max_steps=3)
    except AdapterError as error:  # Unsloth's trainer takes the base model, so that only a fresh adapter will do
        policy, note = context.policy(LoraSettings(r=4)), f"from a fresh adapter; another is refused: {error}"
        trainer = trainer_for(context, policy, beta=0.1, max_steps=3)
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
        f"at the first step the policy is {divergence[0]:.2g} nats a token from its reference, which is then not the "
        f"model as given; allowed: {allowed:g}",
    )
    expect(max(divergence[1:]) > allowed, f"the reference moves with the policy: KL {divergence} over three steps")
    return f"KL {', '.join(f'{value:.2g}' for value in divergence)}, {note}"


def resumes(context: Context) -> str:
    folder = context.folder()
    first = context.policy(LoraSettings(r=4))
    trainer_for(context, first, folder=folder, save_strategy="steps", save_steps=STEPS).train()
    left = _trained(first)
    second = context.policy(LoraSettings(r=4))
    seen = _AtTheStart(second)
    trainer = trainer_for(context, second, folder=folder, max_steps=STEPS + 1, callbacks=[seen])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
    expect(seen.step == STEPS, f"training went on at step {seen.step}; the checkpoint is of step {STEPS}")
    other = [name for name in left if not torch.equal(left[name], seen.weights.get(name, torch.empty(0)))]
    expect(not other, f"{len(other)} of {len(left)} trained tensors are not those of the checkpoint: {other[:1]}")
    expect(seen.has_moments, "the optimizer started anew: its moments were not loaded")
    expect(trainer.state.global_step == STEPS + 1, f"it stopped at step {trainer.state.global_step}")
    now = _trained(second)
    expect(any(not torch.equal(left[name], now[name]) for name in left), "the step after resuming changed nothing")
    return f"{len(left)} tensors, optimizer and step are as they were left"


class _AtTheStart(TrainerCallback):
    """What a resumed run begins with."""

    def __init__(self, policy: LoadedPolicy):
        self._policy = policy
        self.step = -1
        self.weights: dict[str, torch.Tensor] = {}
        self.has_moments = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step < 0:
            self.step, self.weights = state.global_step, _trained(self._policy)
            optimizer = kwargs.get("optimizer")
            self.has_moments = bool(optimizer is not None and optimizer.state_dict()["state"])


def trainer_for(
    context: Context,
    policy: LoadedPolicy,
    *,
    folder: Path | None = None,
    callbacks: Sequence[Any] = (),
    rollout_engine: Any = "auto",
    **overrides: Any,
) -> Any:
    """A trainer on a small environment whose rewards differ inside every group."""
    import trl
    from transformers import PrinterCallback

    from rlvr.trainers import EnhancedGRPOTrainer

    context.backend.for_training(policy)
    on_cpu = policy.model.device.type == "cpu"
    values = {
        "output_dir": str(folder or context.folder()),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "beta": 0.0,
        "temperature": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "fp16": False,
        "use_cpu": on_cpu,
        "gradient_checkpointing": False,
        "seed": 0,
        **overrides,
        **{change.name: change.value for change in context.backend.training_arguments(policy)},
    }
    trainer = EnhancedGRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        env=_environment(),
        args=trl.GRPOConfig(**values),
        callbacks=list(callbacks),
        rollout_engine=rollout_engine,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def checksum(trajectory: Any) -> float:
    """A reward that is not the same for two different completions."""
    return zlib.crc32(trajectory.text.encode()) % 8 / 7


def _environment() -> Any:
    from rlvr import Environment, Rubric

    rows = [{"question": f"Say something about the number {number}."} for number in range(16)]
    return Environment(name="conformance", train_dataset=rows, rubric=Rubric(checksum))


def _trained(policy: LoadedPolicy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}


def _is_adapters(name: str) -> bool:
    return "lora_" in name


def _prompt_ids(policy: LoadedPolicy) -> list[list[int]]:
    return _prompt_ids_of(policy.tokenizer)


def _prompt_ids_of(tokenizer: Any) -> list[list[int]]:
    return tokenizer(["What is two plus three?", "Say something about the number seven, then stop."])["input_ids"]
