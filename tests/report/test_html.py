"""The page: whole, self-contained, legible in both themes, safe with hostile names."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from headway.report.html import render
from headway.report.results import CapacityResult, Comparison

VOID = {"meta", "br", "hr", "img", "link"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order; collects ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="session")
def _cache() -> dict[str, str]:
    return {}


@pytest.fixture
def page(comparison: Comparison, capacities: CapacityResult, _cache: dict[str, str]) -> str:
    if "page" not in _cache:
        _cache["page"] = render([comparison], [capacities], title="A <report>")
    return _cache["page"]


def test_tags_are_balanced_and_ids_unique(page: str):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))


def test_it_loads_nothing_and_runs_nothing(page: str):
    assert "<script" not in page
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_namespaces
    assert "<img" not in page and "@import" not in page


@pytest.mark.parametrize(
    "section",
    [
        "Latency against load",
        "Capacity",
        "Chunk utilisation",
        "Distributions at load 0.8",
        "Passes at load 0.8",
        "All figures",
        "What the numbers rest on",
    ],
)
def test_it_has_the_sections(page: str, section: str):
    assert f">{section}" in page


def test_it_says_what_the_numbers_rest_on(page: str):
    for fact in (
        "headway 0.1.0",
        "headway compare --policies a",
        "10.00 requests per second",
        "0, 1",
        "a trace",
    ):
        assert fact in page


def test_text_from_outside_is_escaped(page: str, one_run: Comparison):
    assert "<somewhere>" not in page and "&lt;somewhere&gt; &amp; fitted" in page
    assert "<h1>A &lt;report&gt;</h1>" in page
    hostile = replace(one_run, cluster="<script>alert(1)</script>")
    assert "<script" not in render([hostile], title="x")


def test_ink_follows_the_theme(page: str):
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert not re.search(r"(fill|stroke): ?(#000000|#ffffff|black|white)", page)


def test_one_run_alone_makes_a_page(one_run: Comparison):
    page = render([one_run], title="x")
    assert "Latency against load" not in page
    assert "Own" in page
