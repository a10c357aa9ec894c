"""Expected plans are worked out by hand: prompts × G = batch size × accumulation × processes."""

import pytest

from rlvr.batches import BatchPlan, batch_plan, shared_batch_size


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ({"num_generations": 8}, (8, 8, 8)),
        ({"num_generations": 4}, (8, 4, 8)),
        ({"num_generations": 13}, (8, 13, 8)),
        ({"num_generations": 3}, (6, 4, 8)),  # whole groups where that can be
        ({"num_generations": 8, "usual_batch_size": 32}, (32, 2, 8)),
        ({"num_generations": 8, "usual_batch_size": 22}, (16, 4, 8)),
        ({"num_generations": 64, "usual_batch_size": 22}, (16, 32, 8)),
        ({"num_generations": 8, "batch_size": 4}, (4, 16, 8)),
        ({"num_generations": 8, "batch_size": 12}, (12, 4, 6)),
        ({"num_generations": 8, "batch_size": 64}, (64, 1, 8)),
        ({"num_generations": 8, "batch_size": 512}, (512, 1, 64)),
        ({"num_generations": 8, "batch_size": 1}, (1, 64, 8)),
        ({"num_generations": 8, "gradient_accumulation_steps": 1}, (8, 1, 1)),
        ({"num_generations": 16, "gradient_accumulation_steps": 1}, (16, 1, 1)),
        ({"num_generations": 6, "gradient_accumulation_steps": 4}, (6, 4, 4)),
        ({"num_generations": 8, "prompts_per_step": 1}, (8, 1, 1)),
        ({"num_generations": 6, "prompts_per_step": 3}, (6, 3, 3)),
        ({"num_generations": 8, "prompts_per_step": 4, "batch_size": 16}, (16, 2, 4)),
        ({"num_generations": 8, "prompts_per_step": 4, "gradient_accumulation_steps": 2}, (16, 2, 4)),
        ({"num_generations": 8, "batch_size": 8, "gradient_accumulation_steps": 2, "prompts_per_step": 2}, (8, 2, 2)),
        ({"num_generations": 8, "processes": 2}, (8, 4, 8)),
        ({"num_generations": 8, "processes": 3}, (8, 8, 24)),
        ({"num_generations": 8, "batch_size": 2, "gradient_accumulation_steps": 2, "processes": 4}, (2, 2, 2)),
    ],
)
def test_sizes_that_were_not_given_follow_from_the_others(given, plan):
    assert batch_plan(**given) == BatchPlan(*plan)
    completed = dict(zip(("batch_size", "gradient_accumulation_steps", "prompts_per_step"), plan, strict=True))
    assert batch_plan(**{**given, **completed}) == BatchPlan(*plan)  # a resolved plan stays what it is


@pytest.mark.parametrize(
    ("group", "prompt", "completion", "rows"),
    [
        (8, 2048, 256, 32),  # 8 × 2,304 = 18,432 tokens; a group has 2,048 + 8 × 256 = 4,096: four
        (8, 2048, 1024, 16),  # 24,576; 10,240: two
        (64, 2048, 1024, 22),  # not one group of 67,584: a prompt and 22 completions
        (8, 16, 1024, 8),  # nothing to share
        (8, 2048, 1, 32),
    ],
)
def test_a_micro_batch_with_shared_prompts_has_no_more_tokens_than_8_padded_rows(group, prompt, completion, rows):
    assert shared_batch_size(num_generations=group, prompt_tokens=prompt, completion_tokens=completion) == rows


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"num_generations": 8, "batch_size": 3, "gradient_accumulation_steps": 1},
            ["= 3 completions a step", "num_generations 8 does not divide", "a multiple of 8"],
        ),
        (
            {"num_generations": 8, "batch_size": 12, "gradient_accumulation_steps": 1},
            ["= 12 completions", "a multiple of 2"],
        ),
        (
            {"num_generations": 8, "prompts_per_step": 3, "batch_size": 16},
            ["= 24 completions a step", "batch_size 16 does not divide", "--batch-size 12"],
        ),
        (
            {"num_generations": 8, "prompts_per_step": 3, "gradient_accumulation_steps": 5},
            ["= 24 completions a step", "gradient_accumulation_steps 5 does not divide"],
        ),
        (
            {"num_generations": 8, "prompts_per_step": 2, "batch_size": 8, "gradient_accumulation_steps": 3},
            ["prompts_per_step 2 × num_generations 8 = 16", "8 × gradient_accumulation_steps 3 = 24", "Leave one"],
        ),
        ({"num_generations": 3, "prompts_per_step": 1, "processes": 2}, ["3 completions", "2 processes evenly"]),
    ],
)
def test_sizes_that_contradict_each_other_are_said(given, says):
    problem = batch_plan(**given)
    assert isinstance(problem, str)
    for words in says:
        assert words in problem
