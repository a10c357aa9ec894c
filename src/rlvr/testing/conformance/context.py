"""What a check works with: the backend, a model to load, and the ways to say what is wrong."""

from __future__ import annotations

import pickle
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr.backends.protocol import LoraSettings, ModelSettings
from rlvr.errors import RlvrError

if TYPE_CHECKING:
    import torch

    from rlvr.backends.protocol import Capabilities, LoadedPolicy, ModelBackend

LIVELY: dict[str, Any] = {
    "initializer_range": 0.2
}  # logits that differ: from 0.02, PEFT's errors would hide in a flat distribution


class CheckFailed(AssertionError):
    """The backend does not do what the check is about; the message is the finding."""


def expect(condition: object, finding: str) -> None:
    if not condition:
        raise CheckFailed(finding)


@dataclass
class Context:
    """One backend under test. `name` is its entry point's, None for a backend given as an object."""

    name: str | None
    backend: ModelBackend
    given_model: str | None
    device: str | None
    scratch: Path
    _tiny: dict[int, Path] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return self.given_model or str(self.tiny())

    def tiny(self, seed: int = 0) -> Path:
        """A tiny model's folder, made once."""
        from rlvr.testing.tiny import save_tiny

        if seed not in self._tiny:
            self._tiny[seed] = save_tiny(self.scratch / f"tiny-{seed}", seed=seed, **LIVELY)
        return self._tiny[seed]

    @cached_property
    def readable_model(self) -> str:
        """The model, or a tiny one where the backend loads it and transformers alone cannot, to compare with."""
        from rlvr.testing.conformance.reference import is_readable

        if self.given_model is None or is_readable(self.model):
            return self.model
        self.policy()  # raises for one that is not there
        return str(self.tiny())

    @cached_property
    def model_without_dropout(self) -> str:
        """The readable model, or a tiny one if that has dropout of its own, with which training is never the same."""
        model = self.readable_model
        return str(self.tiny()) if self.given_model is not None and _has_dropout(self, model) else model

    def note_on(self, model: str) -> str:
        """The end of a measurement, which says so if it is of another model than was given."""
        if model == self.model:
            return ""
        readable = self.readable_model == self.model
        why = "has dropout of its own" if readable else "cannot be loaded by transformers alone"
        return f"; of a tiny model, since the one given {why}"

    @cached_property
    def unjudged(self) -> str:
        """The end of a finding: what of the model given the checks cannot judge. Empty if that is nothing."""
        other: list[str] = []
        if self.given_model is not None and self.backend is not None:
            with suppress(Exception):  # it may fail to load, which is the finding then
                layers = lora_layers(self.policy(LoraSettings(r=4)).model)
                other = [name for name, layer in layers.items() if not hasattr(layer.get_base_layer(), "in_features")]
        if not other:
            return ""
        return (
            f" (These checks know LoRA on linear layers alone, and cannot judge it on {len(other)} others of this "
            f"model, for example {other[0]}. Leave --model out to check the backend.)"
        )

    @cached_property
    def capabilities(self) -> Capabilities:
        return self.backend.capabilities()

    def policy(self, lora: LoraSettings | None = None, **settings: Any) -> LoadedPolicy:
        """A policy the way users load one; float32 with `max_seq_length` 256 and no engine beside it, unless the
        settings say otherwise."""
        from rlvr.backends import load_policy

        return load_policy(**self._settings(settings), backend=self.backend, lora=lora)

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "max_seq_length": 256, "dtype": "float32", "device": self.device, "fast_inference": "off",
        }  # fmt: skip
        if "float32" not in self.capabilities.dtypes:
            defaults["dtype"] = "auto"
        return {**defaults, **given, "model": str(given.get("model", self.model))}

    def adapted(self, lora: LoraSettings | None = None, **settings: Any) -> LoadedPolicy:
        """A policy whose adapter does something, as after training."""
        policy = self.policy(lora or LoraSettings(r=4, alpha=8), **settings)
        shake(policy.model)
        return policy

    def changes(self, policy: LoadedPolicy) -> dict[str, Any]:
        """What the backend changes of the training arguments, by name."""
        return {change.name: change.value for change in self.backend.training_arguments(policy)}

    def expect_refusal(self, what: str, lora: LoraSettings | None = None, **settings: Any) -> None:
        """The backend itself must raise an error of ours, as not every caller looks at its claims before; any other
        error, or none, is a finding."""
        with refusal(what):
            policy = self.backend.load_policy(ModelSettings(**self._settings(settings)))
            if lora is not None:
                self.backend.apply_lora(policy, lora)

    def folder(self) -> Path:
        """A new, empty folder."""
        return Path(tempfile.mkdtemp(dir=self.scratch))


@contextmanager
def refusal(what: str) -> Iterator[None]:
    """The block must raise an `RlvrError`: that is how a user learns what cannot be had."""
    try:
        yield
    except RlvrError:
        return
    except Exception as error:
        raise CheckFailed(
            f"{what} raised {type(error).__name__} ({first_line(error)}); it must be refused with an RlvrError that "
            "names the setting."
        ) from error
    raise CheckFailed(f"{what} was accepted in silence; it must be refused with an RlvrError that names the setting.")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def expect_fine_grained(adapters: Mapping[str, torch.Tensor], what: str) -> None:
    """Adapter tensors, by name, are in float32. `what` begins the finding."""
    import torch

    coarse = sorted(name for name, tensor in adapters.items() if tensor.dtype != torch.float32)
    expect(
        not coarse,
        f"{what}{len(coarse)} of {len(adapters)} adapter tensors are not in float32, for example {coarse[:1]}: "
        "in half precision small updates are rounded away",
    )


def shake(
    model: torch.nn.Module, scale: float = 0.05, seed: int = 1, where: Callable[[str], bool] = lambda name: True
) -> None:
    """Moves every trainable parameter, or those of such names, by noise: so that an adapter stops being neutral."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and where(name):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((scale * noise).to(parameter.device, parameter.dtype))


def random_states() -> dict[str, bytes]:
    """The global random states, by whose they are."""
    import numpy
    import torch

    return {
        "Python": pickle.dumps(random.getstate()),
        "NumPy": pickle.dumps(numpy.random.get_state()),
        "torch": torch.random.get_rng_state().numpy().tobytes(),
    }


def expect_random_states(before: dict[str, bytes], what: str) -> None:
    now = random_states()
    changed = [name for name, state in before.items() if now[name] != state]
    expect(not changed, f"{what} changes the global random state of {', '.join(changed)}")


def quantized(claims: Capabilities) -> list[str]:
    """The quantizations that are claimed."""
    return sorted(claims.quantizations - {"none"})


def dtype_name(policy: LoadedPolicy) -> str:
    """What the policy's unquantized weights are in."""
    return str(policy.model.get_input_embeddings().weight.dtype).removeprefix("torch.")


def tokens(policy: LoadedPolicy) -> torch.Tensor:
    """A few fixed texts as token ids, (B=3, T=24), on the policy's device."""
    import torch

    texts = (
        "What is seventeen plus twenty-five? Think first, then give the number alone.",
        "Name the capital of the country whose northernmost city is Hammerfest, please.",
        "def area(radius): return 3.14159 * radius ** 2  # of a circle, in square metres",
    )
    ids = policy.tokenizer(list(texts))["input_ids"]
    length = min(24, *map(len, ids))
    return torch.tensor([row[:length] for row in ids], device=policy.model.device)


def logits(context: Context, policy: LoadedPolicy, ids: torch.Tensor | None = None) -> torch.Tensor:
    """(B, T, V) in float32 on the CPU, from the model in inference mode."""
    import torch

    context.backend.for_inference(policy)
    with torch.no_grad():
        return policy.model(tokens(policy) if ids is None else ids).logits.float().cpu()


def _has_dropout(context: Context, model: str) -> bool:
    """Whether two forward passes in training differ by more than rounding."""
    import torch

    policy = context.policy(model=model)
    context.backend.for_training(policy)
    with torch.no_grad(), torch.random.fork_rng():
        one, other = (policy.model(tokens(policy)).logits for _ in range(2))
    return not torch.allclose(one, other, atol=1e-2)


def token_logprobs(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in nats, (B, T-1), of the tokens after the first."""
    return values[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None].cpu()).squeeze(-1)


def lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers that carry a LoRA, by the name that the layer has in the model without it."""
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def plain_name(name: str) -> str:
    """A parameter's or module's name without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace("base_layer.", "")


def factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) of a layer's active adapter, in float32 on the CPU."""
    adapter = layer.active_adapters[0]
    a, b = (part[adapter].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
    return a, b
