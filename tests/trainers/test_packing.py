"""Packed rows and attention over them: by hand, and the flash kernel's two parts against SDPA by group."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from padded_twin import assert_parity, even_batch, gradients, prepare, ragged_batch
from torch.nn.functional import scaled_dot_product_attention

from rlvr.fused import flash
from rlvr.testing.tiny import tiny_model
from rlvr.trainers.shared_prefix import SUPPORTED_MODEL_TYPES, attention, group_order, pack_rows, shared_prefix_logps
from rlvr.trainers.shared_prefix.attention import TreeLayout, _Spread, tree_attention
from rlvr.trainers.shared_prefix.packing import IGNORED, Group


def test_packing_by_hand():
    input_ids = torch.tensor([[0, 11, 12, 21, 22, 9], [5, 6, 7, 31, 9, 9], [0, 11, 12, 41, 9, 9]])
    attention_mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]])
    packed = pack_rows(input_ids, attention_mask, 3)
    assert packed.groups == (Group(0, 1, (2, 1)), Group(4, 2, (1,)))
    assert packed.input_ids.tolist() == [[11, 12, 21, 12, 5, 6, 7]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 1, 0, 1, 2]]
    assert packed.labels.tolist() == [[IGNORED, 21, 22, 41, IGNORED, IGNORED, 31]]
    assert (packed.padded_tokens, packed.packed_tokens) == (18, 7)
    values = torch.tensor([[0.0, 1, 2, 3, 0, 0, 4]])
    assert packed.unpack(values, 3, 3).tolist() == [[1, 2, 0], [4, 0, 0], [3, 0, 0]]


def test_prompts_that_differ_only_in_padding_are_told_apart():
    """A prompt that starts with the padding token is not the shorter prompt without it."""
    input_ids = torch.tensor([[0, 11, 12, 21], [0, 11, 12, 21]])
    attention_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert [group.trunk for group in pack_rows(input_ids, attention_mask, 1).groups] == [1, 2]


def test_token_savings_of_the_reference_shape():
    """8 completions of 256 tokens on one prompt of 2,048: 4,095 tokens instead of 18,432."""
    input_ids = torch.arange(2304).repeat(8, 1)
    packed = pack_rows(input_ids, torch.ones_like(input_ids), 256)
    assert (packed.packed_tokens, packed.padded_tokens) == (2047 + 8 * 256, 8 * 2304)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("batch", [ragged_batch(), even_batch()], ids=["ragged", "even"])
def test_segments_for_the_flash_kernel_say_the_same(batch, window):
    """Attention segment by segment, as the variable-length kernel computes it, equals attention by group."""
    groups = pack_rows(*batch).groups
    layout = TreeLayout.of(groups, torch.device("cpu"))
    segments, key_index = layout.segments
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, groups[-1].end, 8, generator=generator) for heads in (4, 2, 2))
    parts = []
    for i in range(len(segments.query_starts) - 1):
        rows = slice(segments.query_starts[i], segments.query_starts[i + 1])
        keys = key_index[segments.key_starts[i] : segments.key_starts[i + 1]]
        position = torch.arange(len(keys))
        distance = position[len(keys) - (rows.stop - rows.start) :, None] - position
        mask = (distance >= 0) & (distance < (window or 10**6))
        q, k, v = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True))
        assert len(keys) <= segments.longest_key == layout.longest
        assert rows.stop - rows.start <= segments.longest_query
    expected = torch.cat(parts, 2).transpose(1, 2)
    actual = tree_attention(query, key, value, layout, scale=0.3, sliding_window=window)
    torch.testing.assert_close(actual, expected)


class PlainFlash:
    """The two flash functions in plain torch, segment by segment, with the kernel's contract: the backward pass takes
    output and sum of exponentials as they are given."""

    @staticmethod
    def pieces(query, key, segments, scale, causal):
        """(queries, keys, scores (H, n, m)) of each segment."""
        for i in range(len(segments.query_starts) - 1):
            rows = slice(segments.query_starts[i], segments.query_starts[i + 1])
            keys = slice(segments.key_starts[i], segments.key_starts[i + 1])
            assert 0 < rows.stop - rows.start <= segments.longest_query
            assert 0 < keys.stop - keys.start <= segments.longest_key
            repeated = key[keys].repeat_interleave(query.shape[1] // key.shape[1], 1)
            scores = scale * torch.einsum("nhd,mhd->hnm", query[rows], repeated)
            if causal:
                scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
            yield rows, keys, scores

    @classmethod
    def varlen_forward(cls, query, key, value, segments, *, scale, causal):
        output, logsumexp = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query))
        for rows, keys, scores in cls.pieces(query, key, segments, scale, causal):
            repeated = value[keys].repeat_interleave(query.shape[1] // value.shape[1], 1)
            output[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), repeated)
            logsumexp[:, rows] = scores.logsumexp(-1)
        return output, logsumexp

    @classmethod
    def varlen_backward(cls, grad, query, key, value, output, logsumexp, segments, *, scale, causal):
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        repeats = query.shape[1] // key.shape[1]
        for rows, keys, scores in cls.pieces(query, key, segments, scale, causal):
            weights = (scores - logsumexp[:, rows, None]).exp()
            of_weights = torch.einsum("nhd,mhd->hnm", grad[rows], value[keys].repeat_interleave(repeats, 1))
            of_output = (grad[rows] * output[rows]).sum(-1).t()[..., None]
            of_scores = scale * weights * (of_weights - of_output)
            repeated = key[keys].repeat_interleave(repeats, 1)
            grads[0][rows] = torch.einsum("hnm,mhd->nhd", of_scores, repeated)
            for whole, part in (
                (grads[1], torch.einsum("hnm,nhd->mhd", of_scores, query[rows])),
                (grads[2], torch.einsum("hnm,nhd->mhd", weights, grad[rows])),
            ):
                whole[keys] = part.unflatten(1, (-1, repeats)).sum(2)
        return grads


@pytest.fixture
def plain_flash(monkeypatch):
    """The flash kernel's ways, computed in plain torch. Says how often each of the two was gone."""
    gone = Counter()
    monkeypatch.setattr(flash, "varlen_forward", PlainFlash.varlen_forward)
    monkeypatch.setattr(flash, "varlen_backward", PlainFlash.varlen_backward)
    monkeypatch.setattr(flash, "takes", lambda query: True)
    monkeypatch.setattr(TreeLayout, "of", lambda groups, device, use_flash=True: TreeLayout(groups, device, use_flash))
    for way in ("split_flash", "_repeated_flash"):
        own = getattr(attention, way)
        monkeypatch.setattr(
            attention, way, lambda *args, _own=own, _way=way, **kw: gone.update([_way]) or _own(*args, **kw)
        )
    return gone


@pytest.mark.parametrize(
    "groups",
    [
        pack_rows(*ragged_batch()).groups,
        pack_rows(*even_batch()).groups,
        (Group(0, 0, (3,)), Group(3, 0, (1, 2))),  # prompts of one token have no trunk
    ],
    ids=["ragged", "even", "no trunk"],
)
def test_attention_in_two_parts_equals_attention_by_group(groups, plain_flash):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, groups[-1].end, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    outputs = [
        tree_attention(*tensors, TreeLayout(groups, torch.device("cpu"), use_flash), scale=0.3)
        for use_flash in (True, False)
    ]
    assert plain_flash == {"split_flash": 1}
    torch.testing.assert_close(*outputs)
    weights = torch.randn(outputs[0].shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((output * weights).sum(), tensors) for output in outputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("architecture", sorted(SUPPORTED_MODEL_TYPES))
def test_parity_with_attention_in_two_parts(architecture, plain_flash):
    """Queries come in whatever memory layout the architecture gives them."""
    oracle, model = prepare(tiny_model(architecture), checkpointing=True)
    assert_parity(oracle, model, ragged_batch())
    assert set(plain_flash) == {"split_flash"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_that_is_kept_is_computed_once(plain_flash, monkeypatch, reentrant):
    """Its gradients are those of attention that is computed again, bit for bit; also of two forwards at a time."""
    forwards, ways = [], {}
    own = flash.varlen_forward
    monkeypatch.setattr(flash, "varlen_forward", lambda *args, **kw: forwards.append(1) or own(*args, **kw))
    monkeypatch.setattr(attention, "free_on_gpu", lambda device: 2**40)
    for keep in (False, True):
        _, model = prepare(tiny_model(), checkpointing=True)
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        passes = [
            shared_prefix_logps(model, *batch, compute_entropy=True, keep_attention=keep)[:2]
            for batch in (ragged_batch(), even_batch())
        ]
        logps, entropies = (torch.cat([values.flatten() for values in part]) for part in zip(*passes, strict=True))
        ways[keep] = logps, gradients(model, logps, entropies), len(forwards)
        forwards.clear()
    calls = 2 * 2 * tiny_model().config.num_hidden_layers  # two forwards, of two calls of the kernel a layer
    assert (ways[False][2], ways[True][2]) == (2 * calls, calls)
    assert torch.equal(ways[True][0], ways[False][0])
    assert ways[False][1]
    for name, gradient in ways[False][1].items():
        assert torch.equal(ways[True][1][name], gradient), name


def test_attention_is_kept_where_it_takes_a_quarter_of_the_free_memory(plain_flash, monkeypatch):
    layouts = []
    _, model = prepare(tiny_model(layers=3, hidden_size=32, heads=4, kv_heads=2), checkpointing=True)
    monkeypatch.setattr(
        attention,
        "tree_attention",
        lambda *args, own=tree_attention, **kw: layouts.append(args[3]) or own(*args, **kw),
    )
    batch = ragged_batch()
    needed = pack_rows(*batch).packed_tokens * 3 * 4 * (8 * 4 + 4)  # tokens, layers, heads; float32 numbers and a sum
    for free, asked, kept in ((4 * needed, True, True), (4 * needed - 1, True, False), (4 * needed, False, False)):
        monkeypatch.setattr(attention, "free_on_gpu", lambda device, free=free: free)
        shared_prefix_logps(model, *batch, keep_attention=asked)
        assert all((layout.kept is not None) == kept for layout in layouts[-3:])
    shared_prefix_logps(model, *batch, flash=False, keep_attention=True)  # nothing is asked for that no kernel gives
    assert layouts[-1].kept is None
    assert len(layouts) == 4 * 3


def test_a_window_that_cuts_a_prompt_takes_the_other_way(plain_flash, monkeypatch):
    monkeypatch.setattr(flash, "varlen_flash", lambda query, *args, **kwargs: query)
    groups = pack_rows(*ragged_batch()).groups
    layout = TreeLayout(groups, torch.device("cpu"), True)
    query, key, value = (torch.randn(1, heads, groups[-1].end, 8) for heads in (4, 2, 2))
    for window in (None, layout.longest, layout.longest - 1):
        tree_attention(query, key, value, layout, scale=1.0, sliding_window=window)
    assert plain_flash == {"split_flash": 2, "_repeated_flash": 1}


def test_gradients_of_repeated_keys_are_rounded_once():
    index = torch.tensor([0, 1, 0, 2] + [0] * 100)
    x = torch.randn(3, 2, 4).to(torch.bfloat16).requires_grad_()
    rows = _Spread.apply(x, index)
    assert torch.equal(rows, x[index])
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows.backward(grad)
    exact = torch.zeros(3, 2, 4, dtype=torch.float64).index_add_(0, index, grad.double())
    torch.testing.assert_close(x.grad, exact.to(torch.bfloat16))


def test_group_order_keeps_groups_together():
    keys = [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    orders = [group_order(keys, torch.Generator().manual_seed(seed)).tolist() for seed in range(20)]
    for order in orders:
        assert sorted(order) == list(range(10))
        ordered = [keys[row] for row in order]
        assert sum(a != b for a, b in pairwise(ordered)) == 3
    assert len({tuple(order) for order in orders}) > 15
    assert len({keys[order[0]] for order in orders}) > 1
    assert group_order([]).tolist() == []


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "branches", [[(5, 1, 7), (2,)], [(1, 1, 1), (1,)], [(3,) * 64, (70, 130)]], ids=["ragged", "one token", "many"]
)
@pytest.mark.parametrize("trunks", [(0, 1), (200, 70)], ids=str)
def test_flash_in_two_parts_on_a_gpu(trunks, branches, dim):
    """Output and gradients against SDPA by group in float32; queries and gradients in layouts that models give."""
    groups, start = [], 0
    for trunk, lengths in zip(trunks, branches, strict=True):
        groups.append(Group(start, trunk, lengths))
        start = groups[-1].end
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, start, dim, generator=generator).to("cuda", torch.bfloat16) for heads in (6, 2, 2)
    ]
    weights = torch.randn(1, start, 6, dim, generator=generator).to("cuda", torch.bfloat16)
    results = []
    for dtype, use_flash in ((torch.bfloat16, True), (torch.float32, False)):
        layout = TreeLayout(tuple(groups), torch.device("cuda"), use_flash)
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        output = tree_attention(*leaves, layout, scale=dim**-0.5)
        results.append([output, *torch.autograd.grad((output * weights.to(dtype)).sum(), leaves)])
    for ours, truth in zip(*results, strict=True):
        assert (ours.float() - truth).norm() <= 1e-2 * truth.norm() + 1e-3
