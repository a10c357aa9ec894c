"""The canary: its arithmetic, what stops a run, and what does not."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tests_support import grpo_config

import rlvr
from rlvr.errors import ConfigError, SamplerDriftError
from rlvr.rollout.grouped import GroupedEngine, weights
from rlvr.testing.tiny import tiny_model, tiny_tokenizer
from rlvr.trainers import EnhancedGRPOTrainer
from rlvr.trainers.canary import _TILTS, _completions_of, bound_of, chance, check_sampler, cumulants, entropy


def test_columns_of_unsloths_trainer_are_found():
    """Rows padded by 0, 1 and 2, with two completion columns: moved to the left, and the last 2 + 2 columns kept."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    moved = torch.tensor([[-9.0, -9, 1, 2], [-9, 3, 4, -9], [5, 6, -9, -9]])
    assert _completions_of(moved, mask, 2).tolist() == [[1, 2], [3, 4], [5, 6]]
    as_trl = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    assert _completions_of(as_trl, mask, 2) is as_trl


LAST = ([1], [5, 6, 0])  # (prompt, completion): token 0, of padding, at the end
AMONG, IN_PROMPT = ([1], [5, 0, 6]), ([0, 1], [5, 6, 7])  # and where Unsloth's trainer misreads it


@pytest.mark.parametrize(
    ("on_unsloths", "rows", "compared"),
    [
        (True, [LAST, AMONG], [[1, 5, 6, 0]]),
        (True, [LAST, IN_PROMPT], [[1, 5, 6, 0]]),
        (True, [AMONG, IN_PROMPT], []),
        (False, [LAST, AMONG], [[1, 5, 6, 0], [1, 5, 0, 6]]),
    ],
)
def test_rows_that_unsloths_trainer_would_misread_are_left_out(on_unsloths, rows, compared):
    seen = []

    def training_forward(model, ids, mask, columns):
        seen.extend(ids.tolist())
        return torch.full((len(ids), columns), -1.0), None, None

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        args=SimpleNamespace(bf16=False, fp16=False),
        model=SimpleNamespace(dtype=torch.float32),
        use_vllm=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _on_unsloth_trainer=on_unsloths,
        _get_per_token_logps_and_entropies=training_forward,
    )
    prompts, completions = map(list, zip(*rows, strict=True))
    drift = check_sampler(trainer, prompts, completions, [[1] * 3] * 2, [[-1.0] * 3] * 2)
    assert seen == compared
    assert (drift and drift.tokens) == (3 * len(compared) or None)


@pytest.mark.parametrize(
    ("weights", "bf16", "fp16", "bound"),
    [
        (torch.float32, False, False, 1e-3),
        (torch.float32, True, False, 1e-1),  # autocast rounds what float32 weights compute
        (torch.float32, False, True, 2e-2),
        (torch.bfloat16, False, False, 1e-1),
        (torch.float16, False, True, 2e-2),
        (torch.bfloat16, False, True, 1e-1),
        (torch.float64, False, False, 1e-1),
    ],
)
def test_the_bound_is_that_of_the_coarsest_dtype(weights, bf16, fp16, bound):
    model, args = SimpleNamespace(dtype=weights), SimpleNamespace(bf16=bf16, fp16=fp16)
    assert bound_of(SimpleNamespace(model=model, args=args, use_vllm=False)) == bound
    halved = 1e-1 if weights == torch.float32 else bound  # vLLM samples from float32 weights in bfloat16
    assert bound_of(SimpleNamespace(model=model, args=args, use_vllm=True)) == halved
    model.is_loaded_in_8bit = True
    assert bound_of(SimpleNamespace(model=model, args=args, use_vllm=False)) == 1e-1


# Whether tokens are the policy's, from the tokens alone.


@pytest.mark.parametrize("scale", [0.3, 2.0, 10.0])  # of the logits: from nearly uniform to nearly certain
def test_cumulants_are_those_of_the_log_probability(scale):
    logprobs = (scale * torch.randn(3, 11, generator=torch.Generator().manual_seed(0)).double()).log_softmax(-1)
    found = cumulants(logprobs)
    for row, distribution in enumerate(logprobs.tolist()):
        mean = sum(math.exp(value) * value for value in distribution)
        for column, tilt in enumerate(_TILTS):
            expected = math.log(sum(math.exp(value) * math.exp(tilt * (value - mean)) for value in distribution))
            assert found[row, column].item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(entropy(torch.tensor([0.0, -math.inf])), torch.tensor(0.0))


@pytest.mark.parametrize("scale", [0.3, 2.0, 10.0])
@pytest.mark.parametrize("tokens", [5, 400])
def test_own_samples_stay_within_chance_and_those_of_another_do_not(scale, tokens):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        logprobs = (scale * torch.randn(tokens, 40, generator=generator)).log_softmax(-1)
        below, above = chance(cumulants(logprobs))
        mean = _mean_of_samples(logprobs, logprobs, generator) + entropy(logprobs).mean().item()
        assert -below < mean < above
        if tokens == 400 and scale > 1:
            strangers = (scale * torch.randn(tokens, 40, generator=generator)).log_softmax(-1)
            assert _mean_of_samples(strangers, logprobs, generator) + entropy(logprobs).mean().item() < -below
            sharper = (2 * logprobs).log_softmax(-1)
            assert scale > 5 or _mean_of_samples(sharper, logprobs, generator) + entropy(logprobs).mean() > above


def _mean_of_samples(drawn_from, logprobs, generator):
    ids = torch.multinomial(drawn_from.exp(), 1, generator=generator)
    return logprobs.gather(1, ids).mean().item()


# That it stops runs.

ENGINES = [
    pytest.param("grouped", {}, id="grouped"),
    pytest.param("generate", {}, id="generate"),
    pytest.param("generate", {"top_k": 20}, id="generate, top-k"),
    pytest.param("generate", {"temperature": 0.7}, id="generate, cold"),
    pytest.param("generate", {"temperature": 0.3, "repetition_penalty": 3.0}, id="generate, repetition penalty"),
    pytest.param("generate", {"bf16": True}, id="generate, bfloat16"),
    pytest.param(
        "auto", {"use_transformers_continuous_batching": True}, id="continuous batching", marks=pytest.mark.slow
    ),
]  # fmt: skip


@pytest.fixture
def sampled_by(monkeypatch):
    """`sampled_by(model)`: from now on engines sample from it, whatever the policy is."""
    from trl.trainer import grpo_trainer

    def use(other):
        engine = GroupedEngine.__init__
        own = grpo_trainer.GRPOTrainer._generate_single_turn

        def generate(self, *args, **kwargs):
            policy, self.model_wrapped = self.model_wrapped, other
            try:
                return own(self, *args, **kwargs)
            finally:
                self.model_wrapped = policy

        monkeypatch.setattr(GroupedEngine, "__init__", lambda self, _, **options: engine(self, other, **options))
        monkeypatch.setattr(grpo_trainer.GRPOTrainer, "_generate_single_turn", generate)

    return use


def policy(seed=0):
    return tiny_model(initializer_range=0.2, seed=seed)


def trainer_of(folder, *, model=None, processing_class=None, env=None, steps=1, config=None, **arguments):
    rewards = {} if env else {"reward_funcs": lambda completion_ids, **_: [float(len(set(i))) for i in completion_ids]}
    return EnhancedGRPOTrainer(
        model=model or policy(), processing_class=processing_class or tiny_tokenizer(), env=env,
        train_dataset=None if env else Dataset.from_list([{"prompt": prompt} for prompt in ("a", "bb")]),
        args=grpo_config(
            folder,
            **{
                "max_steps": steps, "per_device_train_batch_size": 16, "num_generations": 8,
                "max_completion_length": 32, **(config or {}),
            },
        ),
        **rewards, **arguments,
    )  # fmt: skip


def checked_at(trainer):
    return [row["step"] - 1 for row in trainer.state.log_history if "sampler_drift" in row]


@pytest.mark.parametrize(("engine", "config"), ENGINES)
def test_an_engine_that_samples_from_the_policy_trains(tmp_path, engine, config):
    trainer = trainer_of(tmp_path, rollout_engine=engine, config=config)
    trainer.train()
    assert checked_at(trainer) == [0]


@pytest.mark.parametrize(("engine", "config"), ENGINES)
def test_an_engine_that_samples_from_another_model_stops_the_run(tmp_path, sampled_by, engine, config):
    sampled_by(policy(seed=7))
    with pytest.raises(SamplerDriftError, match="does not sample from the policy that is trained"):
        trainer_of(tmp_path, rollout_engine=engine, config=config).train()


def test_an_environments_turns_are_checked_where_generate_samples_them(tmp_path, sampled_by):
    env = rlvr.Environment(
        name="e",
        train_dataset=[{"question": "a"}] * 2,
        rubric=rlvr.Rubric(lambda trajectory: float(len(trajectory.text))),
    )
    trainer = trainer_of(tmp_path / "own", env=env, rollout_engine="generate")
    trainer.train()
    assert checked_at(trainer) == [0]
    sampled_by(policy(seed=7))
    with pytest.raises(SamplerDriftError, match=r"'generate' does not .* mean log-probability of .* would have"):
        trainer_of(tmp_path / "other", env=env, rollout_engine="generate").train()


@pytest.mark.parametrize(("seed", "warned"), [(0, False), (7, True)])
def test_a_rollout_func_is_warned_about(tmp_path, caplog, seed, warned):
    """It may sample as it likes. The first token is its own, and says so."""
    sampler = policy(seed)

    def rollout_func(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        rows = [sampler.generate(torch.tensor([[*row, 5]]), do_sample=True, max_new_tokens=20, top_k=0) for row in ids]
        completions = [found[0, len(row) :] for found, row in zip(rows, ids, strict=True)]
        masks = [torch.tensor([0] + [1] * (len(row) - 1)) for row in completions]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": masks}

    trainer_of(tmp_path, rollout_func=rollout_func).train()
    assert ("the given rollout_func does not sample from the policy" in caplog.text) is warned


def test_what_cannot_be_checked_is_said_once(tmp_path, caplog):
    trainer = trainer_of(tmp_path, rollout_engine="generate", steps=2, config={"generation_kwargs": {"num_beams": 2}})
    trainer.train()
    assert checked_at(trainer) == []
    assert caplog.text.count("is not checked: generation_kwargs change what is sampled") == 1


@pytest.mark.slow
def test_continuous_batching_may_drop_the_repetition_penalty(tmp_path, caplog):
    config = {"use_transformers_continuous_batching": True, "repetition_penalty": 3.0, "temperature": 0.3}
    trainer = trainer_of(tmp_path, config=config)
    trainer.train()
    assert checked_at(trainer) == []
    assert "is not checked: continuous batching may sample without the repetition_penalty" in caplog.text


@pytest.mark.parametrize(
    ("option", "value", "unchecked"),
    [
        ("no_repeat_ngram_size", 1, True),
        ("typical_p", 0.5, True),
        ("num_beams", 2, True),
        ("min_p", 0.2, False),
    ],
)
def test_what_the_models_generation_config_changes_stops_no_run(tmp_path, caplog, option, value, unchecked):
    model = policy()
    setattr(model.generation_config, option, value)
    trainer = trainer_of(tmp_path, model=model, rollout_engine="generate")
    trainer.train()
    assert checked_at(trainer) == ([] if unchecked else [0])
    line = f"is not checked: the model's generation config changes what is sampled ({option})"
    assert (line in caplog.text) is unchecked


@pytest.mark.parametrize("asked", ["auto", "generate"])
def test_top_k_that_is_left_to_generate_is_its_own(tmp_path, caplog, asked):
    """transformers takes the 50 likeliest then, which the grouped engine would not."""
    trainer = trainer_of(tmp_path, rollout_engine=asked, config={"top_k": None})
    trainer.train()
    assert (trainer.engine.name, checked_at(trainer)) == ("generate", [0])
    assert ("top_k is None, which leaves it to transformers' generate" in caplog.text) is (asked == "auto")


@pytest.mark.parametrize(("every", "iterations", "steps"), [(0, 1, [0, 10, 11]), (5, 1, [0, 5, 10]), (0, 3, [0, 9])])
def test_when_it_looks(tmp_path, every, iterations, steps):
    config = {"max_completion_length": 4, "num_iterations": iterations}
    trainer = trainer_of(tmp_path, canary_every=every, steps=12, config=config)
    trainer.train()
    assert checked_at(trainer) == steps


def test_what_a_rollout_func_gives_is_read_only_when_it_is_looked_at(tmp_path, monkeypatch):
    looked = []
    trainer = trainer_of(
        tmp_path, steps=3, rollout_func=lambda prompts, _: {
            "prompt_ids": [[3, 4]] * len(prompts), "completion_ids": [[5, 6]] * len(prompts), "logprobs": None,
        },
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_check_sampler", lambda *_, **__: looked.append(trainer.state.global_step))
    trainer._canary_due = 1
    trainer.train()
    assert looked == [1, 2]


def test_a_negative_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="canary_every is -1; allowed"):
        trainer_of(tmp_path, canary_every=-1)


def test_an_adapter_that_never_reaches_the_sampler_stops_the_run(tmp_path, monkeypatch):
    """A fresh one adds nothing, and is not missed: hence the second look."""
    monkeypatch.setattr(weights, "merged_weight", lambda layer: layer.base_layer.weight.detach().clone())
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_of(tmp_path, peft_config=lora, steps=12, rollout_engine="grouped")
    with pytest.raises(SamplerDriftError, match="'grouped' does not sample from the policy"):
        trainer.train()
    assert trainer.state.global_step == 10


def test_a_tokenizer_with_several_chat_templates_plays_an_environment(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    env = rlvr.Environment(
        name="e",
        train_dataset=[{"question": "a"}] * 2,
        rubric=rlvr.Rubric(lambda trajectory: float(len(trajectory.text))),
    )
    trainer = trainer_of(tmp_path, env=env, processing_class=tokenizer)
    trainer.train()
    assert checked_at(trainer) == [0]


# A processor in the place of the tokenizer.

PARTS_ONLY = (
    "{% for m in messages %}{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}"
)


@pytest.fixture
def llava():
    """(model, processor): text and images, tiny."""
    pytest.importorskip("PIL")
    transformers = pytest.importorskip("transformers")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.image_token = "<image>"
    size = {"height": 16, "width": 16}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=PARTS_ONLY,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**layers, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(
            **layers, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, bos_token_id=None
        ),
        image_token_index=image,
        image_token_id=image,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


def test_a_processor_with_text_is_checked(tmp_path, llava):
    model, processor = llava
    trainer = trainer_of(tmp_path, model=model, processing_class=processor)
    trainer.train()
    assert checked_at(trainer) == [0]


def test_a_processor_plays_an_environment_of_text(tmp_path, llava):
    model, processor = llava
    env = rlvr.Environment(
        name="e",
        train_dataset=[{"question": "one?"}] * 2,
        rubric=rlvr.Rubric(lambda trajectory: float(len(trajectory.text))),
    )
    records = []
    trainer = trainer_of(tmp_path, model=model, processing_class=processor, env=env, trajectory_sinks=[records.extend])
    given = []
    own = trainer.sample_with_trl
    trainer.engine.generate = lambda ids, limits: given.extend(map(list, ids)) or own(ids, limits)
    trainer.train()
    assert checked_at(trainer) == [0]
    assert {processor.tokenizer.decode(ids) for ids in given} == {"one?<|im_end|>"}
    assert len(records) == 16
