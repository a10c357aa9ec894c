"""Attention that is computed over some keys and then over more, against one softmax over all of them."""

import pytest
import torch

from rlvr.fused.flash import join

pytestmark = pytest.mark.both


def attention(query, key, value):
    """(N, H, D) over all keys, and log Σ exp of the scores (H, N)."""
    scores = torch.einsum("nhd,mhd->hnm", query, key)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), value), scores.logsumexp(-1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("layout", ["rows first", "heads first"])  # the kernel gives the output its queries' layout
@pytest.mark.parametrize("shape", [(4, 16), (3, 80), (12, 128)], ids=str)
def test_joined_attention_is_attention_over_all_keys(shape, layout, dtype, tolerance, device):
    heads, width = shape

    def laid_out(tensor):
        tensor = tensor.to(dtype)
        return tensor.transpose(0, 1).contiguous().transpose(0, 1) if layout == "heads first" else tensor.contiguous()

    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(count, heads, width, generator=generator).div(width**0.25).to(device) for count in (40, 30, 30)
    )
    rows = torch.tensor([0, 3, 4, 17, 39], device=device)
    output, logsumexp = attention(query, key[:10], value[:10])
    expected, expected_sum = attention(query, key[:10], value[:10])
    expected[rows], expected_sum[:, rows] = attention(query[rows], key, value)
    more, more_sum = attention(query[rows], key[10:], value[10:])
    output = laid_out(output)
    join(output, logsumexp, rows, laid_out(more), more_sum)
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logsumexp, expected_sum)
