"""Bounds of chat templates: what is refused before it runs, and what ends while it runs."""

import threading
import time

import jinja2
import jinja2.sandbox
import pytest

from core import template_limits
from core.errors import RefusedInput
from core.template_limits import TemplateTooSlow, check_templates, find_unbounded, limit_rendering

LEX = jinja2.Environment().lex


@pytest.mark.parametrize(
    "text",
    [
        "{{ 9 ** 9 }}", "{% set n = n*n %}", "{{ n * 1 * n }}", "{{ n * 'a'|length }}", "{{ x.0*n }}",
        "{{ (n) * (n) }}",
        "{{ x | urlize }}", "{% filter wordwrap %}a{% endfilter %}", "{{ '}}' ~ n * n }}",
        "{% raw %}{{ '{% endraw %}{{ n ** n }}", "{{ n * [1][0] * n }}",
    ],
)  # fmt: skip
def test_operations_that_nothing_could_end_are_refused(text):
    assert find_unbounded(LEX(text))
    with pytest.raises(RefusedInput, match=r"chat template: it .*chat_template\.jinja"):
        check_templates({"default": "{{ x }}", "other": text}, LEX)


@pytest.mark.parametrize(
    "text",
    [
        "**bold** and a * b", "{{ '  ' * depth }}", "{{ 2 * n }}", "{{ n * 2 + 1 }}", "{# n ** n #}",
        "{% raw %}{{ n ** n }}{% endraw %}", "{{ '9 ** 9' }}",
        "{%- for m in messages %}{{ m['role'] | trim }}{% endfor %}",
    ],
)  # fmt: skip
def test_what_templates_do_is_not_refused(text):
    check_templates(text, LEX)
    check_templates(None, LEX)


def test_what_is_no_template_is_refused():
    with pytest.raises(RefusedInput, match="it is no template"):
        check_templates("{{ 'a }}", LEX)


def render(text: str) -> str:
    with limit_rendering():
        return jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(text).render()


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_rendering_without_end_ends(monkeypatch, in_thread):
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ended = []

    def try_it() -> None:
        with pytest.raises(TemplateTooSlow):
            render(endless)
        assert render("{{ 1 + 1 }}") == "2", "the next rendering is not ended"
        time.sleep(0.3)  # nor is what comes after it
        ended.append(True)

    if in_thread:
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    else:
        try_it()
    assert ended


def test_a_rendering_that_takes_the_memory_ends(monkeypatch):
    monkeypatch.setattr(template_limits, "MEMORY_BYTES", 64 << 20)
    with pytest.raises(MemoryError):
        render("{{ ('a' * 1000000000) | length }}")
    assert len(bytearray(80 << 20)) == 80 << 20, "other code has its memory again"
