"""Fingerprints of steps: what decides that finished work is still valid.

A step's fingerprint is a hash of its code version, its config and the identities of its inputs. The identity of a step
is what its dependents see: its fingerprint, or the hash of its result where the result can differ for one config (the
packages that a registry really gave). A step whose output has parts states an identity for each, and a dependent that
reads one of them sees no other. The manifest keeps the config beside the fingerprint, so that a step that is out
of date can say what changed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.hashing import sha256_json
from pipelines.engine.manifest import Manifest

if TYPE_CHECKING:
    from pipelines.engine.step import Step


def fingerprint(step: "Step", inputs: dict[str, str], changes: Sequence[dict[str, Any]] = ()) -> str:
    """Return 16 hex digits that change with the step's version, config or inputs.

    Args:
        changes: points of its work at which it went on with other options (`pipelines.engine.continuation`).
    """
    identity = {"step": step.name, "version": step.version, "config": step.config, "inputs": inputs}
    return digest(identity | ({"changes": list(changes)} if changes else {}))


def digest(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of the value's JSON with sorted keys."""
    return sha256_json(value)[:16]


def describe_changes(step: "Step", inputs: dict[str, str], entry: dict[str, Any]) -> list[str]:
    """Return the differences between a step and its entry in the manifest, one phrase each."""
    found = []
    if entry["version"] != step.version:
        found.append(f"code version {entry['version']} -> {step.version}")
    old, new = flatten(entry["config"]), flatten(step.config)
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            found.append(f"{path}: {old.get(path)!r} -> {new.get(path)!r}")
    found += [f"input {name} changed" for name, value in inputs.items() if entry["inputs"].get(name) != value]
    return found


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as {dotted path: leaf}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        path: leaf for key, item in value.items() for path, leaf in flatten(item, f"{prefix}.{key}".lstrip(".")).items()
    }


def input_identities(manifest: Manifest, step: "Step") -> dict[str, str]:
    """Return the identity of each input of a step, all of which are done: of the part of it that the step reads."""
    found = {name: identify_output(manifest.step(name), step.reads.get(name)) for name in step.needs}
    assert None not in found.values(), found
    return {name: identity for name, identity in found.items() if identity is not None}


def identify_output(entry: dict[str, Any], part: str | None) -> str | None:
    """Return the identity of a step's output, or of a part of it; None where the step was never done.

    A step of an earlier version states no parts: it is identified as a whole.
    """
    return entry.get("parts", {}).get(part, entry.get("identity"))


def find_stale_steps(manifest: Manifest) -> set[str]:
    """Return the finished steps whose inputs have been computed anew since, or depend on such a step."""
    steps, stale = manifest.content["steps"], set()
    for name, entry in steps.items():
        recorded, reads = entry.get("inputs", {}), entry.get("reads", {})
        if any(
            identify_output(steps.get(other, {}), reads.get(other)) != identity or other in stale
            for other, identity in recorded.items()
        ):
            stale.add(name)
    return stale
