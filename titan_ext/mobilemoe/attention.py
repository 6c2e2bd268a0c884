"""Attention of MobileMoE: GQA, interleaved RoPE, then RMS normalisation of q and k without weights.

`Attention` is the layer. `DocumentAttention` computes its attention on the CPU, where flex attention has no backward
pass and varlen does not run.

Shape suffixes: B batch, L sequence, D model dimension, N heads, K heads of keys and values, G = N / K, H head
dimension, M queries of a block, S keys they can see.
"""

from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.models.common.attention import GQAttention
from torchtitan.protocols.module import Module

from titan_ext.compat import all_gather_tensor, all_gather_tensor_autograd


def mask_documents(positions_BL: torch.Tensor) -> torch.Tensor:
    """Return the causal mask of packed documents, which do not attend to each other.

    A position of 0 starts a document, which is also the rule of torchtitan's flex and varlen masks.

    Args:
        positions_BL: int64, position of every token in its document.

    Returns:
        bool [B, 1, L, L], True where the query (row) may attend to the key (column).
    """
    L = positions_BL.shape[1]
    document_BL = torch.cumsum(positions_BL == 0, dim=1)
    same_document_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    causal_LL = torch.ones(L, L, dtype=torch.bool, device=positions_BL.device).tril()
    return (same_document_BLL & causal_LL)[:, None]


def mask_rank_documents(positions_BL: torch.Tensor, cp_mesh: DeviceMesh) -> torch.Tensor:
    """Return this rank's rows of `mask_documents` for sequences that are split over the ranks of `cp_mesh`.

    A collective: every rank of the mesh must call it.

    Args:
        positions_BL: int64, positions of this rank's part of the sequences, L tokens each.
        cp_mesh: mesh of context parallelism; rank i has part i of every sequence.

    Returns:
        bool [B, 1, L, L * ranks].
    """
    L, rank = positions_BL.shape[1], cp_mesh.get_local_rank()
    all_positions_BS = all_gather_tensor(positions_BL, 1, cp_mesh)
    return mask_documents(all_positions_BS)[:, :, rank * L : (rank + 1) * L]


def find_documents(positions_BL: torch.Tensor) -> torch.Tensor | None:
    """Return where the documents of a batch start, bool [B, L]: at every position of 0 and at the start of every row.

    None: every row is one document.
    """
    with spmd.no_typecheck():  # the answer is this rank's own, so torchtitan's type checker cannot follow it
        starts_BL = positions_BL == 0
        starts_BL[:, 0] = True
        return starts_BL if starts_BL[:, 1:].any() else None


class DocumentAttention(Module):
    """Causal scaled dot-product attention, one document at a time. The CPU uses it in place of flex and varlen.

    torchtitan's own ScaledDotProductAttention is causal only, so packed documents would attend to each other. One call
    for each document costs a fraction of one call under a mask, because that call also computes all products which the
    mask then hides.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()
        self.cp_mesh: DeviceMesh | None = None

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: torch.Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Return the attention's output [B, L, N, H].

        Args:
            attention_masks: starts of the documents, from `find_documents`; None: every row is one document. Under
                context parallelism, where a document may lie on several ranks, the mask from `mask_rank_documents`.
            scale: factor of the scores; None: 1 / sqrt(H).
            enable_gqa: ignored; torchtitan passes it, and the heads of keys and values are always grouped.
        """
        if self.cp_mesh is not None:  # this rank's queries attend to the keys and values of all ranks
            k_BLNH, v_BLNH = (all_gather_tensor_autograd(x, 1, self.cp_mesh) for x in (k_BLNH, v_BLNH))
            return _attend(q_BLNH, k_BLNH, v_BLNH, scale, mask=attention_masks)
        if attention_masks is None:
            return _attend_causally(q_BLNH, k_BLNH, v_BLNH, scale)
        if torch.compiler.is_compiling():
            scale = q_BLNH.shape[-1] ** -0.5 if scale is None else scale
            return attend_documents(q_BLNH, k_BLNH, v_BLNH, attention_masks, scale)
        return _attend_by_documents(q_BLNH, k_BLNH, v_BLNH, attention_masks, scale)


def _measure_documents(starts_BL: torch.Tensor) -> list[int]:
    """Return the number of tokens of every document, row after row, for their starts bool [B, L]."""
    starts = starts_BL.flatten().nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([starts_BL.numel()])).tolist()


def _attend_by_documents(
    q_BLNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, starts_BL: torch.Tensor, scale: float | None
) -> torch.Tensor:
    with spmd.no_typecheck():  # the lengths are this rank's own
        lengths = _measure_documents(starts_BL)
    documents = zip(*(x.flatten(0, 1).split(lengths) for x in (q_BLNH, k_BLKH, v_BLKH)), strict=True)
    outs = [_attend_causally(q[None], k[None], v[None], scale)[0] for q, k, v in documents]
    return torch.cat(outs).unflatten(0, q_BLNH.shape[:2])


@torch.library.custom_op("titan_ext::attend_documents", mutates_args=())
def attend_documents(
    q_BLNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, starts_BL: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return causal attention [B, L, N, H], one document at a time, as one operation of a compiled graph.

    torch.compile does not look into it. If it did, it would compile a graph for every list of lengths.

    Args:
        starts_BL: bool, where documents start, from `find_documents`.
        scale: factor of the scores.
    """
    return _attend_by_documents(q_BLNH, k_BLKH, v_BLKH, starts_BL, scale)


@attend_documents.register_fake
def _(
    q_BLNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, starts_BL: torch.Tensor, scale: float
) -> torch.Tensor:
    return torch.empty_like(q_BLNH, memory_format=torch.contiguous_format)


@torch.library.custom_op("titan_ext::attend_documents_backward", mutates_args=())
def attend_documents_backward(
    grad_BLNH: torch.Tensor,
    q_BLNH: torch.Tensor,
    k_BLKH: torch.Tensor,
    v_BLKH: torch.Tensor,
    starts_BL: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v of `attend_documents`, which keeps no probabilities.

    Autograd does not reach into an operation of a graph, so they are written out, for a block of queries at a time.
    """
    lengths = _measure_documents(starts_BL)
    tensors = (grad_BLNH, q_BLNH, k_BLKH, v_BLKH)
    documents = zip(*(x.flatten(0, 1).split(lengths) for x in tensors), strict=True)
    grads = zip(*(_differentiate_document(grad, q, k, v, scale) for grad, q, k, v in documents), strict=True)
    return tuple(torch.cat(parts).view(x.shape).to(x.dtype) for parts, x in zip(grads, tensors[1:], strict=True))  # type: ignore[return-value]  # three of them


def _differentiate_document(
    grad_LNH: torch.Tensor, q_LNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of one document; those of k and v are summed in float32."""
    K, G = k_LKH.shape[1], q_LNH.shape[1] // k_LKH.shape[1]
    k_KLH, v_KLH = k_LKH.transpose(0, 1), v_LKH.transpose(0, 1)
    grad_k_KLH, grad_v_KLH = (torch.zeros_like(x, dtype=torch.float32) for x in (k_KLH, v_KLH))
    grads_q = []
    end = 0
    for q_MNH, grad_MNH in zip(q_LNH.split(QUERY_BLOCK), grad_LNH.split(QUERY_BLOCK), strict=True):
        begin, end = end, end + len(q_MNH)
        # Queries of one group of heads stand below each other: rows M * G.
        q_KRH, grad_KRH = (x.unflatten(1, (K, G)).transpose(0, 1).flatten(1, 2) for x in (q_MNH * scale, grad_MNH))
        hidden_MS = q_LNH.new_full((end - begin, end), -torch.inf).triu(begin + 1)
        scores_KRS = q_KRH @ k_KLH[:, :end].mT + hidden_MS.repeat_interleave(G, 0)
        share_KRS = scores_KRS.softmax(-1)
        grad_v_KLH[:, :end] += share_KRS.mT @ grad_KRH
        grad_share_KRS = grad_KRH @ v_KLH[:, :end].mT
        mean_KR1 = (share_KRS * grad_share_KRS).sum(-1, keepdim=True, dtype=torch.float32)
        grad_scores_KRS = (share_KRS * (grad_share_KRS - mean_KR1)).to(q_LNH.dtype)
        grad_k_KLH[:, :end] += grad_scores_KRS.mT @ q_KRH
        grad_q_KRH = grad_scores_KRS @ k_KLH[:, :end] * scale
        grads_q.append(grad_q_KRH.unflatten(1, (-1, G)).transpose(0, 1).flatten(1, 2))
    return torch.cat(grads_q), grad_k_KLH.transpose(0, 1), grad_v_KLH.transpose(0, 1)


@attend_documents_backward.register_fake
def _(
    grad_BLNH: torch.Tensor,
    q_BLNH: torch.Tensor,
    k_BLKH: torch.Tensor,
    v_BLKH: torch.Tensor,
    starts_BL: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(  # type: ignore[return-value]  # three of them
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BLNH, k_BLKH, v_BLKH)
    )


def _keep_inputs(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_BLNH: torch.Tensor) -> tuple:
    return (*attend_documents_backward(grad_BLNH, *ctx.saved_tensors, ctx.scale), None, None)


attend_documents.register_autograd(_differentiate, setup_context=_keep_inputs)


def _attend_causally(
    q_BLNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, scale: float | None
) -> torch.Tensor:
    attend = _attend_in_blocks if q_BLNH.shape[1] <= SHORT_DOCUMENT else _attend
    return attend(q_BLNH, k_BLKH, v_BLKH, scale)


SHORT_DOCUMENT = 512
"""Number of tokens up to which a document goes through `_attend_in_blocks`. The shorter a document is, the faster that
is than PyTorch's flash kernel for the CPU; at 2,048 tokens it is not faster."""
QUERY_BLOCK = 128
"""Number of queries in a block of `_attend_in_blocks`."""
LENGTH_MULTIPLE = 64
"""Documents are padded to a multiple of it, because oneDNN prepares its kernels anew for every length (10 in
titan_ext/cpu)."""


def _attend_in_blocks(
    q_BLNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Compute causal attention as matrix products: each block of queries with the keys up to the block's end.

    This takes about half of the products that one causal mask over all queries takes. The products are also large
    enough for oneDNN to be fast, which the flash kernel's are not. Autograd keeps all probabilities for the backward
    pass, so the function is for short documents.
    """
    L, K, G = q_BLNH.shape[1], k_BLKH.shape[2], q_BLNH.shape[2] // k_BLKH.shape[2]
    if L % LENGTH_MULTIPLE:  # no query attends to the added keys, which come later; added queries are cut off below
        q_BLNH, k_BLKH, v_BLKH = (
            F.pad(x, (0, 0, 0, 0, 0, -L % LENGTH_MULTIPLE)) for x in (q_BLNH, k_BLKH, v_BLKH)
        )  # fmt: skip
    scale = q_BLNH.shape[-1] ** -0.5 if scale is None else scale
    q_BKLGH = (q_BLNH * scale).unflatten(2, (K, G)).transpose(1, 2)
    k_BKHL, v_BKLH = k_BLKH.permute(0, 2, 3, 1), v_BLKH.transpose(1, 2)
    outs: list[torch.Tensor] = []
    for q_BKMGH in q_BKLGH.split(QUERY_BLOCK, dim=2):
        begin = sum(out.shape[2] for out in outs)
        end = begin + q_BKMGH.shape[2]
        hidden_MS = q_BLNH.new_full((end - begin, end), -torch.inf).triu(begin + 1)
        scores_BKMGS = (q_BKMGH.flatten(2, 3) @ k_BKHL[..., :end]).unflatten(2, (-1, G)) + hidden_MS[:, None]
        out_BKMGH = scores_BKMGS.softmax(-1).flatten(2, 3) @ v_BKLH[:, :, :end]
        outs.append(out_BKMGH.unflatten(2, (-1, G)))
    return torch.cat(outs, 2).transpose(1, 2).flatten(2, 3)[:, :L]


def _attend(
    q_BLNH: torch.Tensor,
    k_BLKH: torch.Tensor,
    v_BLKH: torch.Tensor,
    scale: float | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention with PyTorch's kernel, under `mask` (bool [B, 1, L, S]) or, without one, causally."""
    q_BNLH, k_BKLH, v_BKLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
    out_BNLH = F.scaled_dot_product_attention(
        q_BNLH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out_BNLH.transpose(1, 2)


class Attention(GQAttention):
    """Grouped-query attention that normalises q and k after RoPE: RMS over the head dimension, no learned weights."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        norm_eps: float = 1e-5
        """Added to the mean square, so that the root is never 0."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.norm_eps = config.norm_eps

    def forward(
        self,
        x_BLD: torch.Tensor,
        attention_masks: object,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the layer's output [B, L, D] for x [B, L, D].

        Args:
            attention_masks: what the inner attention takes: flex's or varlen's mask, or `DocumentAttention`'s starts.
            positions: int64 [B, L], position of every token in its document; None: from 0 to L - 1.
        """
        q_BLNH, k_BLNH, v_BLNH = self.qkv_linear(x_BLD)
        q_BLNH, k_BLNH = self.rope(q_BLNH, k_BLNH, positions)
        q_BLNH = F.rms_norm(q_BLNH, (self.head_dim,), eps=self.norm_eps)
        k_BLNH = F.rms_norm(k_BLNH, (self.head_dim,), eps=self.norm_eps)
        out_BLNH = self.inner_attention(
            q_BLNH,
            k_BLNH,
            v_BLNH,
            attention_masks=attention_masks,
            scale=self.scaling,
            enable_gqa=self.enable_gqa,
        ).contiguous()
        return self.wo(out_BLNH.flatten(2))
