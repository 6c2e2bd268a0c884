"""Attention of MobileMoE: GQA, interleaved RoPE, then RMS normalisation of q and k without weights.

Shape suffixes: B batch, L sequence, D model dimension, N heads, K heads of keys and values, G = N / K, H head
dimension, M queries of a block, S keys they can see.
"""

from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_gather_tensor, all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.models.common.attention import GQAttention
from torchtitan.protocols.module import Module


def document_mask(positions_BL: torch.Tensor) -> torch.Tensor:
    """Causal mask inside packed documents.

    A position of 0 starts a document; the same rule as torchtitan's flex and varlen masks.

    Args:
        positions_BL: int, position of every token in its document.

    Returns:
        bool [B, 1, L, L], True where the query (row) may attend to the key (column).
    """
    L = positions_BL.shape[1]
    document_BL = torch.cumsum(positions_BL == 0, dim=1)
    same_document_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    causal_LL = torch.ones(L, L, dtype=torch.bool, device=positions_BL.device).tril()
    return (same_document_BLL & causal_LL)[:, None]


def document_mask_of_rank(positions_BL: torch.Tensor, cp_mesh: DeviceMesh) -> torch.Tensor:
    """`document_mask` of a sequence that the ranks of `cp_mesh` share: the rows of this rank's L positions.

    Returns:
        bool [B, 1, L, L * ranks].
    """
    L, rank = positions_BL.shape[1], cp_mesh.get_local_rank()
    whole_BL = all_gather_tensor(positions_BL, 1, cp_mesh)
    return document_mask(whole_BL)[:, :, rank * L : (rank + 1) * L]


def document_lengths(positions_BL: torch.Tensor) -> list[int]:
    """Tokens of every document of a batch, row after row; a position of 0 and the start of a row start one."""
    with spmd.no_typecheck():  # a list of this rank's own lengths
        starts_BL = positions_BL == 0
        starts_BL[:, 0] = True
        starts = starts_BL.flatten().nonzero().flatten()
        return torch.diff(starts, append=starts.new_tensor([positions_BL.numel()])).tolist()


class DocumentAttention(Module):
    """Causal scaled dot-product attention, document by document: the CPU's stand-in for flex and varlen.

    torchtitan's own ScaledDotProductAttention is causal only, so packed documents would see each other. One call a
    document costs a fraction of one call under a mask, which computes what the mask then hides; short documents are
    not worth the flash kernel either.
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
        attention_masks: list[int] | torch.Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attention within the documents whose lengths are given (`document_lengths`; None: every row is one).

        Under context parallelism a mask instead (`document_mask_of_rank`), for a document may lie on several ranks.
        """
        if self.cp_mesh is not None:  # keys and values of the whole sequence, for this rank's queries
            k_BLNH, v_BLNH = (all_gather_tensor_autograd(x, 1, self.cp_mesh) for x in (k_BLNH, v_BLNH))
            return _attend(q_BLNH, k_BLNH, v_BLNH, scale, mask=attention_masks)
        B, L = q_BLNH.shape[:2]
        if attention_masks is None or attention_masks == [L] * B:
            return _attend_causally(q_BLNH, k_BLNH, v_BLNH, scale)
        documents = zip(*(x.flatten(0, 1).split(attention_masks) for x in (q_BLNH, k_BLNH, v_BLNH)), strict=True)
        outs = [_attend_causally(q[None], k[None], v[None], scale)[0] for q, k, v in documents]
        return torch.cat(outs).unflatten(0, (B, L))


def _attend_causally(
    q_BLNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, scale: float | None
) -> torch.Tensor:
    attend = _attend_in_blocks if q_BLNH.shape[1] <= SHORT_DOCUMENT else _attend
    return attend(q_BLNH, k_BLKH, v_BLKH, scale)


SHORT_DOCUMENT = 512
"""Up to this length `_attend_in_blocks`: the shorter a document, the more it gains on PyTorch's flash kernel for the
CPU; at 2,048 tokens it gains nothing."""
QUERY_BLOCK = 128
LENGTH_MULTIPLE = 64
"""Lengths are filled up to it, or oneDNN would prepare its kernels for every length anew (10 in titan_ext/cpu)."""


def _attend_in_blocks(
    q_BLNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention as plain products, a block of queries against the keys before its end.

    Half of the products under one causal mask over all queries, and unlike the flash kernel's large enough for
    oneDNN. Keeps the probabilities for the backward pass, which is why it is for short documents.
    """
    L, K, G = q_BLNH.shape[1], k_BLKH.shape[2], q_BLNH.shape[2] // k_BLKH.shape[2]
    if L % LENGTH_MULTIPLE:  # causality hides the added keys, and the added queries are cut off below
        q_BLNH, k_BLKH, v_BLKH = (
            F.pad(x, (0, 0, 0, 0, 0, -L % LENGTH_MULTIPLE)) for x in (q_BLNH, k_BLKH, v_BLKH)
        )  # fmt: skip
    scale = q_BLNH.shape[-1] ** -0.5 if scale is None else scale
    q_BKLGH = (q_BLNH * scale).unflatten(2, (K, G)).transpose(1, 2)
    k_BKHL, v_BKLH = k_BLKH.permute(0, 2, 3, 1), v_BLKH.transpose(1, 2)
    outs = []
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
    """PyTorch's kernel, under a mask or causally."""
    q_BNLH, k_BKLH, v_BKLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
    out_BNLH = F.scaled_dot_product_attention(
        q_BNLH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out_BNLH.transpose(1, 2)


class Attention(GQAttention):
    """GQA whose q and k are normalised after RoPE, by RMS over the head dimension, without learned weights."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        norm_eps: float = 1e-5

    def __init__(self, config: Config):
        super().__init__(config)
        self.norm_eps = config.norm_eps

    def forward(
        self,
        x_BLD: torch.Tensor,
        attention_masks: object,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
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
