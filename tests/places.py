"""Where the tests of exactness run: on a CPU in float32, and on a GPU in float32 and in bfloat16.

In float32 a fast path gives what its slow twin gives. In bfloat16 both round, so it is as near to the float32 truth
as its twin in bfloat16 is, within a factor.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch


class Place(NamedTuple):
    device: str
    dtype: torch.dtype

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    @property
    def sizes(self):
        """Of a tiny model: on a GPU as large as its kernels and matrix products want."""
        return {} if self.device == "cpu" else {"hidden_size": 192, "heads": 6, "kv_heads": 2}

    @property
    def of_trainer(self):
        """Arguments of a trainer: in bfloat16 by autocast, with weights in float32."""
        return {"use_cpu": self.device == "cpu", "bf16": not self.exact}

    def put(self, model):
        return model.to(self.device, self.dtype)


ON_CPU = Place("cpu", torch.float32)
CUDA_FLOAT32 = pytest.param(Place("cuda", torch.float32), id="cuda-float32", marks=pytest.mark.gpu)
CUDA_BFLOAT16 = pytest.param(Place("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu)
EXACT = [pytest.param(ON_CPU, id="cpu"), CUDA_FLOAT32]
PLACES = [*EXACT, CUDA_BFLOAT16]


def in_float32(model):
    """A copy with the same numbers, which computes the truth."""
    return copy.deepcopy(model).float()


def assert_as_near_to_the_truth(fast, twin, truth, *, slack=1e-3):
    """In bfloat16: at most 3 times as far from the float32 truth as the slow twin."""
    assert (fast - truth).abs().max() <= 3 * (twin - truth).abs().max() + slack
