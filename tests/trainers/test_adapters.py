"""PEFT detection: what each form of a model is taken for, what is refused and whether the fix it names works."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import peft_forms as forms
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tests_support import grpo_config

from rlvr.errors import AdapterError
from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer
from rlvr.trainers.adapters import (
    describe,
    inspect_adapters,
    prepare_policy,
    require_fresh_adapter_for_base_reference,
)

pytestmark = pytest.mark.both


def make_trainer(tmp_path, tokenizer, model, *, peft_config=None, **arguments):
    return EnhancedGRPOTrainer(
        model=model,
        reward_funcs=forms.completions_by_length,
        args=grpo_config(tmp_path, max_steps=1, **arguments),
        train_dataset=forms.PROMPTS,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def unmoved(model, before):
    """Names of the tensors of `before` that are bit for bit the same in `model`."""
    return [name for name, tensor in before.items() if torch.equal(model.get_parameter(name), tensor)]


# --- what is read from a model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "kind", "adapters", "active"),
    [
        ("full", "none", (), ()),
        ("hand-written LoRA", "none", (), ()),
        ("merged and unloaded, then unfrozen", "none", (), ()),
        ("PeftModel", "peft", ("default",), ("default",)),
        ("PeftModel, other name", "peft", ("mine",), ("mine",)),
        ("PeftModel, two adapters, one active", "peft", ("first", "second"), ("second",)),
        ("PeftModel, two active", "peft", ("first", "second"), ("first", "second")),
        ("DoRA", "peft", ("default",), ("default",)),
        ("IA3", "peft", ("default",), ("default",)),
        ("modules_to_save", "peft", ("default",), ("default",)),
        ("trainable tokens", "peft", ("default",), ("default",)),
        ("add_adapter", "transformers", ("default",), ("default",)),
        ("add_adapter, other name", "transformers", ("mine",), ("mine",)),
        ("injected", "injected", ("default",), ("default",)),
        ("the model inside a PeftMixedModel", "injected", ("default",), ("default",)),
        ("prompt tuning", "prompt-learning", ("default",), ("default",)),
        ("p-tuning", "prompt-learning", ("default",), ("default",)),
    ],
)
def test_form_names_and_activity(form, kind, adapters, active):
    model = forms.TRAINS[form]()
    state = inspect_adapters(model)
    assert (state.kind, state.adapters, state.active) == (kind, adapters, active)
    assert set(state.configs) == set(adapters)
    assert state.trainable == sum(tensor.numel() for tensor in forms.trainable(model).values())
    assert state.total == sum(parameter.numel() for parameter in model.parameters())
    assert state.trained_in_vain == 0
    assert not any([state.merged, state.disabled, state.nested, state.unsloth, state.head_adapted])


def test_parameters_outside_adapters_are_named():
    assert inspect_adapters(forms.wrapped()).outside == ()
    assert inspect_adapters(forms.wrapped(modules_to_save=["lm_head"])).outside == ()
    assert inspect_adapters(forms.wrapped(trainable_token_indices=[1])).outside == ()
    outside = inspect_adapters(forms.partly_unfrozen()).outside
    assert {name.removeprefix("base_model.model.") for name in outside} == {
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize(
    ("form", "adapted"),
    [("PeftModel", False), ("LoRA on embeddings", True), ("modules_to_save", True), ("trainable tokens", True)],
)
def test_adapted_embeddings(form, adapted):
    assert inspect_adapters(forms.TRAINS[form]()).embeddings_adapted is adapted


def test_state_of_merged_disabled_nested_and_mixed_models():
    assert inspect_adapters(forms.merged()).merged == ("mine",)
    assert inspect_adapters(forms.disabled()).disabled
    assert inspect_adapters(forms.nested()).nested
    assert inspect_adapters(forms.mixed()).kind == "mixed"
    inactive = inspect_adapters(forms.inactive())
    assert inactive.trainable == inactive.trained_in_vain == 896  # 2 layers × 4 × ((32 + 32) + (32 + 16))


def test_a_head_whose_weight_is_parametrized_is_not_an_adapted_head():
    model = tiny_model()
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    assert not inspect_adapters(model).head_adapted


def test_one_line_for_the_log():
    assert describe(inspect_adapters(tiny_model())) == "no adapter; 35,296 of 35,296 parameters trainable (100.00%)"
    assert describe(inspect_adapters(forms.two_adapters("second"))) == (
        "peft adapters: 'first' (LORA, r=4, alpha=8), not active, 'second' (LORA, r=2, alpha=8); "
        "448 of 36,640 parameters trainable (1.22%)"
    )
    assert "; merged: mine; " in describe(inspect_adapters(forms.merged()))
    assert "; disabled; " in describe(inspect_adapters(forms.disabled()))
    assert "; 4 trainable tensors outside adapters; " in describe(inspect_adapters(forms.partly_unfrozen()))


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("form", forms.REFUSED)
def test_refused_at_construction_with_the_fix(tmp_path, tokenizer, form, with_config):
    build, said, _ = forms.REFUSED[form]
    model = build()
    config = forms.lora() if with_config and inspect_adapters(model).kind != "none" else None
    with pytest.raises(AdapterError) as error:
        make_trainer(tmp_path, tokenizer, model, peft_config=config, gradient_checkpointing=True, beta=0.1)
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize("form", [name for name, (_, _, fix) in forms.REFUSED.items() if fix])
def test_the_fix_that_is_named_works(tmp_path, tokenizer, form):
    build, _, fix = forms.REFUSED[form]
    model = build()
    model = forms.perturbed(fix(model) or model)
    before = forms.trainable(model)
    make_trainer(tmp_path, tokenizer, model, beta=0.1).train()
    assert before
    assert unmoved(model, before) == []


@pytest.mark.parametrize(
    ("load", "fix"),
    [
        (forms.loaded, "PeftModel.from_pretrained(..., is_trainable=True)"),
        (forms.loaded_native, "model.load_adapter(..., is_trainable=True)"),
    ],
)
def test_an_adapter_loaded_for_inference_is_refused(tmp_path, tokenizer, load, fix):
    model = load(forms.saved_adapter(tmp_path / "adapter"), is_trainable=False)
    with pytest.raises(AdapterError, match="loaded for inference") as error:
        make_trainer(tmp_path, tokenizer, model)
    assert fix in str(error.value)
    model.set_adapter("default")  # the other fix
    make_trainer(tmp_path, tokenizer, model).train()


def test_prefix_tuning_trains_without_gradient_checkpointing(tmp_path, tokenizer):
    model = forms.perturbed(forms.virtual_tokens(PrefixTuningConfig))
    before = forms.trainable(model)
    make_trainer(tmp_path, tokenizer, model, beta=0.1).train()
    assert unmoved(model, before) == []
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(AdapterError, match="gradient_checkpointing=False"):
        make_trainer(tmp_path, tokenizer, tiny_model(), peft_config=config, gradient_checkpointing=True)


def test_unmerging_a_transformers_adapter_layer_by_layer_works():
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = forms.merged_native()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.unmerge()
    assert prepare_policy(model).state.kind == "transformers"


# --- peft_config -------------------------------------------------------------------------------------------


def test_a_plain_model_with_a_config_is_wrapped_once(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, tiny_model(), peft_config=forms.lora(), beta=0.1)
    assert isinstance(trainer.model, PeftModel)
    state = inspect_adapters(trainer.model)
    assert (state.adapters, state.nested) == (("default",), False)
    before = forms.trainable(trainer.model)
    trainer.train()
    assert {name.split(".")[-3] for name in before} == {"lora_A", "lora_B"}
    assert unmoved(trainer.model, before) == [name for name in before if "lora_A" in name]  # B = 0: no gradient yet


@pytest.mark.parametrize("config", [None, forms.lora()])
def test_a_model_given_by_name(tmp_path, tokenizer, model_folder, config):
    trainer = make_trainer(tmp_path, tokenizer, str(model_folder), peft_config=copy.copy(config), beta=0.1)
    assert isinstance(trainer.model, PeftModel) is (config is not None)
    before = forms.trainable(trainer.model)
    trainer.train()
    assert unmoved(trainer.model, before) == [name for name in before if "lora_A" in name]  # B = 0: no gradient yet


@pytest.mark.parametrize("form", [name for name in forms.TRAINS if name not in forms.NOT_WRAPPED])
def test_a_config_for_a_model_with_adapters_is_dropped_with_one_line(tmp_path, tokenizer, form, caplog):
    model = forms.perturbed(forms.TRAINS[form]())
    before, state = forms.trainable(model), inspect_adapters(model)
    with caplog.at_level(logging.INFO, logger="rlvr"):
        trainer = make_trainer(tmp_path, tokenizer, model, peft_config=forms.lora(r=64))
    assert [record.getMessage().startswith("peft_config dropped") for record in caplog.records].count(True) == 1
    assert trainer.model is model
    assert inspect_adapters(model) == state
    after = forms.trainable(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # not reset


def dropped_line(model, config):
    lines = []
    assert prepare_policy(model, config, log=lines.append).peft_config is None
    (line,) = lines
    return line


def test_the_line_names_each_difference():
    line = dropped_line(
        forms.wrapped(),
        forms.lora(r=8, lora_dropout=0.1, target_modules=["q_proj"], use_rslora=True, modules_to_save=["lm_head"]),
    )
    assert line == (
        "peft_config dropped: the model already has adapter 'default' (LORA, r=4, alpha=8); it differs in "
        "r (8 given, 4 applied); target_modules ({q_proj} given, {q_proj, v_proj} applied); "
        "lora_dropout (0.1 given, 0.0 applied); use_rslora (True given, False applied); "
        "modules_to_save ({lm_head} given, None applied)."
    )


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("applied", "given"),
    [
        (["q_proj", "v_proj"], ["v_proj", "q_proj"]),
        (["q_proj", "v_proj"], None),  # PEFT's default for Qwen2
        (["q_proj", "v_proj"], r".*\.(q|v)_proj"),
        (ALL_LINEAR, "all-linear"),
        ("all-linear", ALL_LINEAR),
        ("all-linear", "all-linear"),
    ],
)
@pytest.mark.parametrize("build", [forms.wrapped, forms.native, forms.injected])
def test_the_same_layers_said_differently_are_no_difference(build, applied, given):
    line = dropped_line(build(target_modules=applied), forms.lora(target_modules=given))
    assert line.endswith("with the same settings.")


def test_all_linear_differs_from_some_layers():
    line = dropped_line(forms.wrapped(target_modules=ATTENTION), forms.lora(target_modules="all-linear"))
    assert "'all-linear' given, {k_proj, o_proj, q_proj, v_proj} applied" in line


def test_the_config_is_compared_with_the_active_adapter():
    line = dropped_line(forms.two_adapters("second"), forms.lora(r=2))
    assert "adapter 'second'" in line
    assert line.endswith("with the same settings.")
    assert "peft_type (LORA given, IA3 applied)" in dropped_line(forms.ia3(), forms.lora()).replace("'", "")


# --- gradient checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["injected", "add_adapter", "hand-written LoRA", "unfrozen layer", "PeftModel"])
def test_gradients_flow_through_checkpointing(tmp_path, tokenizer, form, reentrant):
    model = forms.perturbed(forms.TRAINS[form]())
    before = forms.trainable(model)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    trainer.train()
    assert unmoved(model, before) == []


def test_preparing_twice_adds_no_second_hook():
    model = forms.injected()
    prepare_policy(model)
    prepare_policy(model)
    assert len(model.get_input_embeddings()._forward_hooks) == 1


# --- a fresh adapter, for trainers whose reference is the base model ---------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        tiny_model,
        forms.wrapped,
        lambda: forms.wrapped(use_dora=True),
        lambda: forms.wrapped(target_modules=["embed_tokens", "q_proj"]),
        lambda: forms.wrapped(modules_to_save=["lm_head"]),
        forms.native,
        forms.injected,
    ],
)
def test_a_fresh_adapter_passes(build):
    require_fresh_adapter_for_base_reference(build())


def set_parameters(model, part, value):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(value)
    return model


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: set_parameters(forms.wrapped(), "lora_B", 1e-6), "neither A nor B is zero"),
        (
            lambda: set_parameters(forms.wrapped(target_modules=["embed_tokens"]), "lora_embedding_A", 1e-6),
            "neither A nor B is zero",
        ),
        (lambda: set_parameters(forms.wrapped(use_dora=True), "magnitude", 0.1), "DoRA magnitudes"),
        (
            lambda: set_parameters(forms.wrapped(modules_to_save=["lm_head"]), "modules_to_save", 1e-3),
            "modules_to_save of adapter 'default' differs",
        ),
        (lambda: forms.wrapped(init_lora_weights="pissa"), "neither A nor B is zero"),
        (forms.partly_unfrozen, "the base itself is trained"),
        (forms.ia3, "is not LoRA"),
        (forms.TRAINS["prompt tuning"], "never neutral"),
    ],
)
def test_an_adapter_that_is_not_fresh_is_refused(build, said):
    with pytest.raises(AdapterError, match="beta=0") as error:
        require_fresh_adapter_for_base_reference(build())
    assert said in str(error.value)


def test_freshness_agrees_with_the_forward_pass():
    tokens = torch.arange(3, 40)[None]
    base = tiny_model()(tokens).logits
    for build in (forms.wrapped, forms.native, lambda: forms.wrapped(modules_to_save=["lm_head"])):
        torch.testing.assert_close(build().eval()(tokens).logits, base, atol=0, rtol=0)


# --- sampling and training see the same model --------------------------------------------------------------


@pytest.mark.parametrize("form", ["prompt tuning", "p-tuning", "PeftModel, two active", "modules_to_save"])
def test_sampled_tokens_have_the_log_probabilities_that_training_computes(tmp_path, tokenizer, form):
    model = forms.perturbed(forms.TRAINS[form]())
    trainer = make_trainer(tmp_path, tokenizer, model)
    model.eval()
    prompts = torch.tensor([[0, 0, 40, 50], [60, 70, 80, 90]])  # the first padded on the left
    mask = (prompts != 0).long()
    sampled = model.generate(
        input_ids=prompts,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    completions = sampled.sequences[:, -5:]
    logps = torch.log_softmax(torch.stack(sampled.logits, dim=1), dim=-1)
    expected = logps.gather(-1, completions[..., None]).squeeze(-1)
    with torch.no_grad():
        got, *_ = trainer._get_per_token_logps_and_entropies(
            model, torch.cat([prompts, completions], 1), torch.cat([mask, torch.ones_like(completions)], 1), 5
        )
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_importing_the_module_leaves_peft_and_trl_alone():
    code = (
        "import sys, rlvr.trainers.adapters; print([m for m in ('peft', 'trl', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- Unsloth's model ---------------------------------------------------------------------------------------


@pytest.mark.unsloth
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, task_type="CAUSAL_LM")])
def test_unsloths_model_is_recognised_and_trains_from_its_start(tmp_path, model_folder, peft_config):
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(model_folder), max_seq_length=512, load_in_4bit=False, dtype=torch.float32
    )
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, use_gradient_checkpointing="unsloth")
    state = inspect_adapters(model)
    assert (state.kind, state.unsloth, state.adapters) == ("peft", True, ("default",))
    require_fresh_adapter_for_base_reference(model)
    before = forms.trainable(forms.perturbed(model))
    with pytest.raises(AdapterError, match="neither A nor B is zero"):
        require_fresh_adapter_for_base_reference(model)

    trainer = make_trainer(tmp_path, tokenizer, model, peft_config=peft_config, beta=0.1)
    trainer.train()
    assert trainer.model is model
    assert unmoved(model, before) == []
    with trainer.ref_model.applied():
        assert unmoved(model, before) == list(before)


def test_get_peft_model_of_peft_is_not_taken_for_unsloths():
    assert not inspect_adapters(get_peft_model(tiny_model(), forms.lora())).unsloth
