"""The bill of materials of an artifact (CycloneDX): its recipe, the program's commit, libraries, corpora and licences.

It has neither a date nor a random number, so that the same run gives the same bytes.
"""

import json
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.exception import CycloneDxException
from cyclonedx.model import ExternalReference, ExternalReferenceType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from core.errors import report_damage
from core.run_folder import MANIFEST, find_run
from eval.export.licences import read_licence

BILL = "sbom.cdx.json"
LARGEST_BILL = 16 << 20
"""Number of bytes that a bill may have. Of a corpus it has about a thousand."""
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://arxiv.org/abs/2605.27358")
"""Namespace of the serial numbers, which are hashes of the content."""
_NOT_IN_WEIGHTS = ("cluster", "eval", "export")
"""Sections of a recipe that say nothing of how the weights came to be."""
_PACKAGE_FACTS = ("package", "version", "archive_sha256")
"""Facts of a corpus's entry in data_manifest.json that become properties as they are."""


def write_bill(folder: Path, name: str, made_from: Path | None) -> None:
    """Write the bill of an artifact into its folder.

    Args:
        name: the artifact's.
        made_from: a folder of the run that the weights are from, or an artifact whose bill is passed on; without one,
            or for one that has neither, the bill has the program alone. The tokenizer's folder is always one of them:
            a run's lies in the run, an artifact's is the artifact.

    Raises:
        DamagedData: the bill, or the run's manifest, cannot be read.
    """
    origin = made_from and (made_from / BILL)
    if origin and origin.is_file():
        with report_damage(origin, "export again from the run, or delete it"):
            try:
                text = format_bill(read_bill(origin), name)
            except CycloneDxException as error:
                raise ValueError(str(error)) from error
    else:
        run = made_from and find_run(made_from)
        text = format_bill(build_bill(*(read_run(run) if run else ({}, {}))), name)
    (folder / BILL).write_text(text, encoding="utf-8")


def read_bill(path: Path) -> Bom:
    """Return the bill at a path.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: it is none, or larger than one can be.
    """
    if path.stat().st_size > LARGEST_BILL:
        raise ValueError(f"{path.stat().st_size} bytes, a bill of materials has at most {LARGEST_BILL}")
    # A decorator of the library adds the method.
    return Bom.from_json(json.loads(path.read_text(encoding="utf-8")))  # type: ignore[attr-defined]


def format_bill(bom: Bom, name: str) -> str:
    """Return the text of an artifact's bill; the serial number is a hash of the rest."""
    if bom.metadata.component is None:
        bom.metadata.component = _describe_model({})
    bom.metadata.component.name = name
    bill = json.loads(JsonV1Dot6(bom).output_as_string())
    del bill["metadata"]["timestamp"], bill["serialNumber"]
    bill["serialNumber"] = f"urn:uuid:{uuid.uuid5(_NAMESPACE, json.dumps(bill, sort_keys=True))}"
    return json.dumps(bill, indent=2) + "\n"


def read_run(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest of a run, and the corpora of its data manifest by name; nothing if it is another's manifest.

    Raises:
        DamagedData: one of them is damaged.
    """
    manifest, data = run / MANIFEST, run / "data" / "data_manifest.json"
    with report_damage(manifest, "copy it from a backup"):
        described = json.loads(manifest.read_text(encoding="utf-8"))
    if not isinstance(described, dict) or "recipe" not in described:
        return {}, {}
    if not data.is_file():
        return described, {}
    with report_damage(data, "make the data again"):
        return described, json.loads(data.read_text(encoding="utf-8"))["corpora"]


def build_bill(manifest: Mapping[str, Any], corpora: Mapping[str, Mapping[str, Any]]) -> Bom:
    """Return a bill for an artifact without a name.

    Args:
        manifest: of the run: `recipe`, `versions`, `git_commit`; each may be missing.
        corpora: entries of data_manifest.json by name.
    """
    program = Component(
        name="mobilemoe", version=version("mobilemoe"), type=ComponentType.APPLICATION, bom_ref="mobilemoe",
        licenses=[LicenseFactory().make_from_string("Apache-2.0")],
    )  # fmt: skip
    if commit := manifest.get("git_commit"):
        program.properties = [_property("git_commit", commit)]
    bom = Bom(components=[program])
    bom.components.update(_describe_library(*library) for library in manifest.get("versions", {}).items())
    bom.components.update(_describe_corpus(*corpus) for corpus in corpora.items())
    bom.metadata.component = _describe_model(manifest.get("recipe", {}))
    bom.register_dependency(bom.metadata.component, bom.components)
    return bom


def _describe_model(recipe: Mapping[str, Any]) -> Component:
    """Return the artifact itself, with those sections of the recipe that its weights come from."""
    model = Component(
        name="", type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="artifact",
        description="Files and their hashes are in SHA256SUMS.",
    )  # fmt: skip
    if sections := {key: value for key, value in recipe.items() if key not in _NOT_IN_WEIGHTS}:
        model.properties = [_property("recipe", json.dumps(_hide_paths(sections), sort_keys=True))]
    return model


def _describe_library(name: str, installed: str) -> Component:
    try:
        licence = read_licence(name)
    except PackageNotFoundError:  # the run had it, this environment does not
        licence = ""
    return Component(
        name=name, version=installed, type=ComponentType.LIBRARY, bom_ref=f"library-{name}",
        purl=PackageURL("pypi", name=name, version=installed), licenses=_licences(licence),
    )  # fmt: skip


def _describe_corpus(name: str, entry: Mapping[str, Any]) -> Component:
    """Return a corpus, with where it is from, what it may be used for and how many of its documents were kept."""
    component = Component(
        name=name, type=ComponentType.DATA, bom_ref=f"corpus-{name}", version=entry.get("content") or None,
        licenses=_licences(entry["licence"]),
    )  # fmt: skip
    facts = {key: entry[key] for key in ("domain", "non_commercial", "read", "kept", *_PACKAGE_FACTS) if key in entry}
    if "installed" in entry:
        facts["installed"] = entry["installed"]
    component.properties = [_property(key, _say(value)) for key, value in facts.items()]
    if "://" in (address := entry.get("address", "")):
        reference = ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(address))
        component.external_references = [reference]
    return component


def _licences(text: str) -> list:
    """Return a licence as an SPDX identifier or expression where the text is one, else by name."""
    return [LicenseFactory().make_from_string(text)] if text else []


def _property(name: str, value: str) -> Property:
    return Property(name=f"mobilemoe:{name}", value=value)


def _say(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _hide_paths(value: Any) -> Any:
    """Return a part of a recipe with the last name alone of every absolute path: the rest is this machine's."""
    if isinstance(value, dict):
        return {key: _hide_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hide_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value
