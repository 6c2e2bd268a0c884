"""The files of remote corpora: listed once, tried, kept in a list, and divided into units of about an hour's work.

A wrong address, a column that is not there, or a store that does not answer is refused before the first step. A run
that resumes reads the list, so what is added to a corpus meanwhile does not move its units.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from core.atomic import write_json
from core.errors import DamagedData, RefusedInput
from core.progress import Progress
from data.catalogue.corpus import Corpus, PackageFile, RemoteFiles, Unit
from data.readers.remote_files import find_checksum, get_info, make_absolute, match_corpus, open_address
from data.readers.retries import is_transient

UNIT_TEXT_BYTES = 2_000_000_000
"""Largest text of a unit of several files: an hour and a half of one core (data/planning.py). A larger file is one."""

TRIED_FILES = 3
"""Number of a corpus's files of which one must be readable for the step to begin."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus when it was listed."""

    path: str
    """Path on its file system."""
    bytes: int
    checksum: str | None
    """What the store states of it; None where it states nothing, as for files of this machine."""
    modified: float | None = None
    """Time of the last change of a file without a checksum, in seconds."""


def freeze_sources(corpora: Sequence[Corpus], path: Path, progress: Progress) -> dict[str, list[SourceFile]]:
    """Return the files of every remote corpus, from the list at `path`; without one, list and try them, and write it.

    Raises:
        RefusedInput: corpora have no file, or none that can be read; names each with the reason.
    """
    remote = [corpus for corpus in corpora if isinstance(corpus.source, RemoteFiles)]
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {corpus.name: [SourceFile(**file) for file in kept[corpus.name]] for corpus in remote}
    found: dict[str, list[SourceFile]] = {}
    problems: list[str] = []
    failure: Exception
    for done, corpus in enumerate(remote):
        progress(f"0-sources: {corpus.name}", done, len(remote))
        try:
            found[corpus.name] = list_sources(corpus)
            try_corpus(corpus, found[corpus.name])
        except (RefusedInput, DamagedData) as error:
            problems.append(str(error))
            failure = error
        except Exception as error:  # each store has exception types of its own
            problems.append(f"{corpus.name}: cannot be listed: {type(error).__name__}: {error}")
            failure = error
        else:
            continue
        if is_transient(failure):  # the store did not answer for minutes, and would not for the next corpus
            break
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise RefusedInput(
            f"{len(problems)} of {len(remote)} remote corpora cannot be read; correct the address, the columns or the "
            f"access, take them out of data.corpora, or run again when the store answers:\n{listed}"
        )
    write_json(path, {name: [asdict(file) for file in files] for name, files in found.items()})
    return found


def list_sources(corpus: Corpus) -> list[SourceFile]:
    """List the files of a remote corpus, in sorted order."""
    assert isinstance(corpus.source, RemoteFiles), f"{corpus.name} is no corpus of remote files"
    fs, root = open_address(corpus.source.address)
    files = []
    for path in match_corpus(corpus, fs, root):
        info = get_info(fs, path)
        checksum = find_checksum(info)
        files.append(SourceFile(path, info["size"], checksum, None if checksum else info.get("mtime")))
    return files


def try_corpus(corpus: Corpus, files: Sequence[SourceFile]) -> None:
    """Read the first record of one of a corpus's smallest files.

    A damaged file among good ones does not count here: the first step names it, and keeps the others.

    Raises:
        DamagedData: none of TRIED_FILES can be read, or has the columns; says what is wrong with the last.
    """
    assert isinstance(corpus.source, RemoteFiles), f"{corpus.name} is no corpus of remote files"
    location = make_absolute(corpus.source.address)
    tried = sorted(files, key=lambda file: (file.bytes == 0, file.bytes))[:TRIED_FILES]
    for number, file in enumerate(tried, 1):
        try:
            next(iter(corpus.read(Unit(corpus, location, 0, 0, (file.path,)))), None)
            return
        except DamagedData as error:
            if number == len(tried) or is_transient(error):
                reason = str(error).rpartition("\n")[2].strip()
                raise DamagedData(f"{corpus.name}: {reason}") from error


def find_changed(files: Sequence[SourceFile], inputs: Sequence[dict]) -> list[str]:
    """Return the paths of a corpus's files that were not read as they had been listed: mended ones, too.

    Args:
        inputs: `path`, `bytes` and `checksum` of the files that were read.
    """
    read = {file["path"]: file for file in inputs}
    return [
        file.path
        for file in files
        if file.bytes != read[file.path]["bytes"] or file.checksum not in (None, read[file.path]["checksum"])
    ]


def divide_files(files: Sequence[SourceFile], text_bytes: int, limit: int) -> list[tuple[tuple[str, ...], int]]:
    """Divide files into groups of neighbours, each of at most `limit` bytes of text or of one file.

    Args:
        text_bytes: text of all files together; a file's share of it is that of its bytes.

    Returns:
        paths and estimated text bytes of each group.
    """
    total = sum(file.bytes for file in files)
    groups: list[tuple[tuple[str, ...], int]] = []
    paths: list[str] = []
    held = 0
    for file in files:
        text = round(text_bytes * file.bytes / total) if total else 0
        if paths and held + text > limit:
            groups.append((tuple(paths), held))
            paths, held = [], 0
        paths.append(file.path)
        held += text
    return [*groups, (tuple(paths), held)]


def list_units(
    corpora: Sequence[Corpus], packages: dict[str, Path], seed: int, sources: dict[str, list[SourceFile]]
) -> list[Unit]:
    """Return the units of all corpora; a unit's position in the list is its rank in every datatrove step.

    Args:
        sources: result of `freeze_sources`.
    """
    units = []
    for corpus in corpora:
        source = corpus.source
        if isinstance(source, RemoteFiles):
            location = make_absolute(source.address)
            groups = divide_files(sources[corpus.name], corpus.text_bytes, UNIT_TEXT_BYTES)
            units += [
                Unit(corpus, location, number, seed, files, text, len(groups))
                for number, (files, text) in enumerate(groups)
            ]
            continue
        location = str(packages[source.package].absolute()) if isinstance(source, PackageFile) else ""
        text = corpus.text_bytes // corpus.shards
        units += [
            Unit(corpus, location, shard, seed, text_bytes=text, parts=corpus.shards) for shard in range(corpus.shards)
        ]
    return units
