"""The report of a finished, an unfinished and an empty run folder."""

import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from core.stages import STAGE_FOLDERS, STAGES
from eval.benchmarks.suites import ADVANCED, FOUNDATIONAL, SUITES
from eval.benchmarks.tasks import find_stock_files
from eval.compat import load_task_yaml
from eval.report import collect
from eval.report.card import DATASETS
from eval.report.run_report import write_report
from eval.report.scores import MODELS
from titan_ext.config import FLAVORS


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def put_lines(path, records):
    put(path, "".join(json.dumps(record) + "\n" for record in records))


def result(benchmark, value, stderr=0.05, items=20, prompts="a"):
    values = [1.0] * round(value * items) + [0.0] * (items - round(value * items))
    return {
        "benchmark": benchmark.key, "metric": benchmark.metric, "shots": benchmark.shots, "chance": benchmark.chance,
        "value": value, "stderr": stderr, "items": items, "values": values, "prompts_sha256": prompts,
        "note": benchmark.note,
        "truncated": 3 if benchmark.key == "drop" else 0, "versions": {"lm_eval": "0.4.13"}, "task_version": 1.0,
        "other_metrics": {benchmark.metric: value, "f1,none": 0.5},
    }  # fmt: skip


def layer(step, index, n_experts=16):
    raw = [1 + 0.9 * math.exp(-step / 60) * math.sin(e * (index + 2)) for e in range(n_experts)]
    load = [x / sum(raw) for x in raw]
    return {"load": load, "max_over_mean": max(load) * n_experts, "entropy": 2.7, "dead": 0}


def make_stage(run, number, start, end, steps=120, interval=4):
    folder = run / STAGE_FOLDERS[STAGES[number]]
    losses = [(s, end + (start - end) * math.exp(-s / 35)) for s in range(1, steps + 1, interval)]
    put_lines(
        folder / "metrics.jsonl",
        [
            {"step": s, "tokens": 4096 * s, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 5012.0,
             "router_z": 0.1, "seconds": 0.8 * s}
            for s, loss in losses
        ],
    )  # fmt: skip
    put_lines(folder / "heldout.jsonl", [{"step": s, "loss": loss + 0.05} for s, loss in losses[5::8]])
    layers = 4
    put_lines(
        folder / "expert_load.jsonl",
        [{"step": s, "layers": [layer(s, index) for index in range(layers)]} for s, _ in losses],
    )


def make_run(run):
    """A made-up finished run: benchmark values equal to chance, but for PIQA (above) and SIQA (below)."""
    for number, (start, end) in enumerate([(8.3, 4.9), (4.9, 4.6), (3.4, 1.9), (2.1, 1.95)]):
        make_stage(run, number, start, end)
    for model in MODELS:
        for benchmark in FOUNDATIONAL:
            value = {"piqa": 0.75, "siqa": 0.1}.get(benchmark.key, benchmark.chance)
            put(run / "eval" / model / f"{benchmark.key}.json", result(benchmark, value, 0.0 if not value else 0.05))
    load = [[(e + layer) % 16 / 120 for e in range(16)] for layer in range(4)]
    text = {
        "web": {"loss": 4.95, "tokens": 9000, "expert_load": load},
        "code": {"loss": 4.2, "tokens": 3000, "expert_load": load[::-1]},
    }
    answers = {"chat": {"loss": 2.4, "tokens": 500}, "math": {"loss": 1.6, "tokens": 700}}
    losses = {"pretrain": 4.76, "midtrain": 4.6, "sft": 1.93, "sft_int4_rounded": 2.03, "qat_int4": 1.955}
    put(
        run / "eval/heldout.json",
        {
            key: {
                "text": {"loss": loss + 1, "tokens": 12000, "by_domain": text, "dtype": "float32"},
                "sft": {"loss": loss, "tokens": 1200, "by_domain": answers},
            }
            for key, loss in losses.items()
        },
    )
    counts = {"documents": 1210, "tokens": 812_345, "trained_tokens": 811_135, "bytes": 3_400_120}
    put(
        run / "data/data_manifest.json",
        {
            "shards": {"pretrain": {"web": counts, "code": counts}, "sft": {"chat": counts}},
            "heldout": {"pretrain": {"web": counts}},
            "corpora": {"c4": {"domain": "web", "licence": "ODC-BY <1.0>", "read": 300, "kept": 287}},
            "missing": [{"corpus": "wiki", "package": "gensim", "fallback": None}],
            "decontamination": {"hits": {"piqa": {"c4": 2}}},
            "unigram_entropy_nats": {"heldout_text": {"web": 6.9, "overall": 6.71}, "heldout_sft": {"overall": 5.2}},
        },
    )
    put(
        run / "manifest.json",
        {
            "created": "2026-06-01T10:00:00+00:00",
            "git_commit": "0123456789abcdef",
            "versions": {"torch": "2.14.1", "lm-eval": "0.4.13"},
            "steps": {
                "data": {"state": "done", "seconds": 71.2},
                "pretrain": {
                    "state": "done",
                    "seconds": 60.0,
                    "attempts": [
                        {"state": "killed", "seconds": None},
                        {"state": "failed", "seconds": 90.0},
                        {"state": "done", "seconds": 60.0},
                    ],
                    "changes": [
                        {
                            "step": 12000,
                            "time": "2026-06-02T10:00:00+00:00",
                            "changed": [
                                {"field": "stages.pretrain.learning_rate", "from": 4e-4, "to": 2e-4},
                                {"field": "inputs.data", "from": "0123", "to": "4567"},
                            ],
                        },
                        {"step": 15000, "time": "2026-06-03T10:00:00+00:00", "changed": []},
                    ],
                },
            },
            "recipe": {"model": asdict(FLAVORS["tiny"]), "parallel": {"world_size": 4}},
        },
    )
    measured = {"load_seconds": 0.25, "ttft_seconds": 0.0421, "prefill_tokens_per_second": 11_401.4,
                "decode_tokens_per_second": 912.3, "peak_rss_bytes": 230_000_000, "floor_rss_bytes": 210_000_000,
                "weight_bytes_a_decoded_token": 1_500_000, "weight_bytes_of_the_prompt": None}  # fmt: skip
    put(
        run / "profile/profile.json",
        {
            "artifact": {"folder": "program", "format": "ExecuTorch, stock", "file_bytes": 2_300_000},
            "machine": {"cpu": "A CPU <1.0>", "python": "3.11.7", "threads": 2},
            "repetitions": 3,
            "measurements": [{"domain": "knowledge", "context": 512} | measured],
        },
    )
    for name, size in (("bf16", 6_000_000), ("int4", 2_100_000), ("executorch", 2_300_000)):
        put(run / "artifacts" / name / "model.safetensors", "x" * size)
        put(run / "artifacts" / name / "config.json", "{}")
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "made-up")
    return run, write_report(run)


def test_a_finished_run_has_nothing_missing_and_every_number_is_from_the_folder(finished):
    run, results = finished
    assert results["missing"] == []
    assert json.loads((run / "report/results.json").read_text()) == results
    stage = results["stages"][0]
    assert (stage["step"], stage["tokens"], stage["unigram_entropy"]) == (117, 4096 * 117, 6.71)
    assert stage["loss"] == pytest.approx(4.9 + 3.4 * math.exp(-117 / 35))
    assert {a["name"]: a["bytes"] for a in results["artifacts"]}["int4"] == 2_100_002
    assert {a["name"]: a["bits"] for a in results["artifacts"]}["int4"] == pytest.approx(8 * 2_100_000 / 2_696_320)
    published = {size["name"]: (size["bytes"], round(size["bits"], 2)) for size in results["published_sizes"]}
    assert published["MobileMoE-S"] == (713_863_008, 4.52)
    assert [table["kind"] for table in results["heldout"]] == ["text", "sft"]
    for table, domains in zip(results["heldout"], (["code", "web"], ["chat", "math"]), strict=True):
        assert table["domains"] == domains
        costs = {"rounding_cost": 0.10, "qat_cost": 0.025, "qat_against_rounding": -0.075}
        assert {name: table[name]["value"] for name in costs} == pytest.approx(costs)
    assert results["data"]["contaminated"] == {"piqa": 2}


def test_the_profile_of_the_program_names_the_machine(finished):
    run, _ = finished
    markdown, html = ((run / "report" / name).read_text() for name in ("report.md", "report.html"))
    row = ["knowledge", "512", "0.25", "42.1", "11,401", "912", "230.0 MB", "20.0 MB", "1.5 MB"]
    assert f"| {' | '.join(row)} |" in markdown
    assert "".join(f"<td>{cell}</td>" for cell in row[1:]) in html
    assert r"on A CPU \<1.0\>, 2 threads; medians of 3" in markdown and "on A CPU &lt;1.0&gt;, 2 threads" in html


def test_the_table_says_plainly_what_is_chance(finished):
    _, results = finished
    sentence = results["chance"]["sft"]
    assert "12 of 14 scores lie within two standard errors of the chance level" in sentence
    assert "above it: PIQA; below it: SIQA" in sentence
    assert results["mostly_chance"] and results["truncated"] == [
        {"title": "DROP", "prompts": 3, "items": 20, "models": list(MODELS.values())}
    ]


def test_html_needs_nothing_but_itself_and_markdown_only_its_pictures(finished):
    run, _ = finished
    html = (run / "report/report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    narrow = re.findall(r'<source media="[^"]*" srcset="data:image/png;base64,iVBOR', html)
    assert len(narrow) == 7
    assert len(sources) == 7 and all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "url(" not in html and "<script" not in html
    assert "ODC-BY &lt;1.0&gt;" in html, "text is escaped"
    markdown = (run / "report/report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown)
    drawn = {p.name for p in (run / "report").glob("*.png")}
    assert set(pictures) == {name for name in drawn if "_narrow" not in name} and len(drawn) == 14
    assert r"ODC-BY \<1.0\>" in markdown
    assert all(benchmark.title in text for benchmark in FOUNDATIONAL for text in (html, markdown))


def test_markdown_tables_have_one_number_of_columns(finished):
    run, _ = finished
    for table in re.findall(r"(?:^\|.*\n)+", (run / "report/report.md").read_text(), flags=re.MULTILINE):
        lines = table.splitlines()
        assert len(lines) >= 3, table
        assert len({line.count("|") for line in lines}) == 1, table


def test_an_unfinished_run_shows_what_is_missing(tmp_path):
    run = tmp_path / "half"
    make_stage(run, 0, 8.3, 5.0)
    torn = run / "stages/1_pretrain/metrics.jsonl"
    torn.write_text(torn.read_text() + '{"step": 121, "lo')
    put(run / "eval/sft/piqa.json", result(FOUNDATIONAL[1], 0.5, stderr=None, items=1))
    results = write_report(run)
    assert results["stages"][0]["step"] == 117, "a line that is being written is not read"
    assert [stage["step"] for stage in results["stages"][1:]] == [None] * 3
    assert "stage 4 INT4 quantization-aware training" in results["missing"]
    assert "QAT, INT4: all benchmarks" in results["missing"]
    assert results["averages"] == dict.fromkeys(MODELS)
    html = (run / "report/report.html").read_text()
    assert "Missing from this run so far" in html and "not run yet" in html


def test_the_table_is_that_of_the_runs_suite(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "short", FOUNDATIONAL[:2])
    put(tmp_path / "manifest.json", {"recipe": {"evaluation": {"suite": "short"}}})
    results = write_report(tmp_path)
    assert [row["key"] for row in results["benchmarks"]] == ["hellaswag", "piqa"]
    markdown = (tmp_path / "report/report.md").read_text()
    assert "| **Mean of the 2** | | | | | | – |" in markdown and "BoolQ" not in markdown


def test_an_empty_run_gets_a_report_and_a_wrong_path_does_not(tmp_path):
    results = write_report(tmp_path)
    assert len(results["missing"]) == 4 + 5 + 5 + 3
    assert not list((tmp_path / "report").glob("*.png"))
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(tmp_path / "nowhere")


def test_a_new_report_replaces_the_old_one_whole(tmp_path):
    make_stage(tmp_path, 0, 8.3, 5.0)
    write_report(tmp_path)
    assert (tmp_path / "report/loss.png").exists()
    (tmp_path / "stages/1_pretrain/metrics.jsonl").unlink()
    write_report(tmp_path)
    assert not (tmp_path / "report/loss.png").exists()
    assert not (tmp_path / "report.partial").exists()


def test_scores_in_the_forms_of_the_hub_and_of_lm_eval(finished):
    run, _ = finished
    card = ModelCard((run / "report/model_index_int4.md").read_text(encoding="utf-8") + "# Model")
    scores = {entry.dataset_name: entry for entry in card.data.eval_results}
    assert len(scores) == 14
    piqa = scores["PIQA (0-shot, 20 items)"]
    assert (piqa.dataset_type, piqa.metric_type, piqa.metric_value) == ("baber/piqa", "acc_norm", 75.0)
    assert "standard error 5.00" in piqa.metric_name
    found = json.loads((run / "report/lm_eval_bf16.json").read_text())
    assert (
        found["results"]["piqa"]["acc_norm,none"] == 0.75 and found["results"]["piqa"]["acc_norm_stderr,none"] == 0.05
    )
    assert found["n-samples"]["piqa"] == {"effective": 20} and found["n-shot"]["mmlu"] == 5
    for benchmark in (*FOUNDATIONAL, *ADVANCED):
        stock = load_task_yaml(find_stock_files(benchmark.key)[0], functions=False)
        path, config = DATASETS[benchmark.key]
        assert path == stock["dataset_path"] and config in (None, stock.get("dataset_name"))


def test_a_long_log_of_expert_load_is_thinned_and_its_last_whole_record_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "MAX_POINTS", 10)
    path = tmp_path / "expert_load.jsonl"
    records = [{"step": step, "layers": [layer(step, 0), layer(step, 1)]} for step in range(1, 208)]
    for record in records:
        if record["step"] % 50:
            record["layers"] = [{k: v for k, v in one.items() if k != "load"} for one in record["layers"]]
    put_lines(path, records)
    found = collect.read_expert_load(path)
    steps = [record["step"] for record in found["expert_load"]]
    assert 10 <= len(steps) <= 22 and steps[0] == 1 and steps[-1] == 207
    assert len(set(np.diff(steps[:-1]))) == 1, "evenly spread"
    assert found["last_load"]["step"] == 200
    assert found["last_load"]["layers"] == [one["load"] for one in records[199]["layers"]]
    assert collect.read_expert_load(tmp_path / "none") == {"expert_load": [], "last_load": None}


def test_interruptions_and_the_share_of_time_that_trained(finished):
    _, results = finished
    (row,) = results["operation"]
    assert (row["attempts"], row["killed"], row["restarts"], row["wall_seconds"]) == (3, 1, 0, 150.0)
    assert row["training_seconds"] == pytest.approx(4096 * 117 / 5012.0)
    assert row["effective"] == pytest.approx(row["training_seconds"] / 150)
    assert row["worker_hours"] == pytest.approx(4 * 150 / 3600)


def test_changes_on_the_way_are_listed(finished):
    run, results = finished
    assert [(row["step"], row["field"], row["from"], row["to"]) for row in results["changes"]] == [
        (12000, "stages.pretrain.learning_rate", 4e-4, 2e-4), (12000, "inputs.data", "0123", "4567"),
        (15000, None, None, None),
    ]  # fmt: skip
    page = (run / "report/report.html").read_text()
    assert '<td>12,000</td><td class="l">2026-06-02T10:00:00+00:00</td>' in page
    assert '<td class="l">stages.pretrain.learning_rate</td><td class="l">0.0004</td><td class="l">0.0002</td>' in page
    lines = (run / "report/report.md").read_text().splitlines()
    (row,) = [line for line in lines if "learning" in line and line.startswith("|")]
    assert row.startswith("| 1 Pre-training | 12,000 |") and row.endswith("| 0.0004 | 0.0002 |")


NAMES = [
    "x [v1]", "[/x](javascript:alert(1))", "<script>alert(1)</script>", "a|b `c` ``d`` |",
    "*a* _b_ __c__ ~~d~~ $e$ :smile: #1",
    "a & b &lt; \"c\" 'd'", "tail\\", "{{ 7 * 7 }} {% x %}", "two\nlines",
]  # fmt: skip
"""Names that Markdown, HTML or the templates would read as markup."""


class Texts(HTMLParser):
    """Collects the texts of headings and table cells, and the names of all elements."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.elements, self._open = [], set(), None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        if tag in ("h1", "td", "th", "li"):
            self._open = ""

    def handle_data(self, data):
        if self._open is not None:
            self._open += data

    def handle_endtag(self, tag):
        if tag in ("h1", "td", "th", "li"):
            self.texts.append(self._open)
            self._open = None


@pytest.mark.parametrize("name", NAMES)
def test_names_of_users_and_files_stand_in_both_pages_as_they_are(name, tmp_path):
    run = tmp_path / name.replace("/", "_")
    make_run(run)
    counts = {"documents": 1, "tokens": 2, "trained_tokens": 3, "bytes": 4}
    put(
        run / "data/data_manifest.json",
        {
            "shards": {"pretrain": {name: counts}},
            "heldout": {},
            "corpora": {name: {"domain": name, "licence": name, "read": 300, "kept": 287}},
            "missing": [{"corpus": name, "package": name, "fallback": name}],
            "decontamination": {"hits": {name: {"c4": 2}}},
            "unigram_entropy_nats": {},
        },
    )
    artifact = run / "artifacts" / run.name
    put(artifact / run.name, "weights")
    write_report(run)
    line, title = name.replace("\n", "\\n"), run.name.replace("\n", "\\n")
    html = Texts((run / "report/report.html").read_text(encoding="utf-8"))
    page = (run / "report/report.md").read_text(encoding="utf-8")
    markdown = Texts(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(page))
    assert html.texts[0].replace("\n", "\\n") == markdown.texts[0] == title
    assert html.texts.count(name) >= 4  # domain, corpus, licence
    # The heading, an artifact and a domain.
    assert [text for text in markdown.texts if text in (title, line)] == [title, title, line]
    assert f"{line} ({line}, {line}): 300 read, 287 kept." in markdown.texts
    assert f"{line}: package {line} could not be fetched; instead: {line}." in markdown.texts
    assert f"{title}, 7" in markdown.texts  # its largest file, in a code span
    assert not {"script", "a", "em", "s"} & (html.elements | markdown.elements)
