"""DocumentAttention against a plain loop over documents and heads: values and gradients."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from titan_ext.mobilemoe.attention import QUERY_BLOCK, SHORT_DOCUMENT, DocumentAttention, find_documents

HEADS, KV_HEADS, WIDTH = 6, 2, 16


def attend_by_loops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return causal attention [rows, heads, width] of documents that stand one after another.

    q is [rows, heads, width], k and v are [rows, kv heads, width]; `lengths` are those of the documents, in rows.
    """
    outs, begin = [], 0
    for length in lengths:
        rows = slice(begin, begin + length)
        begin += length
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = q[rows, head] @ k[rows, group].T / WIDTH**0.5
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
            heads.append(scores.softmax(-1) @ v[rows, group])
        outs.append(torch.stack(heads, 1))
    return torch.cat(outs)


def find_starts(rows: list[list[int]]) -> torch.Tensor | None:
    return find_documents(torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [[1], [1]],
        [[63, 65], [100, 28]],
        [[SHORT_DOCUMENT], [SHORT_DOCUMENT]],
        [[QUERY_BLOCK + 1, 300, 1], [130, 200, 100]],
        [[SHORT_DOCUMENT + 1, 50], [63, SHORT_DOCUMENT - 12]],
    ],
)
def test_documents_of_any_length(rows, compiled):
    torch.manual_seed(0)
    lengths = [length for row in rows for length in row]
    attention = DocumentAttention.Config().build()
    if compiled:
        attention.compile(backend="aot_eager", fullgraph=True)
    q, k, v = (torch.randn(sum(lengths), heads, WIDTH, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
    batch = (x.unflatten(0, (2, -1)) for x in (q, k, v))
    ours = attention(*batch, attention_masks=find_starts(rows), scale=None, enable_gqa=True)
    theirs = attend_by_loops(q, k, v, lengths)
    torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=1e-4, atol=1e-5)
    up = torch.randn_like(theirs)
    for mine, other in zip(
        torch.autograd.grad(ours.flatten(0, 1), (q, k, v), up), torch.autograd.grad(theirs, (q, k, v), up), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_bfloat16_stays_near_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    attention = DocumentAttention.Config().build()
    ours = attention(*(x.bfloat16()[None] for x in (q, k, v)), attention_masks=None)[0].float()
    theirs = attend_by_loops(q, k, v, [300])
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_gradient_of_bfloat16_in_a_graph_stays_near_autograds():
    torch.manual_seed(0)
    starts_BL = find_starts([[200, 100]])
    q, k, v = (torch.randn(1, 300, heads, WIDTH).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS))
    up, results = torch.randn_like(q), []
    for compiled in (False, True):
        attention = DocumentAttention.Config().build()
        if compiled:
            attention.compile(backend="aot_eager", fullgraph=True)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(attention(*inputs, attention_masks=starts_BL), inputs, up))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and (one - other).norm() < 0.01 * other.norm()


def test_other_lengths_need_no_other_graph():
    """Two graphs: one for rows of a single document, and one for packed rows of any lengths."""
    counter = CompileCounterWithBackend("aot_eager")
    attention = DocumentAttention.Config().build()
    attention.compile(backend=counter, fullgraph=True)
    q, k, v = (torch.randn(2, 128, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for rows in ([[128], [128]], [[64, 64], [128]], [[3, 5, 120], [1, 127]], [[60, 8, 60], [100, 28]], [[128], [128]]):
        attention(q, k, v, attention_masks=find_starts(rows))
    assert counter.frame_count == 2
