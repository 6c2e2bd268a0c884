"""Tests of eval.export.licences and docs/licences.md: every distribution has a licence, and the page says which."""

from importlib.metadata import distribution

import pytest

from eval.export.licences import PROPRIETARY, parse_spdx, read_licence, recognize_text
from tests.supply.licences import STATED, format_page, list_licences
from tests.supply.locked import ROOT

PAGE = ROOT / "docs" / "licences.md"
STRONG_COPYLEFT = {"GPL-2.0-only", "GPL-2.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later", "AGPL-3.0-only"}


def test_the_page_is_that_of_the_environment():
    licences = list_licences()
    assert PAGE.read_text() == format_page(licences), "python -m tests.supply.licences > docs/licences.md"
    assert [name for name, licence in licences.items() if not licence] == []


def test_nothing_is_under_strong_copyleft_alone():
    alone = {name for name, licence in list_licences().items() if set(licence.split(" OR ")) <= STRONG_COPYLEFT}
    assert alone == set()


def test_what_is_stated_by_hand_is_not_told_by_the_metadata():
    assert {name: read_licence(name) for name in STATED} == dict.fromkeys(STATED, "")


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("numpy", "BSD-3-Clause"), ("torchtitan", "BSD-3-Clause"), ("ray", "Apache-2.0"), ("lm-eval", "MIT"),
        ("mosaicml-streaming", "Apache-2.0"), ("transformers", "Apache-2.0"), ("nvidia-cudnn-cu13", PROPRIETARY),
        ("certifi", "MPL-2.0"), ("typing-extensions", "PSF-2.0"), ("cryptography", "Apache-2.0 OR BSD-3-Clause"),
    ],
)  # fmt: skip
def test_known_distributions(name, licence):
    assert distribution(name).version and read_licence(name) == licence


@pytest.mark.parametrize(
    ("text", "expression"),
    [("MIT", "MIT"), ("apache-2.0", "Apache-2.0"), ("MIT OR Apache-2.0", "MIT OR Apache-2.0"), ("BSD", ""), ("", ""),
     ("Apache 2.0 License, see file", "")],
)  # fmt: skip
def test_spdx_expressions(text, expression):
    assert parse_spdx(text) == expression


def test_a_text_is_told_by_its_beginning():
    clauses = "Redistribution and use in source and binary forms, with or\nwithout modification, are permitted. {}"
    assert recognize_text(clauses.format("THE SOFTWARE IS PROVIDED")) == "BSD-2-Clause"
    assert recognize_text(clauses.format("Neither the name of the\ncopyright holder")) == "BSD-3-Clause"
    assert recognize_text("Terms of our own. " * 200 + "MIT License") == ""
