"""The reference model is the model as given: its log-probabilities against a deep copy of the starting model."""

from __future__ import annotations

import copy

import peft_forms as forms
import pytest
import torch
from tests_support import grpo_config

from rlvr.errors import AdapterError
from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer
from rlvr.trainers.reference import StartingPolicy, refuse_sharded_parameters

pytestmark = pytest.mark.both

TOKENS = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
KEEP = 4  # completion tokens


def oracle_logps(model):
    """Log-probabilities of the last KEEP tokens, by hand from the logits of a plain forward pass."""
    with torch.no_grad():
        logits = model.eval()(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    logps = torch.log_softmax(logits[:, -KEEP - 1 : -1].double(), dim=-1)  # virtual tokens come in front
    return logps.gather(-1, TOKENS[:, -KEEP:, None]).squeeze(-1).float()


def trainer_logps(trainer, model):
    with torch.no_grad():
        logps, *_ = trainer._get_per_token_logps_and_entropies(model, TOKENS, torch.ones_like(TOKENS), KEEP)
    return logps


def make_trainer(tmp_path, tokenizer, model, *, beta=0.1, steps=2, **arguments):
    return EnhancedGRPOTrainer(
        model=model,
        reward_funcs=forms.completions_by_length,
        args=grpo_config(tmp_path, beta=beta, max_steps=steps, learning_rate=0.02, **arguments),
        train_dataset=forms.PROMPTS,
        processing_class=tokenizer,
    )


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before, model):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("form", forms.TRAINS)
def test_trains_all_of_it_against_the_starting_model(tmp_path, tokenizer, form):
    model = forms.perturbed(forms.TRAINS[form]())
    starting, before = copy.deepcopy(model), parameters(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = make_trainer(tmp_path, tokenizer, model)
    trainer.train()

    moved = changed(before, model)
    assert moved == trainable

    expected = oracle_logps(starting)
    torch.testing.assert_close(trainer_logps(trainer, trainer.ref_model), expected, atol=2e-6, rtol=0)
    live = trainer_logps(trainer, trainer.model)
    torch.testing.assert_close(live, oracle_logps(model), atol=2e-6, rtol=0)
    assert (live - expected).abs().max() > 1e-4
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert trainer._training_check.done


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("load", [forms.loaded, forms.loaded_native])
def test_an_adapter_loaded_to_be_trained_starts_from_its_file(tmp_path, tokenizer, load, beta):
    folder = forms.saved_adapter(tmp_path / "adapter")
    model = load(folder, is_trainable=True)
    starting, before = copy.deepcopy(model), parameters(model)
    trainer = make_trainer(tmp_path, tokenizer, model, beta=beta)
    trainer.train()
    assert changed(before, model) == {name for name in before if "lora_" in name}
    if beta:
        expected = oracle_logps(starting)
        torch.testing.assert_close(trainer_logps(trainer, trainer.ref_model), expected, atol=2e-6, rtol=0)
        assert (expected - oracle_logps(tiny_model())).abs().max() > 1e-4  # not the base model


def test_dropout_is_off_in_the_reference_and_stays_on_in_the_policy(tmp_path, tokenizer):
    model = forms.perturbed(forms.wrapped(lora_dropout=0.5))
    starting = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, tokenizer, model)
    trainer.train()
    model.train()
    torch.testing.assert_close(trainer_logps(trainer, trainer.ref_model), oracle_logps(starting), atol=2e-6, rtol=0)
    assert all(module.training for module in model.modules())


def test_a_second_trainer_on_the_same_model_starts_where_the_first_ended(tmp_path, tokenizer):
    model, starting = forms.perturbed(forms.wrapped()), forms.wrapped()
    make_trainer(tmp_path / "first", tokenizer, model).train()
    starting.load_state_dict(model.state_dict())
    before = parameters(model)
    trainer = make_trainer(tmp_path / "second", tokenizer, model, temperature=0.7)
    trainer.train()
    assert changed(before, model) == {name for name in before if "lora_" in name}
    with torch.no_grad():
        logits = starting.eval()(input_ids=TOKENS).logits[:, -KEEP - 1 : -1] / 0.7
    expected = torch.log_softmax(logits, dim=-1).gather(-1, TOKENS[:, -KEEP:, None]).squeeze(-1)
    torch.testing.assert_close(trainer_logps(trainer, trainer.ref_model), expected, atol=2e-6, rtol=0)


def test_sync_ref_model_moves_the_reference_as_trl_does(tmp_path, tokenizer):
    model = tiny_model()
    before = parameters(model)
    trainer = make_trainer(
        tmp_path, tokenizer, model, steps=1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.25
    )
    trainer.train()
    mixture = tiny_model()
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            parameter.copy_(0.75 * before[name] + 0.25 * model.get_parameter(name))
    torch.testing.assert_close(trainer_logps(trainer, trainer.ref_model), oracle_logps(mixture), atol=2e-6, rtol=0)


# --- StartingPolicy by itself ------------------------------------------------------------------------------


def test_everything_is_put_back_even_after_an_exception():
    model = forms.perturbed(forms.wrapped(lora_dropout=0.1)).train()
    model.get_base_model().model.layers[0].eval()  # a mixture of modes
    policy = StartingPolicy(model)
    forms.perturbed(model, seed=2)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    before, modes = parameters(model), [module.training for module in model.modules()]

    def fail_inside():
        with policy.applied():
            assert not any(module.training for module in model.modules())
            assert changed(before, model) == {name for name in before if "lora_" in name}
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert changed(before, model) == set()
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert [module.training for module in model.modules()] == modes


def test_gradients_and_optimizer_go_on_with_the_live_parameters():
    model = tiny_model()
    policy = StartingPolicy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    with policy.applied(), torch.no_grad():
        model(input_ids=TOKENS)
    loss.backward()

    plain = tiny_model()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    plain_optimizer.step()
    assert changed(parameters(plain), model) == set()


def test_tied_weights_are_copied_once_and_stay_tied():
    model = tiny_model(tie_word_embeddings=True)
    policy = StartingPolicy(model)
    expected = oracle_logps(model)
    forms.perturbed(model)
    with policy.applied():
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert torch.equal(oracle_logps(model), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_enclosing_autocast_does_not_reuse_casts_of_the_live_parameters():
    model = tiny_model()
    policy = StartingPolicy(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        start = model(input_ids=TOKENS).logits
    forms.perturbed(model)
    with torch.autocast("cpu", torch.bfloat16):
        live = model(input_ids=TOKENS).logits.detach()  # with gradients on, its casts are cached
        with policy.applied(), torch.no_grad():
            assert torch.equal(model(input_ids=TOKENS).logits, start)
        assert torch.equal(model(input_ids=TOKENS).logits.detach(), live)


def test_a_model_converted_after_the_copy_is_followed():
    model = tiny_model()
    policy = StartingPolicy(model)
    start = parameters(model)
    forms.perturbed(model)
    model.to(torch.bfloat16)
    with policy.applied():
        assert all(torch.equal(p, start[name].bfloat16()) for name, p in model.named_parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_what_became_trainable_later_is_an_error():
    model = forms.wrapped()
    policy = StartingPolicy(model)
    model.get_base_model().lm_head.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"lm_head\.weight"), policy.applied():
        pass


def test_sharded_parameters_are_refused():
    model = tiny_model()
    model.lm_head.weight.ds_id = 0  # the mark of DeepSpeed ZeRO-3
    with pytest.raises(AdapterError, match="ZeRO-3"):
        refuse_sharded_parameters(model)
    with pytest.raises(AdapterError, match="beta=0"):
        StartingPolicy(model)
