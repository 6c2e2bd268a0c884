"""Pins the date that a chat template prints, so that the same conversation has the same tokens every day.

transformers offers a template `strftime_now(format)`, which is today's date. A macro of that name in front of the
template prints the pinned date instead, wherever the template is rendered.
"""

import re
from collections.abc import Iterator
from datetime import date

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from core.errors import RefusedInput

FIELD = "data.tokenizer.template_date"
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class GenerationTag(Extension):
    """The block `{% generation %}`, in which transformers lets a template mark an answer."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an attribute of the instance

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the block as what it contains."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def parse_template(template: str) -> nodes.Template:
    """Parse a chat template as transformers does.

    Raises:
        RefusedInput: it is no Jinja template.
    """
    try:
        return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]).parse(
            template
        )
    except TemplateSyntaxError as error:
        raise RefusedInput(f"the chat template is no Jinja template: line {error.lineno}: {error.message}") from error


def pin_date(template: str, pinned: str) -> str:
    """Return a chat template that prints no other date than `pinned`.

    Args:
        pinned: an ISO date, or "" for none.

    Raises:
        RefusedInput: the template prints the date and none is given, or one is given and it prints none, or it prints
            the date in a form that cannot be pinned, or something random.
    """
    parsed = parse_template(template)
    _check_not_random(parsed)
    if "strftime_now" not in meta.find_undeclared_variables(parsed):
        if pinned:
            raise RefusedInput(f"{FIELD} = {pinned!r}: the chat template prints no date; leave the field empty")
        return template
    if not pinned:
        raise RefusedInput(
            f"{FIELD} is empty: the chat template prints the date of the day (strftime_now), so the same conversation "
            "would have other tokens tomorrow; give the date to print, for example 2024-07-26"
        )
    day = parse_date(pinned)
    cases = "".join(
        f"{{% if format == {_quote(form)} %}}{{{{ {_quote(format_date(day, form))} }}}}{{% endif %}}"
        for form in sorted(set(_list_formats(parsed)))
    )
    # A line of its own: so Jinja's trim_blocks and lstrip_blocks treat the template's first line as before.
    return f"{{% macro strftime_now(format) %}}{cases}{{% endmacro %}}\n{template}"


def parse_date(text: str) -> date:
    """Return the date of an ISO text (2024-07-26).

    Raises:
        RefusedInput: it is none.
    """
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII) is None:
            raise ValueError("not of the form YYYY-MM-DD")
        return date.fromisoformat(text)
    except ValueError as error:
        raise RefusedInput(f"{FIELD} = {text!r}: no date ({error}); write it as 2024-07-26") from error


def format_date(day: date, form: str) -> str:
    """Return a date in a format of `strftime`, in English whatever the locale.

    Raises:
        RefusedInput: the format asks for a time of day, or for what depends on the locale.
    """
    month, weekday = MONTHS[day.month - 1], DAYS[day.weekday()]
    values = {
        "%d": f"{day.day:02}", "%-d": f"{day.day}", "%e": f"{day.day:2}", "%m": f"{day.month:02}",
        "%-m": f"{day.month}", "%Y": f"{day.year:04}", "%y": f"{day.year % 100:02}", "%b": month[:3], "%B": month,
        "%h": month[:3], "%a": weekday[:3], "%A": weekday, "%j": f"{day.timetuple().tm_yday:03}",
        "%F": day.isoformat(), "%%": "%",
    }  # fmt: skip
    unknown = [code for code in re.findall(r"%-?.?", form, re.DOTALL) if code not in values]
    if unknown:
        raise RefusedInput(
            f"the chat template prints the time as {form!r}: {', '.join(unknown)} is no part of a date that "
            f"{FIELD} can pin; write a date into the template instead"
        )
    return re.sub(r"%-?.", lambda code: values[code[0]], form)


def _list_formats(parsed: nodes.Template) -> Iterator[str]:
    """Yield the formats of all calls of strftime_now."""
    calls = [call for call in parsed.find_all(nodes.Call) if _is_name(call.node, "strftime_now")]
    uses = [name for name in parsed.find_all(nodes.Name) if name.name == "strftime_now"]
    tests = [test for test in parsed.find_all(nodes.Test) if _is_name(test.node, "strftime_now")]
    for call in calls:
        arguments = [*call.args, *(keyword.value for keyword in call.kwargs)]
        if len(arguments) != 1 or not isinstance(arguments[0], nodes.Const) or not isinstance(arguments[0].value, str):
            raise RefusedInput(
                f"the chat template calls strftime_now without a constant format (line {call.lineno}), so {FIELD} "
                "cannot pin it; write the format into the call"
            )
        yield arguments[0].value
    if len(uses) != len(calls) + len(tests):
        raise RefusedInput(
            f"the chat template uses strftime_now other than in a call, so {FIELD} cannot pin it; call it directly"
        )


def _check_not_random(parsed: nodes.Template) -> None:
    """Refuse what renders other text each time: Jinja's filter `random`, and `lipsum`, which makes up a text."""
    found = ["random" for name in parsed.find_all(nodes.Filter) if name.name == "random"]
    found += ["lipsum" for name in parsed.find_all(nodes.Name) if name.name == "lipsum"]
    if found:
        raise RefusedInput(
            f"the chat template uses {found[0]}, which gives other tokens each time; write it without chance"
        )


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _quote(text: str) -> str:
    """Return a text as a Jinja string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
