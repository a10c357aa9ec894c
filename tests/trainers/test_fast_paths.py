"""The fast paths inside the trainer: runs that stock TRL, the plain engine and the padded forward repeat."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel
from places import EXACT, PLACES
from tests_support import grpo_config
from transformers import GenerationMixin, PreTrainedModel

from rlvr.errors import UnsupportedSettingError
from rlvr.fused.layers import _RmsNorm
from rlvr.fused.lora import Together, _Lora
from rlvr.fused.mlp import _MlpInput
from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer, shared_prefix
from rlvr.trainers.engines import OF_GENERATE, rollout_seeds

pytestmark = pytest.mark.both

PROMPTS = ["say one", "count to twenty-two", "x", "what is the colour of the sky?"]
GROUP = 6


def lora():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_alpha=16)


def scripted(prompts, trainer):
    """The same completions for everybody: random tokens, some cut off and some ended by EOS, new ones every step."""
    tokenizer = trainer.processing_class
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    completions = []
    for _ in prompts:
        length = int(torch.randint(1, 7, (), generator=generator))
        ids = torch.randint(3, 259, (length,), generator=generator).tolist()
        completions.append(ids if length == 6 else [*ids, tokenizer.eos_token_id])
    return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": completions, "logprobs": None}


def distinct_tokens(completion_ids, **_):
    return [len(set(ids)) + 0.1 * (ids[0] % 7) for ids in completion_ids]


def run(trainer_class, folder, tokenizer, *, peft_config=None, rollout_func=scripted, config=None, **arguments):
    """Three optimizer steps by SGD, so that weights show gradients as they are: two prompts, micro-batches that cut
    groups."""
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_generations": GROUP, "max_steps": 3,
        "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "loss_type": "dapo", **(config or {}),
    }  # fmt: skip
    trainer = trainer_class(
        model=tiny_model(), processing_class=tokenizer, reward_funcs=distinct_tokens, rollout_func=rollout_func,
        args=grpo_config(folder, **settings), peft_config=peft_config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]), **arguments,
    )  # fmt: skip
    trainer.start = [weight.clone() for weight in trained(trainer)]
    trainer.train()
    return trainer


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def trained(trainer):
    return [p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad and ".ref." not in name]


def moved(trainer):
    """What training has added to the weights, as one vector."""
    pairs = zip(trained(trainer), trainer.start, strict=True)
    return torch.cat([(p - start.to(p.device)).flatten() for p, start in pairs])


WHOLE = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
RUNS = {
    **{name: {"loss_type": name} for name in ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "bnpo": {"loss_type": "bnpo", **WHOLE},  # divides by the tokens of the micro-batch
    "kl": {"beta": 0.2},
    "sequence level": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "entropy bonus": {"entropy_coef": 0.1, **WHOLE},  # a mean over the tokens of the micro-batch
    "entropy quantile": {"top_entropy_quantile": 0.4321, **WHOLE},  # of the micro-batch, between two tokens
    "two iterations": {"num_iterations": 2, "beta": 0.1, "max_steps": 4},
    "truncated masked": {"mask_truncated_completions": True},
    "checkpointing": {"gradient_checkpointing": True},
    "two-sided clipping": {"num_iterations": 2, "delta": 1.1, "max_steps": 4},
    "off-policy mask": {"num_iterations": 2, "off_policy_mask_threshold": 1e-3, "max_steps": 4},
}
IN_BFLOAT16 = {
    "luspo": {"learning_rate": 0.1},  # its gradients are long: it walks to where rounding counts for more
    # and no token's entropy within rounding of the quantile
    "entropy quantile": {"top_entropy_quantile": 0.5444, "max_steps": 1},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_shared_prompts_equals_trls(tmp_path, tokenizer, name, place):
    """Rows are shuffled otherwise, so sums over an optimizer step are compared: its loss, and the weights."""
    config = RUNS[name] | ({} if place.exact else IN_BFLOAT16.get(name, {}))
    assert_as_trls(tmp_path, tokenizer, place, config, peft_config=lora())


@pytest.mark.parametrize("place", PLACES)
def test_an_entropy_bonus_over_micro_batches_equals_trls(tmp_path, tokenizer, place):
    """Of completions that are equally long: TRL's is a mean over the tokens of the micro-batch."""

    def as_long(prompts, trainer):
        rollouts = scripted(prompts, trainer)
        return rollouts | {"completion_ids": [(ids * 6)[:6] for ids in rollouts["completion_ids"]]}

    config = {"entropy_coef": 0.1}
    assert_as_trls(tmp_path, tokenizer, place, config, peft_config=lora(), rollout_func=as_long)


@pytest.mark.parametrize("place", PLACES)
def test_full_fine_tuning_equals_trls(tmp_path, tokenizer, place):
    assert_as_trls(tmp_path, tokenizer, place, {"learning_rate": 0.05})


def assert_as_trls(folder, tokenizer, place, config, **arguments):
    """In bfloat16 both round; a mask that is off or a row that is lost moves the weights by far more."""
    arguments["config"] = config | place.of_trainer
    ours = run(EnhancedGRPOTrainer, folder, tokenizer, shared_prefix="on", **arguments)
    theirs = run(trl.GRPOTrainer, folder, tokenizer, **arguments)
    assert ours.token_ratio_saved > 0.3
    assert min(logged(ours, "grad_norm")) > 1e-3
    for name, tolerance, rounding in (("loss", 2e-6, 3e-2), ("grad_norm", 1e-5, 3e-2), ("entropy", 1e-5, 1e-3)):
        bounds = {"rel": 1e-4, "abs": tolerance} if place.exact else {"rel": rounding, "abs": 1e-3}
        assert logged(ours, name) == pytest.approx(logged(theirs, name), **bounds), name
    if place.exact:
        for mine, other in zip(trained(ours), trained(theirs), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=3e-5)
    else:
        mine, other = moved(ours), moved(theirs)
        assert (mine - other).norm() < 0.05 * other.norm()


def test_checkpointing_is_switched_off_and_on_without_walks_over_the_model(tmp_path, tokenizer, monkeypatch):
    switched, states = [], []

    def checkpointed(trainer):
        return [m.gradient_checkpointing for m in trainer.model.modules() if hasattr(m, "gradient_checkpointing")]

    for name in ("gradient_checkpointing_enable", "gradient_checkpointing_disable"):
        own = getattr(PreTrainedModel, name)
        monkeypatch.setattr(
            PreTrainedModel, name, lambda *args, _own=own, **kwargs: switched.append(1) or _own(*args, **kwargs)
        )

    class Heard(EnhancedGRPOTrainer):
        def _prepare_inputs(self, inputs):
            if not states:
                switched.clear()  # when training begins it may be
            return super()._prepare_inputs(inputs)

        def _calculate_rewards(self, *args):
            states.append(("scoring", any(checkpointed(self))))
            return super()._calculate_rewards(*args)

        def compute_loss(self, *args, **kwargs):
            states.append(("loss", all(checkpointed(self))))
            return super().compute_loss(*args, **kwargs)

    config = {"gradient_checkpointing": True, "max_steps": 2}
    run(Heard, tmp_path, tokenizer, peft_config=lora(), rollout_func=None, config=config)
    assert states == [("scoring", False), *[("loss", True)] * 3] * 2
    assert not switched


@pytest.mark.parametrize("checkpoints", [False, True])
def test_attention_is_kept_for_the_backward_pass_of_checkpointed_blocks_alone(
    tmp_path, tokenizer, monkeypatch, checkpoints
):
    kept = []
    logps = shared_prefix.shared_prefix_logps

    def heard(*args, **options):
        kept.append(options["keep_attention"])
        return logps(*args, **options)

    monkeypatch.setattr(shared_prefix, "shared_prefix_logps", heard)
    config = {"gradient_checkpointing": checkpoints, "max_steps": 1, "beta": 0.1}
    run(EnhancedGRPOTrainer, tmp_path, tokenizer, shared_prefix="on", peft_config=lora(), config=config)
    assert kept == [False] * 4 + [checkpoints] * 3  # of the canary and the reference, and of the micro-batches


def test_prompts_reach_trl_as_arrays_once_for_their_group(tmp_path, tokenizer):
    class Heard(EnhancedGRPOTrainer):
        def _generate(self, prompts):
            output = super()._generate(prompts)
            heard.append(output[0])
            return output

    def of_tensors(prompts, trainer):
        rollouts = scripted(prompts, trainer)
        return rollouts | {"prompt_ids": [torch.tensor(ids) for ids in rollouts["prompt_ids"]]}

    heard, runs = [], []
    for rollout_func in (scripted, of_tensors):
        runs.append(run(Heard, tmp_path, tokenizer, rollout_func=rollout_func, config={"max_steps": 1}))
    arrays, tensors = heard
    assert [array.tolist() for array in arrays] == [tensor.tolist() for tensor in tensors]
    assert {type(array).__name__ for array in arrays} == {"ndarray"}
    assert len({id(array) for array in arrays}) == len({str(array) for array in arrays}) == 2
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)  # what is no list is given on as it is
    for mine, other in zip(trained(runs[0]), trained(runs[1]), strict=True):
        assert torch.equal(mine, other)


ENGINES = [("generate", "off"), ("generate", "on"), ("grouped", "off"), ("grouped", "on")]


@pytest.mark.parametrize("place", EXACT)
def test_greedy_trajectories_do_not_depend_on_the_paths(tmp_path, tokenizer, place):
    """All completions of a prompt are equal, so advantages move nothing; the entropy bonus does."""

    def trajectories(engine, shared_prefix):
        seen = []

        def keep(completion_ids, **_):
            seen.append([tuple(ids) for ids in completion_ids])
            return [0.0] * len(completion_ids)

        config = {"entropy_coef": 1.0, "top_k": 1, "max_steps": 5, "learning_rate": 2.0, "max_completion_length": 8}
        config |= place.of_trainer
        trainer = EnhancedGRPOTrainer(
            model=tiny_model(), processing_class=tokenizer, reward_funcs=keep,
            args=grpo_config(tmp_path, optim="sgd", lr_scheduler_type="constant", shuffle_dataset=False,
                             per_device_train_batch_size=4, num_generations=2, **config),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:2]]),
            rollout_engine=engine, shared_prefix=shared_prefix,
        )  # fmt: skip
        trainer.train()
        assert trainer.engine.name == engine
        assert trainer.shares_prefix == (shared_prefix == "on")
        return seen, trainer

    reference, plain = trajectories(*ENGINES[0])
    assert len(reference) == 5
    assert len({tuple(step) for step in reference}) > 1  # the policy that samples has changed
    for choice in ENGINES[1:]:
        seen, trainer = trajectories(*choice)
        assert seen == reference, choice
        for mine, other in zip(trained(trainer), trained(plain), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


OWN_OPTIONS = {
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 200)),
    "bad_words_ids": [[token] for token in range(3, 200)],
    "min_new_tokens": 7,
    "min_p": 0.9,
    "forced_eos_token_id": 2,
}


@pytest.mark.parametrize("option", OWN_OPTIONS)
def test_what_a_model_generates_with_is_kept(tmp_path, tokenizer, option, caplog):
    """TRL's `generate` takes from the model's own generation config what the arguments leave open."""

    def completions(trainer_class, **arguments):
        seen = []

        def keep(completion_ids, **_):
            seen.append([tuple(ids) for ids in completion_ids])
            return [0.0] * len(completion_ids)

        model = tiny_model()
        setattr(model.generation_config, option, OWN_OPTIONS[option])
        trainer = trainer_class(
            model=model, processing_class=tokenizer, reward_funcs=keep, args=grpo_config(tmp_path, max_steps=1),
            train_dataset=Dataset.from_list([{"prompt": PROMPTS[0]}]), **arguments,
        )  # fmt: skip
        trainer.train()
        return seen

    with caplog.at_level("WARNING", logger="rlvr"):
        assert completions(EnhancedGRPOTrainer) == completions(trl.GRPOTrainer)
    reason = f"the model's generation config sets {option}, which only transformers' generate follows"
    line = f"rollouts use plain generate, not the grouped engine: {reason}."
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    with pytest.raises(UnsupportedSettingError, match=f"cannot be used: {reason}"):
        completions(EnhancedGRPOTrainer, rollout_engine="grouped")


def test_options_that_trl_gives_or_that_do_nothing_keep_the_grouped_engine(tmp_path, tokenizer):
    model = tiny_model()
    qwen = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    for name, value in {**OF_GENERATE, **qwen}.items():
        setattr(model.generation_config, name, value)
    trainer = EnhancedGRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=distinct_tokens, args=grpo_config(tmp_path),
        train_dataset=Dataset.from_list([{"prompt": PROMPTS[0]}]),
    )  # fmt: skip
    assert trainer.engine.name == "grouped"


def test_every_option_that_transformers_makes_a_processor_of_is_known():
    read = set(re.findall(r"generation_config\.(\w+)", inspect.getsource(GenerationMixin._get_logits_processor)))
    given = {"do_sample", "temperature", "top_p", "repetition_penalty", "max_length", "_eos_token_tensor"}
    harmless = {"use_cache", "remove_invalid_values", "renormalize_logits"}  # the last two where logits are finite
    assert len(read) > 20
    assert read <= {*OF_GENERATE, *given, *harmless}


@pytest.mark.parametrize("engine", ["generate", "grouped"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, tokenizer, engine):
    def completions(resume=None):
        seen = []

        def keep(completion_ids, **_):
            seen.append([tuple(ids) for ids in completion_ids])
            return distinct_tokens(completion_ids)

        trainer = EnhancedGRPOTrainer(
            model=tiny_model(), processing_class=tokenizer, reward_funcs=keep, peft_config=lora(),
            args=grpo_config(tmp_path, max_steps=4, save_strategy="steps", save_steps=2), rollout_engine=engine,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return seen, trained(trainer)

    whole, weights = completions()
    rest, resumed = completions(resume=str(tmp_path / "checkpoint-2"))
    assert len(whole) == 4
    assert rest == whole[2:]
    assert all(torch.equal(mine, other) for mine, other in zip(resumed, weights, strict=True))


def test_rollouts_follow_from_torchs_seed_and_processes_differ():
    def seeds(process_index):
        torch.manual_seed(0)
        draw = rollout_seeds(process_index)
        return [draw() for _ in range(3)]

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1)}) == 6


@pytest.fixture
def fused_calls(monkeypatch):
    """How often each fused function ran."""
    counts = {}
    for function in (_RmsNorm, _Lora, _MlpInput):
        counts[function.__name__] = 0

        def apply(*args, own=function.apply, name=function.__name__):
            counts[name] += 1
            return own(*args)

        monkeypatch.setattr(function, "apply", apply)
    return counts


class Watched(EnhancedGRPOTrainer):
    """Looks at every weight and every layer before and after each rollout."""

    fuses = False
    rollouts = 0

    def _set_up_shared_prefix(self, asked):
        super()._set_up_shared_prefix(asked)
        if self.fuses:
            self._fuse()  # as on CUDA

    def _generate(self, prompts):
        before = {name: p.clone() for name, p in self.model.state_dict().items()}
        modules = [type(module) for module in self.model.modules()]
        output = super()._generate(prompts)
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert [type(module) for module in self.model.modules()] == modules
        assert not fused_modules(self.model)
        self.rollouts += 1
        return output


def fused_modules(model):
    return [m for m in model.modules() if "rlvr" in type(m.__dict__.get("forward")).__module__]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rollouts_leave_every_weight_as_it_was(tmp_path, tokenizer, dtype, device):
    model = tiny_model().to(dtype)
    trainer = Watched(
        model=model, processing_class=tokenizer, reward_funcs=distinct_tokens, peft_config=lora(),
        args=grpo_config(tmp_path, max_steps=3, use_cpu=device == "cpu"), rollout_engine="grouped",
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )  # fmt: skip
    trainer.train()
    assert trainer.rollouts == 3


def test_fused_layers_train_the_same_and_stay_out_of_everything_else(tmp_path, tokenizer, fused_calls, monkeypatch):
    """Rollouts with merged adapters, training with fused layers, saving, and PEFT's own functions, in one run."""

    def train(fuses):
        monkeypatch.setattr(Watched, "fuses", fuses)
        config = {"max_steps": 3, "gradient_checkpointing": True, "num_iterations": 1, "beta": 0.1}
        trainer = run(
            Watched, tmp_path / str(fuses), tokenizer, peft_config=lora(), rollout_func=None, config=config,
            rollout_engine="grouped", shared_prefix="on",
        )  # fmt: skip
        trainer.save_model(str(tmp_path / str(fuses)))
        return trainer

    found, of = [], Together.of
    monkeypatch.setattr(Together, "of", lambda *args: found.append(1) or of(*args))
    plain = train(False)
    assert not any(fused_calls.values())
    fused = train(True)
    assert all(fused_calls.values())
    # the canary twice, and in each of 3 steps the reference and 3 micro-batches, which checkpointing computes twice
    forwards, groups_of_layers = 2 + 3 * (1 + 3), 2 * 4
    assert len(found) == forwards * groups_of_layers
    assert logged(fused, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4, abs=2e-6)
    for mine, other in zip(trained(fused), trained(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert fused.rollouts == 3
    assert not fused_modules(fused.model)

    ids = torch.arange(3, 13)[None]
    expected = fused.model.eval()(input_ids=ids).logits
    saved = PeftModel.from_pretrained(tiny_model(), tmp_path / "True").eval()
    torch.testing.assert_close(saved(input_ids=ids).logits, expected)
    torch.testing.assert_close(fused.model.merge_and_unload()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


# On a GPU.


@pytest.mark.gpu
def test_a_run_on_a_gpu_fuses_captures_and_restores(tmp_path, tokenizer, fused_calls):
    config = {"use_cpu": False, "bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-2, "beta": 0.1}
    trainer = run(
        Watched, tmp_path, tokenizer, peft_config=lora(), rollout_func=None, config=config,
        rollout_engine="grouped", shared_prefix="on",
    )  # fmt: skip
    assert trainer.rollouts == 3
    assert all(fused_calls.values())
    assert not fused_modules(trainer.model)
    assert min(logged(trainer, "grad_norm")) > 0
