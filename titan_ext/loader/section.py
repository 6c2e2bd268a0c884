"""A section: neighbouring lanes of the global batch that share one queue of documents of every domain.

The queue is shared, so its lanes cannot drift apart, however different the lengths of their documents are. A section
reads shards of its own (`titan_ext.loader.order`), so what it packs depends on no other section. The ranks that have
lanes of one section all pack the whole section, and so need no communication.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

from titan_ext.loader.domain import Domain
from titan_ext.loader.order import BEGIN, Place
from titan_ext.loader.packing import Lane, LaneState, Segment


@dataclass
class SectionState:
    """The state from which a section resumes at the next global batch."""

    places: list[Place]
    """Place of the next document, by domain."""
    draws: list[int]
    """Number of documents drawn, by domain."""
    lanes: list[LaneState]

    @classmethod
    def begin(cls, num_domains: int, num_lanes: int) -> "SectionState":
        """Return the state before the first batch."""
        zeros = [0] * num_domains
        lanes = [LaneState(tokens=list(zeros)) for _ in range(num_lanes)]
        return cls([BEGIN] * num_domains, zeros, lanes)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON-ready lists and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "SectionState":
        """Return the state that `to_dict` returned."""
        lanes = [LaneState(**{**lane, "place": Place(*lane["place"])}) for lane in state["lanes"]]
        return cls([Place(*place) for place in state["places"]], state["draws"], lanes)


class Section:
    """The lanes of a section and the queues that they share.

    Attributes:
        queues: the queue of each domain.
    """

    def __init__(
        self,
        index: int,
        domains: Sequence[Domain],
        weights: Sequence[float],
        seq_len: int,
        initial_deficits: Sequence[Sequence[float]],
        state: SectionState,
        *,
        single_pass: bool = False,
        fetch_ahead: bool = True,
    ):
        """Continue after `state`.

        Args:
            index: number of the section.
            domains: the domains of the mixture.
            weights: share of the tokens by domain.
            seq_len: number of tokens of a sequence.
            initial_deficits: of each lane of the section, by domain (`packing.compute_initial_deficits`).
            state: where the section stands.
            single_pass: draw every document of the first epoch once.
            fetch_ahead: fetch shards before they are in use.
        """
        self.queues = [
            domain.open_queue(index, place, fetch_ahead=fetch_ahead)
            for domain, place in zip(domains, state.places, strict=True)
        ]
        self._lanes = [
            Lane(self.queues, weights, seq_len, single_pass, deficits, lane)
            for deficits, lane in zip(initial_deficits, state.lanes, strict=True)
        ]
        self._draws = state.draws

    @property
    def state(self) -> SectionState:
        """Return a copy of the present state."""
        drawn = [before + queue.num_drawn for before, queue in zip(self._draws, self.queues, strict=True)]
        return SectionState(
            [queue.place for queue in self.queues], drawn, [deepcopy(lane.state) for lane in self._lanes]
        )

    def next_sequences(self) -> list[list[Segment]]:
        """Return the segments of each lane's next sequence (`Lane.next_sequence`)."""
        return [lane.next_sequence() for lane in self._lanes]
