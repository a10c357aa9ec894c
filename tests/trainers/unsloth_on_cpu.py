"""Trains on Unsloth's generated trainer without a GPU, which it makes for GPUs only. A process of its own:

    python unsloth_on_cpu.py

Unsloth is made to take its GPU path at import and to generate its trainer; the model is transformers', with the two
methods that mark Unsloth's. Prints JSON lines: the training arguments of a run with some losses; of each training run
the trainer's classes, and the rows that it logged; of one with tools, what its gradient is nearest to; of one whose
model can share prompts, which forwards did, in our trainer and in Unsloth's alone.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(
    UNSLOTH_ALLOW_CPU="1",
    TORCHDYNAMO_DISABLE="1",
    UNSLOTH_AUTO_INSTALL="0",
    UNSLOTH_COMPILE_LOCATION=tempfile.mkdtemp(),
    HF_HUB_OFFLINE="1",
    WANDB_MODE="disabled",
)
import unsloth  # noqa: F401

os.environ["UNSLOTH_ALLOW_CPU"] = "0"
from unsloth.models.rl import PatchFastRL

PatchFastRL()


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def mark_as_unsloths(model):
    model.for_training = lambda *args, **kwargs: model.train()
    model.for_inference = lambda *args, **kwargs: model.eval()


def with_adapter():
    from peft import LoraConfig, get_peft_model

    from rlvr.testing.tiny import tiny_model

    return get_peft_model(tiny_model(initializer_range=0.2), LoraConfig(r=4, target_modules="all-linear"))


def unlike_its_checkpoint():
    """A model without adapters whose weights are no longer those on the disk."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlvr.testing.tiny import save_tiny

    model = AutoModelForCausalLM.from_pretrained(save_tiny(Path(tempfile.mkdtemp()) / "model", initializer_range=0.2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def train(name, model, beta):
    from datasets import Dataset
    from tests_support import grpo_config

    from rlvr.testing.tiny import tiny_tokenizer
    from rlvr.trainers import EnhancedGRPOTrainer

    mark_as_unsloths(model)
    trainer = EnhancedGRPOTrainer(
        model=model,
        processing_class=tiny_tokenizer(),
        reward_funcs=length,
        train_dataset=Dataset.from_list([{"prompt": "ab" * n} for n in range(1, 9)]),  # unequal: padded on the left
        args=grpo_config(
            tempfile.mkdtemp(), beta=beta, optim="adamw_torch", per_device_train_batch_size=8, warmup_steps=0
        ),
    )
    trainer.train()
    names = [base.__name__ for base in type(trainer).__mro__]
    rows = [row for row in trainer.state.log_history if "loss" in row]
    print(json.dumps({"run": name, "classes": names, "rows": rows}))


def evaluate():
    """Forwards of an evaluation whose completions are given: none is of scoring."""
    from datasets import Dataset
    from tests_support import grpo_config

    from rlvr.testing.tiny import tiny_tokenizer
    from rlvr.trainers import EnhancedGRPOTrainer

    tokenizer, model, forwards = tiny_tokenizer(), with_adapter(), []
    mark_as_unsloths(model)
    rows = Dataset.from_list([{"prompt": "a"}, {"prompt": "bb"}])
    trainer = EnhancedGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=length,
        train_dataset=rows,
        eval_dataset=rows,
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": tokenizer(prompts)["input_ids"],
            "completion_ids": [[5, 6]] * len(prompts),
            "logprobs": None,
        },
        args=grpo_config(tempfile.mkdtemp(), beta=0.1, num_iterations=2, per_device_eval_batch_size=4),
    )
    model.get_base_model().model.register_forward_hook(lambda *_: forwards.append(1))
    metrics = trainer.evaluate()
    print(json.dumps({"forwards": len(forwards), "reward": metrics["eval_reward"]}))


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: what to double.
    """
    return 2 * number


def train_with_tools():
    """How far the gradient is from that of the loss by its formula, and how far where tool tokens counted too."""
    import torch
    from tests_support import grpo_config
    from transformers import TrainerCallback

    import rlvr
    from rlvr.testing.scripted import ScriptedEngine, tool_call
    from rlvr.testing.tiny import tiny_tokenizer
    from rlvr.trainers import EnhancedGRPOTrainer

    tokenizer, model, length = tiny_tokenizer(), with_adapter(), 400
    end = tokenizer.eos_token_id
    script = [[tool_call("double", number=4), "it is 8"], ["no idea"]]
    turns = [[[*tokenizer.encode(turn), end] for turn in script[row % 2]] for row in range(4)]
    mark_as_unsloths(model)
    trainer = EnhancedGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        env=rlvr.Environment(
            name="doubling",
            train_dataset=[{"question": "double 4"}] * 4,
            rubric=rlvr.Rubric(lambda trajectory: float(trajectory.text.count("8"))),
            tools=[double],
        ),
        args=grpo_config(
            tempfile.mkdtemp(), optim="adamw_torch", gradient_accumulation_steps=1, max_steps=1, loss_type="dr_grpo",
            max_completion_length=length, temperature=1.0, max_grad_norm=0.0,
        ),
    )  # fmt: skip
    trainer.engine = ScriptedEngine(turns, end_id=end, with_logprobs=False)
    trainer._check_sampler = lambda *samples: None  # a script is not the policy
    batches = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: (
        batches.append(inputs),
        compute_loss(model, inputs, **kwargs),
    )[1]

    class Compare(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            (batch,) = batches
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            found = torch.cat([parameter.grad.flatten() for parameter in parameters])
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            columns = batch["completion_ids"].shape[1]
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -columns - 1 : -1].float()
            logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
            distances = []
            for counted in (batch["completion_mask"] * batch["tool_mask"], batch["completion_mask"]):
                loss = -(batch["advantages"].view(-1, 1) * logps * counted).sum() / (len(ids) * length)
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
                distances.append(((found - gradient).norm() / gradient.norm()).item())
            print(json.dumps({"tools": distances, "ignored": int((1 - batch["tool_mask"]).sum())}))

    trainer.add_callback(Compare())
    trainer.train()


def with_shared_prompts():
    """A model that answers to what Unsloth's trainer asks of its own on a GPU: attention within the segments of
    `prefix_seg_info`, and hidden states in the place of logits."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    from rlvr.testing.tiny import tiny_model

    def attention(module, query, key, value, attention_mask, prefix_seg_info=None, **options):
        if prefix_seg_info is not None:
            tokens = slice(prefix_seg_info.T)  # what follows is padding
            group, suffix = prefix_seg_info.group_of_kv[tokens], prefix_seg_info.suffix_of_kv[tokens]
            seen = (group[:, None] == group) & (prefix_seg_info.is_prefix[tokens] | (suffix[:, None] == suffix))
            attention_mask = seen.tril()[None, None]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("shared_prompts", attention)
    AttentionMaskInterface.register("shared_prompts", sdpa_mask)
    model = tiny_model(initializer_range=0.2)
    model.config._attn_implementation = "shared_prompts"
    logits = model.lm_head.forward
    model.lm_head.forward = lambda hidden: (
        hidden if os.environ.get("UNSLOTH_RETURN_HIDDEN_STATES") == "1" else logits(hidden)
    )
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    mark_as_unsloths(model)
    return model


def train_with_long_prompts(prompts):
    """Two steps of so many prompts by our trainer, and on the same rows by Unsloth's: which forwards shared prompts,
    and how far the gradient of the first step is from that without sharing."""
    from unittest.mock import patch

    from tests_support import grpo_config
    from unsloth_script import Forwards, batches_kept, train_by_unsloth

    import rlvr
    from rlvr.testing.tiny import tiny_tokenizer
    from rlvr.trainers import EnhancedGRPOTrainer

    def arguments():
        return grpo_config(
            tempfile.mkdtemp(), beta=0.1, loss_type="grpo", optim="adamw_torch", warmup_steps=0,
            per_device_train_batch_size=4 * prompts, gradient_accumulation_steps=1, max_completion_length=12,
            mask_truncated_completions=False,
        )  # fmt: skip

    tokenizer, ours = tiny_tokenizer(), Forwards()
    with batches_kept() as batches:
        EnhancedGRPOTrainer(
            model=with_shared_prompts(),
            processing_class=tokenizer,
            env=rlvr.Environment(
                name="long prompts",
                train_dataset=[{"question": "long " * 20 + str(n)} for n in range(8)],
                rubric=rlvr.Rubric(lambda trajectory: float(sum(map(ord, trajectory.text)) % 7)),
            ),
            args=arguments(),
            callbacks=[ours],
            canary_every=100,  # its forwards come before all others then
        ).train()
    unsloths = train_by_unsloth(with_shared_prompts(), tokenizer, batches, arguments())
    with patch("unsloth.utils.prefix_grouper._ENABLED", False):  # as UNSLOTH_GRPO_PREFIX_GROUPER=0 sets it
        without = train_by_unsloth(with_shared_prompts(), tokenizer, batches, arguments())
    wanted = without.gradients[0]
    distances = [((forwards.gradients[0] - wanted).norm() / wanted.norm()).item() for forwards in (ours, unsloths)]
    found = {"ours": ours.shared, "unsloths": unsloths.shared, "without": without.shared, "distances": distances}
    print(json.dumps({"prompts": prompts, **found}))


def configure(loss_type):
    """The training arguments of a run, as Unsloth's class and `grpo_config` leave them."""
    from types import SimpleNamespace

    import torch

    from rlvr.config import TrainSettings
    from rlvr.tracking.run_folder import RunFolder
    from rlvr.trainers.arguments import grpo_config, training_arguments

    settings = TrainSettings(env="e", model="m", loss_type=loss_type, scale_rewards="group").resolved().planned()
    policy = SimpleNamespace(model=torch.nn.Linear(1, 1))
    policy.model.device = torch.device("cpu")
    backend = SimpleNamespace(training_arguments=lambda policy: ())
    arguments, _ = training_arguments(settings, policy, backend, RunFolder(Path(tempfile.mkdtemp())))
    config = grpo_config(arguments)
    names = ("loss_type", "scale_rewards", "epsilon", "epsilon_high", "mask_truncated_completions", "beta")
    is_unsloths = hasattr(config, "unsloth_num_chunks")
    print(json.dumps({"is_unsloths": is_unsloths, **{name: getattr(config, name) for name in names}}))


sys.path.insert(0, str(Path(__file__).parents[1]))
for loss_type in ("dapo", "dr_grpo", "cispo", "grpo"):
    configure(loss_type)
train("beta 0", with_adapter(), 0.0)
train("beta", with_adapter(), 0.1)
train("every weight", unlike_its_checkpoint(), 0.1)
evaluate()
train_with_tools()
for prompts in (1, 2):
    train_with_long_prompts(prompts)
