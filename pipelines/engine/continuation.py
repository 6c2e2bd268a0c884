"""`Continuation`: a step that goes on from a point of its own work with other options, and the record of the changes.

The manifest keeps them as `changes` in the step's entry, oldest first: {"step": N, "time": T, "changed": [{"field",
"from", "to"}]}. They are part of the step's fingerprint: what trained under two learning rates is neither the one's
output nor the other's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.engine.fingerprints import flatten
from pipelines.engine.manifest import current_time

if TYPE_CHECKING:
    from pipelines.engine.step import Step

Change = dict[str, Any]


@dataclass(frozen=True)
class Continuation:
    """A request to go on from a point of a step's work."""

    name: str
    """Name of the step."""
    at: int
    """Number of the training step whose checkpoint the step goes on from."""
    check: Callable[[list[Change]], None]
    """Function that raises RefusedInput where the checkpoint cannot follow the changed fields."""
    set_aside: Callable[[], None]
    """Function that puts the work after `at` aside. It may be called again after an interruption."""
    descends_from: tuple[str, ...]
    """Steps whose work the step's own carries on: were one of them done anew, the point would not be its any more."""

    def is_carried_out(self, entry: dict[str, Any]) -> bool:
        """Return whether a step that is otherwise as wanted goes on from this point already."""
        return bool(entry.get("changes")) and entry["changes"][-1]["step"] == self.at

    def list_changed(self, step: "Step", inputs: Mapping[str, str | None], entry: dict[str, Any]) -> list[Change]:
        """Return the fields of a step's config and inputs that differ from those of the work up to this point.

        Args:
            inputs: identities of the inputs that are known; one that is still to be made is left out.
            entry: the step's entry in the manifest.
        """
        before = _describe(entry["version"], entry["config"], entry["inputs"])
        for change in reversed([change for change in entry.get("changes", []) if change["step"] >= self.at]):
            before |= {item["field"]: item["from"] for item in change["changed"]}
        now = _describe(step.version, step.config, entry["inputs"] | inputs)
        return [
            {"field": field, "from": before.get(field), "to": now.get(field)}
            for field in sorted(before.keys() | now.keys())
            if before.get(field) != now.get(field)
        ]

    def add_change(self, step: "Step", inputs: dict[str, str], entry: dict[str, Any]) -> list[Change]:
        """Return the changes of the work up to this point, and the present one."""
        kept = [change for change in entry.get("changes", []) if change["step"] < self.at]
        changed = self.list_changed(step, inputs, entry)
        return [*kept, {"step": self.at, "time": current_time(), "changed": changed}]


def _describe(version: int, config: dict[str, Any], inputs: Mapping[str, str | None]) -> dict[str, Any]:
    return flatten({"code version": version, "inputs": inputs} | config)
