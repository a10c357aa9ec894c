"""The conformance kit accuses no backend that is right."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from right_backends import BFloat16Only, PlainSGD, PlainSGDInHalf, ReadsFilesOfItsOwn, RefusesOwnCode, RoundsToFewBits

from rlvr.backends.hf.backend import HFBackend
from rlvr.testing.conformance import check_backend
from rlvr.testing.conformance import reference as references
from rlvr.testing.conformance.checks import settings
from rlvr.testing.conformance.context import LIVELY, CheckFailed
from rlvr.testing.tiny import save_tiny

QUANTIZED = (
    "setting-quantization",
    "lora-alpha",
    "gradients",
    "memory-in-use",
    "trains-adapter-only",
    "sampler-is-policy",
    "export-adapter",
    "export-merged-16bit",
    "export-merged-4bit",
)
RIGHT = {
    BFloat16Only: ("settings", "lora", "policy", "training", "sampling", "saving"),
    PlainSGD: ("training", "sampling"),
    PlainSGDInHalf: ("training", "sampling"),
    RefusesOwnCode: ("settings",),
    RoundsToFewBits: QUANTIZED,
}


@functools.cache
def report_on(backend):
    return check_backend(backend(), only=RIGHT[backend])


@pytest.mark.parametrize("backend", RIGHT, ids=lambda backend: backend.__name__)
def test_a_right_backend_passes(backend):
    assert report_on(backend).ok, str(report_on(backend))


def test_every_quantization_that_is_claimed_is_sampled_trained_and_saved():
    messages = {result.name: result.message for result in report_on(RoundsToFewBits).results}
    for name in ("4bit", "8bit"):
        assert f"{name}: 28 adapter tensors changed" in messages["trains-adapter-only"]
        assert f"{name} 4" in messages["lora-alpha"]
        assert f"{name} 100%" in messages["gradients"]
        assert f"{name}: grouped" in messages["sampler-is-policy"]
        assert f"on weights in {name} " in messages["export-adapter"]
        assert f"on weights in {name} " in messages["export-merged-16bit"]


def test_every_form_of_lora_that_is_claimed_is_trained():
    (result,) = check_backend(HFBackend(), only=["trains-adapter-only"]).results
    for said in ("rsLoRA: 28 adapter", "DoRA: 42 adapter", "bias='all': 34 adapter"):
        assert said in result.message


def test_a_model_without_biases_has_none_to_train(tmp_path):
    model = str(save_tiny(tmp_path / "model", "llama", **LIVELY))
    (result,) = check_backend(HFBackend(), model=model, only=["trains-adapter-only"]).results
    assert result.passed, result.message
    assert "bias='all': the model has none" in result.message


def test_a_model_with_dropout_of_its_own_is_no_fault(tmp_path):
    model = str(save_tiny(tmp_path / "model", "llama", attention_dropout=0.1, **LIVELY))
    report = check_backend(HFBackend(), model=model, only=["policy", "training", "sampling"])
    assert report.ok, str(report)
    messages = {result.name: result.message for result in report.results}
    for name in ("gradients", "reference-is-start"):
        assert "of a tiny model, since the one given has dropout of its own" in messages[name]
    assert "of a tiny model" not in messages["log-probabilities"]


def test_a_model_that_transformers_alone_cannot_read_is_no_fault(tmp_path):
    save_tiny(tmp_path / "model" / "inner", **LIVELY)
    report = check_backend(ReadsFilesOfItsOwn(), model=str(tmp_path / "model"), only=["settings", "policy"])
    assert report.ok, str(report)
    messages = {result.name: result.message for result in report.results}
    for name in ("tokenizer", "log-probabilities", "gradients"):
        assert "of a tiny model, since the one given cannot be loaded by transformers alone" in messages[name]


def test_a_failure_says_so_where_a_model_has_what_the_checks_cannot_judge(tmp_path):
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    model = str(save_tiny(tmp_path / "model", "qwen3_moe", **shape, **LIVELY))
    report = check_backend(HFBackend(), model=model, only=["lora-alpha", "lora-dora", "log-probabilities"])
    assert len(report.failures) == 3
    for result in report.failures:
        assert "cannot judge it on 4 others of this model, for example model.layers.0.mlp.experts." in result.message
        assert "Leave --model out" in result.message


def test_an_oracle_that_has_ended_says_nothing_about_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(references._Oracle, "_exchange", lambda self, line: "")
    with pytest.raises(RuntimeError, match="the process that computes references has ended"):
        references.is_readable(str(tmp_path))


@pytest.mark.parametrize(("asked", "found", "passes"), [("cuda:1", 1, True), ("cuda", 1, True), ("cuda:1", 0, False)])
def test_which_of_several_gpus_was_asked_for_is_looked_at(asked, found, passes):
    """With a stand-in for a policy: there may be no GPU here."""
    parameter = SimpleNamespace(device=torch.device("cuda", found))
    policy = SimpleNamespace(model=SimpleNamespace(parameters=lambda: [parameter]))
    context = SimpleNamespace(device=asked, policy=lambda device: policy, expect_refusal=lambda what, device: None)
    if passes:
        assert f"on {asked}" in settings.device(context)
    else:
        with pytest.raises(CheckFailed, match="device='cuda:1', and parameters are on cuda:0"):
            settings.device(context)
