"""Which models the grouped engine refuses, and what it says."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForSequenceClassification
from transformers.utils.quantization_config import QuantizationMethod

from rlvr.errors import UnsupportedSettingError
from rlvr.rollout.engine import SamplingSettings
from rlvr.rollout.grouped import GroupedEngine
from rlvr.rollout.grouped.support import ARCHITECTURES, unsupported
from rlvr.testing.tiny import tiny_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def problem(model):
    return unsupported(model, SamplingSettings())


def configured(**settings):
    model = tiny_model(layers=1)
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_tested_architectures_are_taken(architecture):
    settings = {"heads": 4, "kv_heads": 4} if architecture == "phi3" else {}
    assert problem(tiny_model(architecture, **settings)) is None


def test_adapters_are_taken_unless_they_change_the_prompt():
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert problem(get_peft_model(tiny_model(layers=1), lora)) is None
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    assert problem(get_peft_model(tiny_model(layers=1), ia3)) is None
    prompt_tuning = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    assert problem(get_peft_model(tiny_model(layers=1), prompt_tuning)) == (
        "PROMPT_TUNING puts virtual tokens in front of the prompt"
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "has layers of type full_attention, linear"),
        ({"num_experts": 8}, "is a mixture of experts"),
        ({"vision_config": {}}, "reads images or sound"),
        ({"attn_logit_softcapping": 50.0}, "caps its attention scores"),
        ({"use_bidirectional_attention": True}, "attends in both directions"),
        ({"output_hidden_states": True}, "asks for attentions or hidden states"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rotary embedding of type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rotary embedding of type 'longrope'"),
    ],
)
def test_configurations_are_refused_with_their_reason(settings, reason):
    assert reason in problem(configured(**settings))


def test_other_models_are_refused_with_their_reason():
    mixtral = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    assert problem(mixtral) == "mixtral is a mixture of experts"
    classifier = Qwen2ForSequenceClassification(Qwen2Config(**SMALL))
    assert "Qwen2ForSequenceClassification (qwen2) is not among the architectures" in problem(classifier)

    class Custom(nn.Module):
        pass

    assert problem(Custom()) == "Custom is no class of transformers, so its attention is unknown"


def test_a_patched_forward_is_refused():
    model = tiny_model(layers=1)

    def forward(*args, **kwargs):
        raise AssertionError

    forward.__module__ = "unsloth.models.llama"
    model.model.layers[0].self_attn.forward = forward
    assert "patched by Unsloth" in problem(model)


def test_sharded_and_scattered_weights_are_refused():
    model = tiny_model(layers=1)
    model.lm_head.weight.ds_id = 0
    assert "sharded" in problem(model)
    scattered = tiny_model(layers=1)
    scattered.model.norm.to("meta")
    assert problem(scattered) == "the weights are on cpu, meta; one CPU or one CUDA device is needed"


def test_layers_that_read_another_configuration_are_refused():
    """What a rollout sets in the model's would not reach them: their tokens would be wrong."""
    copied = tiny_model(layers=1)
    copied.config = copy.deepcopy(copied.config)
    replicated = LoraConfig(task_type="CAUSAL_LM", layer_replication=[(0, 2), (1, 2)])
    for model in (copied, get_peft_model(tiny_model("llama"), replicated)):
        assert "self_attn has a configuration of its own, which is not model.config" in problem(model)


@pytest.mark.parametrize("wrapper", ["model", "peft", "inside"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_around_the_model_are_refused(wrapper, register):
    model = tiny_model(layers=1)
    if wrapper != "model":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    holder = model.get_base_model() if wrapper == "inside" else model
    getattr(holder, register)(lambda *args: None)
    name = "PeftModelForCausalLM" if wrapper == "peft" else "Qwen2ForCausalLM"
    assert problem(model) == f"a forward hook is registered on {name}, which the engine would not call"


def test_hooks_of_modules_that_are_called_are_taken():
    model = tiny_model(layers=1)
    model.enable_input_require_grads()  # as gradient checkpointing with adapters does
    model.model.layers[0].register_forward_hook(lambda *args: None)
    assert problem(model) is None


@pytest.mark.parametrize("part", ["model.norm", "model.embed_tokens", "lm_head", "model.layers.0.input_layernorm"])
def test_weights_of_several_dtypes_are_refused(part):
    model = tiny_model(layers=1, tie_word_embeddings=False).to(torch.bfloat16)
    assert problem(model) is None
    model.get_submodule(part).float()
    assert problem(model) == "the weights are of several dtypes: bfloat16, float32"


def test_dtypes_that_are_brought_together_are_taken():
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(layers=1, tie_word_embeddings=False).to(torch.bfloat16), lora)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}  # of adapters
    assert problem(model) is None
    model = tiny_model(layers=1, tie_word_embeddings=False).to(torch.bfloat16)
    head = model.lm_head.float()
    head.forward = lambda hidden: nn.functional.linear(hidden.float(), head.weight)
    assert problem(model) is None


@pytest.mark.parametrize(
    ("loaded", "method", "reason"),
    [
        ("is_loaded_in_4bit", "bitsandbytes", None),
        ("is_loaded_in_8bit", "bitsandbytes", "8-bit weights synchronise with the host in every layer"),
        ("is_quantized", "gptq", "weights quantized by gptq are not tested"),
    ],
)
def test_quantized_weights_that_no_graph_can_hold_are_refused(loaded, method, reason):
    """As transformers marks them; bitsandbytes itself needs a GPU."""
    model = tiny_model(layers=1)
    setattr(model, loaded, True)
    model.quantization_method = QuantizationMethod(method)
    found = problem(model)
    assert found is None if reason is None else reason in found


def test_the_engine_refuses_what_it_cannot_run():
    with pytest.raises(UnsupportedSettingError, match="cannot run this model: qwen2 is a mixture of experts"):
        GroupedEngine(configured(num_experts=8), sampling=SamplingSettings(), eos_token_ids=())
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedSettingError, match="'graphs' needs a CUDA device; the model is on cpu"):
            GroupedEngine(configured(), sampling=SamplingSettings(), eos_token_ids=(), execution="graphs")
