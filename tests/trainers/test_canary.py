"""The canary's own arithmetic; that it stops a run is tested with the trainer."""

from types import SimpleNamespace

import pytest
import torch

from rlvr.trainers.canary import _completions_of, bound_of


def test_columns_of_unsloths_trainer_are_found():
    """Rows padded by 0, 1 and 2, with two completion columns: moved to the left, and the last 2 + 2 columns kept."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    moved = torch.tensor([[-9.0, -9, 1, 2], [-9, 3, 4, -9], [5, 6, -9, -9]])
    assert _completions_of(moved, mask, 2).tolist() == [[1, 2], [3, 4], [5, 6]]
    as_trl = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    assert _completions_of(as_trl, mask, 2) is as_trl


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
