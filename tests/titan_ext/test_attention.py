"""DocumentAttention against a plain loop over documents and heads: values and gradients."""

import pytest
import torch

from titan_ext.mobilemoe.attention import QUERY_BLOCK, SHORT_DOCUMENT, DocumentAttention

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
def test_documents_of_any_length(rows):
    torch.manual_seed(0)
    lengths = [length for row in rows for length in row]
    q, k, v = (torch.randn(sum(lengths), heads, WIDTH, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
    batch = (x.unflatten(0, (2, -1)) for x in (q, k, v))
    ours = DocumentAttention.Config().build()(*batch, attention_masks=lengths, scale=None, enable_gqa=True)
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
    ours = attention(*(x.bfloat16()[None] for x in (q, k, v)), attention_masks=[300])[0].float()
    theirs = attend_by_loops(q, k, v, [300])
    assert (ours - theirs).norm() < 0.01 * theirs.norm()
