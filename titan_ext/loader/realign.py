"""The order of data that a loader's state belongs to: whether another one may go on from it, and how.

A stage that is continued may have another mixture or other shards. A domain whose shards are the same keeps its place:
its documents go on where they were, and none comes twice. A domain whose shards are new begins with its first document.
The shares of the mixture are counted from here on, so that the new mixture does not make up for the old one.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from core.errors import RefusedInput
from titan_ext.loader.order import BEGIN
from titan_ext.loader.packing import LaneState
from titan_ext.loader.section import SectionState

REALIGNABLE = ("mixture", "shards")
"""Keys of a loader's order (`StreamingLoader._describe_order`) in which a state may differ that is realigned."""


def check_order(saved: dict[str, Any], own: dict[str, Any], may_differ: Collection[str]) -> None:
    """Check that a state's order of data is the loader's own.

    Args:
        saved: order that the state belongs to.
        own: order of the loader.
        may_differ: keys in which they may differ.

    Raises:
        RefusedInput: they differ in another key; names each with both values.
    """
    differing = [
        f"{name}: {saved.get(name)} in the checkpoint, {own[name]} now"
        for name in own
        if saved.get(name) != own[name] and name not in may_differ
    ]
    if differing:
        raise RefusedInput(
            "the loader's state belongs to another order of data, so the next unseen sample is unknown: "
            + "; ".join(differing)
            + ". Restore what it was (`shards` are hashes of each domain's index.json), or go on from a checkpoint "
            "with another mixture or other shards: mobilemoe run --continue-from"
        )


@dataclass(frozen=True)
class Realignment:
    """The domains of one order of data in another one."""

    before: dict[str, int]
    """Name -> index of each domain of the saved order."""
    names: list[str]
    """Domains of the order to go on with."""
    kept: set[str]
    """Domains whose shards are the same in both."""

    @classmethod
    def between(cls, saved: dict[str, Any], own: dict[str, Any]) -> "Realignment":
        """Compare two orders: `mixture` has the domains in their order, `shards` their fingerprints."""
        before = {name: index for index, name in enumerate(saved["mixture"])}
        kept = {name for name in own["mixture"] if name in before and saved["shards"][name] == own["shards"][name]}
        return cls(before, list(own["mixture"]), kept)

    def realign(self, state: SectionState) -> SectionState:
        """Return the state of a section in the domains to go on with."""
        return SectionState(
            [state.places[self.before[name]] if name in self.kept else BEGIN for name in self.names],
            [state.draws[self.before[name]] if name in self.kept else 0 for name in self.names],
            [self._realign_lane(lane) for lane in state.lanes],
        )

    def _realign_lane(self, lane: LaneState) -> LaneState:
        """Return the state of a lane. An open document is finished if its domain keeps its place, or dropped."""
        tokens = [lane.tokens[self.before[name]] if name in self.before else 0 for name in self.names]
        opened = next((name for name, index in self.before.items() if index == lane.domain), None)
        goes_on = opened is not None and opened in self.kept
        return replace(
            lane,
            tokens=tokens,
            counted_from=list(tokens),
            domain=self.names.index(opened) if goes_on and opened is not None else -1,
            place=lane.place if goes_on else BEGIN,
            offset=lane.offset if goes_on else 0,
        )
