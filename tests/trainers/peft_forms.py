"""Every way in which a model can carry trainable parameters, made from a tiny model, for the adapter tests."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

from rlvr.testing.tiny import tiny_model

PROMPTS = Dataset.from_dict({"prompt": ["ab", "cde", "f", "gg"]})


def lora(**overrides):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **overrides})


def wrapped(*, name="default", base=None, **overrides):
    return get_peft_model(base or tiny_model(), lora(**overrides), adapter_name=name)


def perturbed(model, *, seed=1):
    """The same model with noise on its trainable parameters, so that adapters are not fresh."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def saved_adapter(folder: Path) -> Path:
    perturbed(wrapped()).save_pretrained(folder)
    return folder


def completions_by_length(completions, **_):
    """A reward whose values differ inside a group, whatever was sampled."""
    return [float(len(text)) + i for i, text in enumerate(completions)]


# --- forms that train --------------------------------------------------------------------------------------


def native(base=None, *, name=None, **overrides):
    model = base or tiny_model()
    model.add_adapter(lora(**overrides), adapter_name=name)
    return model


def injected(**overrides):
    return inject_adapter_in_model(lora(**overrides), tiny_model())


def two_adapters(active):
    model = wrapped(name="first")
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(active)
    return model


def partly_unfrozen():
    model = wrapped()
    model.get_base_model().model.layers[1].mlp.requires_grad_(True)
    model.get_base_model().lm_head.requires_grad_(True)
    return model


class HandWrittenLora(nn.Module):
    """LoRA without PEFT."""

    def __init__(self, layer, r=2):
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(0.1 * torch.randn(r, layer.in_features, generator=generator))
        self.up = nn.Parameter(torch.zeros(layer.out_features, r))

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


def hand_written():
    model = tiny_model().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = HandWrittenLora(layer.self_attn.q_proj)
    return model


def unfrozen_layer():
    model = tiny_model().requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    return model


def mixed(**overrides):
    return get_peft_model(tiny_model(), lora(**overrides), mixed=True)


def ia3():
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    return get_peft_model(tiny_model(), config)


def virtual_tokens(config_class):
    return get_peft_model(tiny_model(), config_class(task_type="CAUSAL_LM", num_virtual_tokens=3))


def enabled_again():
    model = wrapped()
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    return model


def merged_and_unmerged():
    model = wrapped()
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def merged_then_full():
    return perturbed(wrapped()).merge_and_unload().requires_grad_(True)


def with_stock_reference():
    """As stock TRL leaves a PeftModel behind after a run with beta > 0."""
    model = wrapped()
    model.add_adapter("ref", lora())
    return model


TRAINS = {
    "full": tiny_model,
    "unfrozen layer": unfrozen_layer,
    "hand-written LoRA": hand_written,
    "PeftModel": wrapped,
    "PeftModel, other name": lambda: wrapped(name="mine"),
    "PeftModel, two adapters, one active": lambda: two_adapters("second"),
    "PeftModel, two active": lambda: two_adapters(["first", "second"]),
    "PeftModel with a ref adapter": with_stock_reference,
    "PeftModel, base partly unfrozen": partly_unfrozen,
    "PeftModel, enabled again": enabled_again,
    "PeftModel, unmerged again": merged_and_unmerged,
    "PeftModel, biases": lambda: wrapped(bias="all"),
    "DoRA": lambda: wrapped(use_dora=True),
    "LoRA on embeddings": lambda: wrapped(target_modules=["embed_tokens", "q_proj"]),
    "LoRA on tied embeddings": lambda: wrapped(
        base=tiny_model(tie_word_embeddings=True), target_modules=["embed_tokens", "q_proj"]
    ),
    "modules_to_save": lambda: wrapped(modules_to_save=["lm_head", "embed_tokens"]),
    "modules_to_save, tied": lambda: wrapped(
        base=tiny_model(tie_word_embeddings=True), modules_to_save=["embed_tokens"]
    ),
    "trainable tokens": lambda: wrapped(trainable_token_indices=list(range(3, 259))),
    "IA3": ia3,
    "prompt tuning": lambda: virtual_tokens(PromptTuningConfig),
    "p-tuning": lambda: virtual_tokens(PromptEncoderConfig),
    "add_adapter": native,
    "add_adapter, other name": lambda: native(name="mine"),
    "add_adapter on embeddings": lambda: native(target_modules=["embed_tokens", "q_proj"]),
    "injected": injected,
    "the model inside a PeftMixedModel": lambda: mixed().base_model.model,
    "merged and unloaded, then unfrozen": merged_then_full,
}

NOT_WRAPPED = {"full", "unfrozen layer", "hand-written LoRA", "merged and unloaded, then unfrozen"}


# --- forms that cannot -------------------------------------------------------------------------------------


def frozen_native():
    model = native()
    model.requires_grad_(False)
    return model


def disabled():
    model = wrapped()
    model.disable_adapter_layers()
    return model


def disabled_native():
    model = native()
    model.disable_adapters()
    return model


def merged():
    model = wrapped(name="mine")
    model.merge_adapter()
    return model


def merged_native():
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = native()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return model


def inactive():
    """The adapter that is trainable is not the one that the forward pass uses."""
    model = two_adapters("second")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".first." in name)
    return model


def hand_written_on_head():
    model = tiny_model().requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)
    model.lm_head = HandWrittenLora(model.lm_head)
    return model


def nested():
    return get_peft_model(wrapped(), lora(), adapter_name="outer")


def tied_tokens():
    return wrapped(base=tiny_model(tie_word_embeddings=True), trainable_token_indices=[5, 6])


# name → (how to make it, what the error must say, how the fix it names looks in code or None)
REFUSED = {
    "merge_and_unload": (
        lambda: wrapped().merge_and_unload(),
        ["nothing in the model is trainable", "merge_and_unload()", "peft_config", "requires_grad_(True)"],
        lambda model: model.requires_grad_(True),
    ),
    "all frozen": (
        lambda: tiny_model().requires_grad_(False),
        ["nothing in the model is trainable", "requires_grad_(True)"],
        lambda model: model.requires_grad_(True),
    ),
    "add_adapter, frozen": (
        frozen_native,
        ["nothing in the model is trainable", "'default' is frozen", "set_adapter"],
        lambda model: model.set_adapter("default"),
    ),
    "disabled": (
        disabled,
        ["'default' is disabled", "enable_adapter_layers()"],
        lambda model: model.enable_adapter_layers(),
    ),
    "add_adapter, disabled": (
        disabled_native,
        ["'default' is disabled", "model.enable_adapters()"],
        lambda model: model.enable_adapters(),
    ),
    "merged in place": (
        merged,
        ["'mine' is merged", "unmerge_adapter()", "merge_and_unload()"],
        lambda model: model.unmerge_adapter(),
    ),
    "add_adapter, merged in place": (merged_native, ["'default' is merged", "unmerge()"], None),
    "trainable adapter not active": (
        inactive,
        ["not active", "active: 'second' of 'first', 'second'", "set_adapter"],
        lambda model: model.set_adapter("first"),
    ),
    "LoRA on lm_head": (
        lambda: wrapped(target_modules=["q_proj", "lm_head"]),
        ["lm_head", "never trained", "target_modules"],
        None,
    ),
    "add_adapter on lm_head": (
        lambda: native(target_modules=["q_proj", "lm_head"]),
        ["lm_head", "never trained", "target_modules"],
        None,
    ),
    "injected into lm_head": (
        lambda: injected(target_modules=["q_proj", "lm_head"]),
        ["lm_head", "never trained", "target_modules"],
        None,
    ),
    "hand-written LoRA on lm_head": (hand_written_on_head, ["lm_head", "never trained"], None),
    "trainable tokens, tied": (tied_tokens, ["lm_head", "trainable_token_indices"], None),
    "PeftMixedModel": (mixed, ["PeftMixedModel", "model.base_model.model"], None),
    "PeftModel in a PeftModel": (nested, ["inside a PeftModel", "merge_and_unload()", "add_adapter"], None),
    "prefix tuning with gradient checkpointing": (
        lambda: virtual_tokens(PrefixTuningConfig),
        ["PREFIX_TUNING", "gradient_checkpointing=False"],
        None,
    ),
}


def loaded(folder, *, is_trainable):
    return PeftModel.from_pretrained(tiny_model(), folder, is_trainable=is_trainable)


def loaded_native(folder, *, is_trainable):
    model = tiny_model()
    model.load_adapter(str(folder), is_trainable=is_trainable)
    return model


def trainable(model):
    """A copy of what is trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
