"""The GPUs that layouts are chosen for, and the network between them.

Of the H100 the peak in bfloat16 and the bandwidth of the memory were measured. All other figures are assumed: those of
the data sheets, times the share that the H100 was measured to reach (0.8 of the peak, 0.9 of the bandwidth) or that
NCCL is assumed to reach (0.8 of a link).
"""

from dataclasses import dataclass, replace
from typing import Literal

CardName = Literal["A100", "H100", "H200"]
REACHED_PEAK, REACHED_BANDWIDTH, REACHED_LINK = 0.8, 0.9, 0.8
"""Shares of a data sheet's figures."""
GPUS_PER_NODE = 8
"""Number of GPUs that are connected faster than nodes are."""


@dataclass(frozen=True)
class Card:
    """The memory of a GPU and the speeds that it reaches."""

    name: str = "H100"
    memory: int = 80_000_000_000
    """Bytes of its memory."""
    peak: float = 790e12
    """FLOPs a second of large bfloat16 products, measured."""
    float8_peak: float | None = 2 * 790e12
    """FLOPs a second of large float8 products; None where torch's grouped float8 product does not run."""
    float32_peak: float = 45e12
    """FLOPs a second of float32 products, assumed."""
    bandwidth: float = 3.0e12 * 0.85
    """Bytes a second: 3.0 TB/s measured, of which kernels are assumed to reach 85%."""
    link: float = 450e9 * REACHED_LINK
    """Bytes a second that it receives from the other GPUs of its node."""
    dense: float = 0.75
    """Share of the peak that dense products reach; this and the next are assumed."""
    grouped: float = 0.60
    attention: tuple[float, float] = (0.45, 0.35)
    """Shares that the forward and the backward pass of flex attention reach."""
    choice: float = 15e-9
    """Seconds a token of a layer's choice of experts, assumed: small kernels that sort, far from either peak."""


CARDS: dict[str, Card] = {
    "A100": Card(
        name="A100", peak=312e12 * REACHED_PEAK, float8_peak=None, float32_peak=15e12,
        bandwidth=2.04e12 * REACHED_BANDWIDTH * 0.85, link=300e9 * REACHED_LINK,
    ),
    "H100": Card(),
    "H200": Card(name="H200", memory=141_000_000_000, bandwidth=4.8e12 * REACHED_BANDWIDTH * 0.85),
}  # fmt: skip
"""The cards that a recipe may name, with 80 GB of memory or, H200, 141."""


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, `GPUS_PER_NODE` a node, and the network between the nodes."""

    card: Card = Card()
    network_gbits: float = 400.0
    """Gigabits a second that a GPU receives from other nodes: an eighth of what a node receives."""

    @property
    def network(self) -> float:
        """Return the bytes a second that a GPU receives from other nodes."""
        return self.network_gbits * 1e9 / 8 * REACHED_LINK


def describe_machine(gpu: str, network_gbits: float, memory: int | None = None) -> Machine:
    """Return the machine of a card's name, with another size of its memory where `memory` is given, in bytes."""
    card = CARDS[gpu]
    return Machine(card if memory is None else replace(card, memory=memory), network_gbits)
