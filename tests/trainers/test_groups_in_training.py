"""Which rows a micro-batch of the trainer has: those of one prompt together, so that it is computed once."""

import pytest
from datasets import Dataset
from tests_support import grpo_config

from rlvr.testing.tiny import tiny_model
from rlvr.trainers import EnhancedGRPOTrainer

PROMPTS = ["say one", "say two", "say six", "say ten"]  # 7 tokens each: a byte is a token


def five_tokens(prompts, trainer):
    """A completion for every prompt, no two the same, with its end."""
    tokenizer = trainer.processing_class
    completions = [[40 + row, 80, 81, 82, tokenizer.eos_token_id] for row in range(len(prompts))]
    return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": completions, "logprobs": None}


class Counting(EnhancedGRPOTrainer):
    """Keeps what each micro-batch's forward computes: (tokens, tokens of the padded forward)."""

    def compute_loss(self, *args, **kwargs):
        before = self.tokens_computed, self.tokens_padded
        loss = super().compute_loss(*args, **kwargs)
        self.counts.append((self.tokens_computed - before[0], self.tokens_padded - before[1]))
        return loss


@pytest.mark.parametrize(("generations", "prompts_of_micro_batches"), [(4, [1, 1, 1]), (6, [1, 2, 1])])
def test_rows_of_a_prompt_stay_together(tmp_path, tokenizer, generations, prompts_of_micro_batches):
    """Three micro-batches of 4 rows: three groups of 4, or two groups of 6, each of them cut once."""
    config = {"num_generations": generations, "gradient_accumulation_steps": 3, "max_steps": 3}
    trainer = Counting(
        model=tiny_model(), processing_class=tokenizer, rollout_func=five_tokens, shared_prefix="on",
        reward_funcs=lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids],
        args=grpo_config(tmp_path, per_device_train_batch_size=4, **config),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )  # fmt: skip
    trainer.counts = []
    trainer.train()
    # of a prompt all but its last token; of a row the prompt's last token and all but the last of its completion
    step = [(6 * prompts + 4 * 5, 4 * (7 + 5)) for prompts in prompts_of_micro_batches]
    assert trainer.counts == step * 3
