"""The licence of an installed distribution, from what its publisher says: an SPDX expression where one can be given."""

import re
from importlib.metadata import Distribution, distribution
from pathlib import Path

from license_expression import ExpressionError, get_spdx_licensing

PROPRIETARY = "LicenseRef-Proprietary"
"""Expression of a licence whose publisher calls it proprietary."""
_SPDX = get_spdx_licensing()
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}  # fmt: skip
_TEXTS = {
    r"Apache License,? +(Version|v\.?) ?2\.0|Apache[- ]2\.0|Apache 2": "Apache-2.0",
    r"Permission is hereby granted, free of charge, to any person obtaining|MIT License": "MIT",
    r"Redistribution and use in source and binary forms.*Neither the names? of|BSD[- ]3|3-Clause BSD": "BSD-3-Clause",
    r"Redistribution and use in source and binary forms|BSD[- ]2|2-Clause BSD": "BSD-2-Clause",
}
"""Pattern of a licence's text, white space being one blank -> SPDX identifier. The first that fits counts."""
_BEGINNING = 1500
"""Number of characters of a text that tell which licence it is."""


def read_licence(name: str) -> str:
    """Return the SPDX expression of an installed distribution's licence, or "" if none can be told.

    What counts, in this order: the field License-Expression, a short field License, the licence's text, a classifier.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    found = distribution(name)
    classifiers = found.metadata.get_all("Classifier") or []
    names = {line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")}
    said = [found.metadata[field] for field in ("License-Expression", "License") if field in found.metadata]
    for text in said:
        if len(text) < 200 and (expression := parse_spdx(text)):
            return expression
    if "Other/Proprietary License" in names or any("proprietary" in text.lower()[:200] for text in said):
        return PROPRIETARY
    for text in [*said, *_read_texts(found)]:
        if identifier := recognize_text(text):
            return identifier
    return " OR ".join(sorted({_CLASSIFIERS[name] for name in names & _CLASSIFIERS.keys()}))


def parse_spdx(text: str) -> str:
    """Return an SPDX expression as SPDX writes it, or "" if the text is none."""
    try:
        parsed = _SPDX.parse(text, validate=True, strict=True)
    except ExpressionError:
        return ""
    return "" if parsed is None else str(parsed)


def recognize_text(text: str) -> str:
    """Return the SPDX identifier of a licence's text, or "" if it is none that is known here.

    Only its beginning is looked at: the licences of what a distribution has taken in follow after its own.
    """
    flat = re.sub(r"\s+", " ", text)[:_BEGINNING]
    return next((name for pattern, name in _TEXTS.items() if re.search(pattern, flat)), "")


def _read_texts(found: Distribution) -> list[str]:
    """Return the licence texts that a distribution has beside its metadata."""
    files = [
        file for file in found.files or ()
        if ".dist-info" in str(file) and re.match(r"licen[cs]e|copying", file.name, re.IGNORECASE)
    ]  # fmt: skip
    paths = sorted(Path(str(file.locate())) for file in files)
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]
