"""What a child measures so that two backends can be held against each other: their starting policies on the first
training prompts, the gradients of those prompts, and the first update.

Of each trained tensor a few elements are kept, always those at the same places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rlvr.backends.protocol import LoadedPolicy, ModelBackend
    from rlvr.environments.base import Environment

PROMPTS = 8
LAST_TOKENS = 128  # of a prompt, in the backward pass, which is not to decide the peak of memory
ELEMENTS = 64  # of each trained tensor, about


def prompt_ids(environment: Environment, policy: LoadedPolicy, max_length: int) -> list[list[int]]:
    from rlvr.rollout.chat import ChatRenderer

    renderer = ChatRenderer(policy.tokenizer, tools=environment.tools)
    dataset = environment.train_dataset
    examples = [dataset[index] for index in range(min(PROMPTS, len(dataset)))]
    return [renderer.prompt_ids(environment.messages(example))[:max_length] for example in examples]


def logprobs(backend: ModelBackend, policy: LoadedPolicy, prompts: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of the tokens after the first, in nats, a row at a time: nothing is padded."""
    import torch

    backend.for_inference(policy)
    rows = []
    with torch.no_grad():
        for row in prompts:
            ids = torch.tensor([row], device=policy.model.device)
            found = policy.model(ids).logits[0, :-1].float().log_softmax(-1)
            rows.append(found.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist())
    return rows


def gradient(backend: ModelBackend, policy: LoadedPolicy, prompts: list[list[int]]) -> dict[str, list[float]]:
    """Of the model's own loss on the ends of the prompts. Leaves the policy in training mode, without gradients."""
    import torch

    backend.for_training(policy)
    model: Any = policy.model
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        for row in prompts:
            ids = torch.tensor([row[-LAST_TOKENS:]], device=model.device)
            model(input_ids=ids, labels=ids).loss.backward()
    found = {
        name: _elements(weight.grad if weight.grad is not None else torch.zeros_like(weight))
        for name, weight in _trained(model).items()
    }
    model.zero_grad(set_to_none=True)
    return found


def first_step(policy: LoadedPolicy) -> Any:
    """A trainer callback that keeps by how much the first optimizer step changed the trained tensors, in `update`, and
    whether the model checkpointed gradients in it, in `checkpoints`."""
    from transformers import TrainerCallback

    def values() -> dict[str, list[float]]:
        return {name: _elements(weight) for name, weight in _trained(policy.model).items()}

    class FirstStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                self._before = values()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.checkpoints = any(getattr(m, "gradient_checkpointing", False) for m in policy.model.modules())
                self.update = {
                    name: [new - old for new, old in zip(after, self._before[name], strict=True)]
                    for name, after in values().items()
                }

    return FirstStep()


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _elements(tensor: torch.Tensor) -> list[float]:
    """At equal distances that are odd, so that they are not all of one column."""
    flat = tensor.detach().flatten()
    return flat[:: flat.numel() // ELEMENTS | 1].float().tolist()
