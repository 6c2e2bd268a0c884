"""The date in a chat template: pinned by the recipe, so that tokens do not depend on day, time zone or locale."""

import locale
import time
from datetime import date, datetime

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from core.errors import RefusedInput
from data.config import DataConfig, TokenizerConfig
from data.tokens import tokenizer
from data.tokens.chat import Encoder
from data.tokens.existing_tokenizer import load_existing
from data.tokens.template_date import format_date, pin_date
from data.validate_config import validate_config
from tests.data.planted import page

# Llama 3.2's, but for its tools.
LLAMA_3_2 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


class TuesdayInMarch(datetime):
    """Another day than that of the test."""

    @classmethod
    def now(cls, tz=None):
        return cls(2031, 3, 4, 23, 59, tzinfo=tz)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer folder whose template prints the date."""
    made = tokenizer.train((page(number) for number in range(40)), vocab_size=400)
    made.chat_template = LLAMA_3_2
    folder = tmp_path_factory.mktemp("tokenizer") / "llama"
    tokenizer.save(made, folder)
    return folder


def set_template(folder, template, out):
    """Copy a tokenizer folder with another template."""
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = template
    made.save_pretrained(out)
    return str(out)


def test_a_date_in_the_template_is_refused_until_it_is_pinned(folder):
    config = DataConfig(corpora=("python-stdlib",), tokenizer=TokenizerConfig(path=str(folder)))
    with pytest.raises(RefusedInput, match=r"data\.tokenizer\.template_date is empty: .* give the date to print"):
        validate_config(config)
    pinned = TokenizerConfig(path=str(folder), template_date="2024-07-26")
    validate_config(DataConfig(corpora=("python-stdlib",), tokenizer=pinned))


def test_tokens_are_the_same_every_day_from_training_to_what_users_load(folder, tmp_path, monkeypatch):
    saved = tmp_path / "tokenizer"
    tokenizer.save(load_existing(str(folder), "2024-07-06"), saved)
    expected = "Today Date: 06 Jul 2024\n\n<|eot_id|>"

    def render() -> tuple[list[int], list[int]]:
        loaded = AutoTokenizer.from_pretrained(saved)
        return Encoder(loaded).encode_conversation(CHAT, 8192).tokens.tolist(), loaded.apply_chat_template(CHAT)

    today = render()
    assert today[0] == today[1]
    assert expected in AutoTokenizer.from_pretrained(saved).decode(today[0])
    monkeypatch.setattr(chat_template_utils, "datetime", TuesdayInMarch)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        # The original does print another day now.
        assert "04 Mar 2031" in AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False)
        assert render() == today
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_pinned_template_renders_as_the_original_does_on_that_day(folder, monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", TuesdayInMarch)
    template = (
        "\n  {% if strftime_now is defined %}x{% endif %}\n{{ strftime_now('%d %B %Y') }} {{ strftime_now('%a') }}\n"
    )
    loaded = AutoTokenizer.from_pretrained(folder)
    for form in (LLAMA_3_2, template, f" {template}", LLAMA_3_2.replace('"%d %b %Y"', "format='%d/%m \"%y\" \\\\ %e'")):
        original = loaded.apply_chat_template(CHAT, tokenize=False, chat_template=form)
        pinned = pin_date(form, "2031-03-04")
        assert loaded.apply_chat_template(CHAT, tokenize=False, chat_template=pinned) == original


def test_pinning_once_is_enough(folder, tmp_path):
    """An exported tokenizer is the tokenizer of the next run."""
    tokenizer.save(load_existing(str(folder), "2024-07-26"), tmp_path / "once")
    again = load_existing(str(tmp_path / "once"))
    assert "26 Jul 2024" in again.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize(
    "code", ["%d", "%-d", "%e", "%m", "%-m", "%Y", "%y", "%b", "%B", "%h", "%a", "%A", "%j", "%F", "%%"]
)
def test_formats_are_those_of_strftime(code):
    assert locale.setlocale(locale.LC_TIME) == "C"
    for day in (date(2024, 2, 29), date(2031, 12, 1), date(1999, 1, 9)):
        assert format_date(day, f"{code}!") == day.strftime(f"{code}!")


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("{{ strftime_now('%d %b %Y %H:%M') }}", "%H, %M is no part of a date"),
        ("{{ strftime_now('%x') }}", "%x is no part of a date"),
        ("{{ strftime_now(form) }}", "without a constant format"),
        ("{% set now = strftime_now %}{{ now('%d') }}", "other than in a call"),
        ("{{ ['a', 'b'] | random }}", "uses random"),
        ("{{ lipsum() }}", "uses lipsum"),
        ("{% for %}", "no Jinja template: line 1"),
    ],
)
def test_templates_that_cannot_be_pinned_are_refused(template, rule):
    with pytest.raises(RefusedInput, match=rule.replace("(", r"\(")):
        pin_date(template, "2024-07-26")


@pytest.mark.parametrize(
    "text", ["26 Jul 2024", "2024-02-30", "20240726", "2024-7-26", "today", "٢٠٢٤-٠٧-٢٦", "2024-07-26\n"]
)
def test_what_is_no_date_is_refused(text):
    with pytest.raises(RefusedInput, match=r"data\.tokenizer\.template_date = .*write it as 2024-07-26"):
        pin_date("{{ strftime_now('%d') }}", text)


def test_a_date_for_a_template_without_one_is_refused(folder, tmp_path):
    path = set_template(folder, tokenizer.CHAT_TEMPLATE, tmp_path / "plain")
    with pytest.raises(RefusedInput, match="prints no date; leave the field empty"):
        load_existing(path, "2024-07-26")
    trained = DataConfig(corpora=("python-stdlib",), tokenizer=TokenizerConfig(template_date="2024-07-26"))
    with pytest.raises(RefusedInput, match=r"data\.tokenizer\.template_date = '2024-07-26'.*leave it empty"):
        validate_config(trained)


def test_blocks_of_transformers_are_understood():
    template = (
        "{% for m in messages %}{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert pin_date(template, "2024-07-26").count("2024") == 1
