"""What the conformance kit finds out about an inference engine beside the model, by a stand-in for vLLM."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
from faulty_backends import EngineInName
from sampled import sampled
from transformers import AutoModelForCausalLM

from rlvr.backends.protocol import ArgumentChange
from rlvr.testing.conformance import check_backend
from rlvr.testing.conformance.context import plain_name
from rlvr.testing.tiny import save_tiny


class StandIn:
    """In the place of TRL's `VLLMGeneration`: samples with a model of its own, which gets weights when TRL says so."""

    def __init__(self, model, accelerator, processing_class, *, temperature, **options):
        self.model, self._tokenizer, self._temperature = model, processing_class, temperature
        self._limit = options["max_completion_length"]
        self._dist = SimpleNamespace(is_fsdp=False, is_zero3=False)
        self._own = AutoModelForCausalLM.from_config(model.config).to(model.dtype).eval()

    def _iter_named_params(self):
        """As TRL's: of the model below the adapters."""
        for name, parameter in self.model.named_parameters():
            if "lora_" not in name:
                yield plain_name(name), parameter.data

    def sync_weights(self):
        self._own.load_state_dict(dict(self._iter_named_params()), strict=False)  # but for the tied head

    def generate(self, prompts, images, num_generations, profiler=None):
        completions, logprobs = sampled(
            self._own, self._tokenizer, prompts, limit=self._limit, temperature=self._temperature
        )
        return prompts, completions, [[[value] for value in values] for values in logprobs], None


class KeepsItsFirstWeights(StandIn):
    synced = False

    def sync_weights(self):
        if not self.synced:
            super().sync_weights()
        self.synced = True


class SamplesTheBase(StandIn):
    """Adapters do not reach it."""

    def sync_weights(self):
        self._own.load_state_dict(dict(StandIn._iter_named_params(self)), strict=False)


class WithAnEngine(EngineInName):
    """The trainer's, which it is told to use."""

    def training_arguments(self, policy):
        changes = super().training_arguments(policy)
        if policy.settings.fast_inference != "on":
            return changes
        return (*changes, ArgumentChange("use_vllm", True, "it is beside the model"))


class ComputesOtherwiseBeside(WithAnEngine):
    """The engine has changed a weight, for itself and for the model."""

    def load_policy(self, settings):
        policy = super().load_policy(settings)
        if settings.fast_inference == "on":
            policy.model.get_input_embeddings().weight.data.mul_(1.5)
        return policy


class DoublesGradientsBeside(WithAnEngine):
    def apply_lora(self, policy, lora):
        policy = super().apply_lora(policy, lora)
        if policy.settings.fast_inference == "on":
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: 2 * gradient)
        return policy


class TrainsTheBaseBeside(WithAnEngine):
    """A frozen weight is trained too, beside the engine alone."""

    def for_training(self, policy):
        super().for_training(policy)
        if policy.settings.fast_inference == "on":
            norm = policy.model.get_base_model().model.norm.weight
            norm.data.add_(0.01)


class SavesNothingNewBeside(WithAnEngine):
    """Of a policy with an engine, the adapter's files are those of a fresh one."""

    def save(self, policy, folder, export_format="adapter"):
        if policy.settings.fast_inference == "on":
            policy = replace(policy, model=copy.deepcopy(policy.model))
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.data.zero_()
        super().save(policy, folder, export_format)


def checked(monkeypatch, engine=StandIn, backend=WithAnEngine, model=None):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", engine)
    (result,) = check_backend(backend(), model=model, only=["setting-fast-inference"]).results
    return result


def test_an_engine_that_gets_the_weights_passes(monkeypatch):
    result = checked(monkeypatch)
    assert result.passed, result.message
    assert "; vllm " in result.message


FAULTS = {
    KeepsItsFirstWeights: "after a step that moved the policy by",
    SamplesTheBase: "before a step: the rollout engine 'vllm' does not sample from the policy",
    ComputesOtherwiseBeside: "log-probabilities differ from the float32 reference",
    DoublesGradientsBeside: "the adapter's gradients differ from the float32 reference by",
    TrainsTheBaseBeside: "training changed 1 frozen tensors, for example ['model.norm.weight']",
    SavesNothingNewBeside: "was loaded back as another policy",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_beside_an_engine_is_found(monkeypatch, fault):
    result = checked(monkeypatch, **{"engine" if issubclass(fault, StandIn) else "backend": fault})
    assert not result.passed
    assert FAULTS[fault] in result.message


def test_a_model_with_dropout_of_its_own_is_no_fault_beside_an_engine(monkeypatch, tmp_path):
    model = str(save_tiny(tmp_path / "model", "llama", attention_dropout=0.1, initializer_range=0.05))
    result = checked(monkeypatch, model=model)
    assert result.passed, result.message
    assert "of a tiny model, since the one given has dropout of its own" in result.message
