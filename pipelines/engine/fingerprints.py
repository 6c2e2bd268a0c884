"""Fingerprints of steps: what decides that finished work is still valid.

A step's fingerprint is a hash of its code version, its config and the identities of its inputs. The identity of a step
is what its dependents see: its fingerprint, or the hash of its result where the result can differ for one config (the
packages that a registry really gave). The manifest keeps the config beside the fingerprint, so that a step that is out
of date can say what changed.
"""

from typing import TYPE_CHECKING, Any

from core.hashing import sha256_json
from pipelines.engine.manifest import Manifest

if TYPE_CHECKING:
    from pipelines.engine.step import Step


def fingerprint(step: "Step", inputs: dict[str, str]) -> str:
    """Return 16 hex digits that change with the step's version, config or inputs."""
    return digest({"step": step.name, "version": step.version, "config": step.config, "inputs": inputs})


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


def step_identities(manifest: Manifest, names: tuple[str, ...]) -> dict[str, str]:
    """Return the identity of each named step, all of which are done."""
    return {name: manifest.step(name)["identity"] for name in names}


def find_stale_steps(manifest: Manifest) -> set[str]:
    """Return the finished steps whose inputs have been computed anew since, or depend on such a step."""
    steps, stale = manifest.content["steps"], set()
    for name, entry in steps.items():
        recorded = entry.get("inputs", {})
        if any(steps.get(n, {}).get("identity") != identity or n in stale for n, identity in recorded.items()):
            stale.add(name)
    return stale
