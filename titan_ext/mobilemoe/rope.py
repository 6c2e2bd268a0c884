"""Interleaved rotary positions (RoPE) with real numbers: the same bits as torchtitan's ComplexRoPE.

torch.compile leaves products of complex numbers to uncompiled kernels. Here each pair (a, b) of neighbouring dimensions
is rotated by its angle with cosine and sine: (a cos - b sin, a sin + b cos), in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchtitan.models.common import ComplexRoPE

from titan_ext.cpu.device import IS_CPU


class InterleavedRoPE(ComplexRoPE):
    """torchtitan's ComplexRoPE, whose cache [max_seq_len, dim] has cosine and sine of every angle side by side."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        pass

    cache: torch.Tensor

    def _precompute_cache(self) -> torch.Tensor:
        return torch.view_as_real(super()._precompute_cache()).flatten(-2)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "InterleavedRoPE":
        """Move the module as `nn.Module` does, but leave the cache in float32, as a cast leaves complex numbers.

        In bfloat16 late positions would have the angles of their neighbours.
        """
        cache = self.cache
        super()._apply(fn, recurse)
        if self.cache.dtype != cache.dtype:
            self.cache = cache.to(self.cache.device)
        return self

    @staticmethod
    def apply_rotary_emb(
        query: torch.Tensor, key: torch.Tensor, rope_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return query and key rotated, in their dtypes and shapes (batch, sequence, heads, head dimension).

        Args:
            rope_cache: float32, cosine and sine of every angle, (1 or batch, sequence, 1, head dimension).
        """
        pairs = rope_cache.unflatten(-1, (-1, 2))
        if IS_CPU and not torch.compiler.is_compiling():  # 13 in titan_ext/cpu/__init__.py
            return ComplexRoPE.apply_rotary_emb(query, key, torch.view_as_complex(pairs))
        cos, sin = pairs.unbind(-1)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)
