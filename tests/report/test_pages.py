"""Every page leads with its picture, needs nothing from outside, and is the same on every run."""

from __future__ import annotations

import re

import pytest

from fastdistill.report.html import Report
from fastdistill.report.svg import to_svg
from helpers.report_page import Page
from helpers.report_pages import PAGES

SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp("page")) for name, make in PAGES.items()}


@pytest.mark.parametrize("name", PAGES)
def test_two_sentences_the_figure_the_table(sources, name):
    blocks = Page(sources[name]).blocks
    tags = [tag for tag, _ in blocks]
    figure, table = tags.index("figure"), tags.index("table")
    assert figure < table
    prose = " ".join(text for _, text in blocks[:figure])
    assert len(SENTENCE_END.findall(prose)) <= 2, prose
    assert "p" not in tags[figure:table]


@pytest.mark.parametrize("name", PAGES)
def test_long_prose_is_folded(sources, name):
    for tag, text in Page(sources[name]).blocks:
        assert tag != "p" or len(SENTENCE_END.findall(text)) <= 3, text


REFUSALS = {
    "transfer": "Fewer than 10 base seeds support no claim in either direction: few seeds.",
    "transfer, invalid": "No verdict on clean: the experiment is invalid.",
    "repair": "Fewer than 10 base seeds support no claim in either direction: unlearned.",
    "audit": "a difference does not show bad intent.",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_of_a_verdict_is_not_folded(sources, name):
    paragraphs = [text for tag, text in Page(sources[name]).blocks if tag == "p"]
    assert any(text.endswith(REFUSALS[name]) for text in paragraphs)


@pytest.mark.parametrize("name", PAGES)
def test_pictures_are_inside_the_page(sources, name):
    page = Page(sources[name])  # raises for a tag that loads anything
    assert not re.findall(r"https?:|@import|url\((?!#)|data:", page.source)
    assert all(image["alt"] for image in page.images)
    assert len(page.ids) == len(set(page.ids))
    referenced = set(re.findall(r"url\(#([\w-]+)\)|href=\"#([\w-]+)\"", page.source))
    assert {a or b for a, b in referenced} == set(page.ids)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", ["demo", "audit", "transfer", "repair"])
def test_the_same_results_give_the_same_bytes(sources, name, tmp_path):
    assert PAGES[name](tmp_path) == sources[name]


def figure(title):
    from matplotlib.figure import Figure

    made = Figure(figsize=(3, 2))
    made.subplots().plot([0, 1], [0, 1])
    made.axes[0].set_title(title, parse_math=False)
    return made


@pytest.mark.filterwarnings("ignore:Glyph 27")
@pytest.mark.parametrize("title", ["<script>", "a & b", "a\x1b[2Jb", "$x$", '"><img src=x>'])
def test_text_of_a_picture_is_text(title):
    svg = to_svg(figure(title), alt=title, salt="1")
    Page(f"<p>{svg}</p>")
    assert "<script" not in svg
    assert "<img" not in svg
    assert len(re.findall("<text", svg)) > 5  # letters, not outlines


def test_a_fold_holds_what_is_added_inside():
    report = Report("t", "Lead.")
    with report.folded("Sum <b>"):
        report.paragraph("inside")
    report.paragraph("outside")
    assert (
        "<details><summary>Sum &lt;b&gt;</summary>\n<p>inside</p>\n</details>\n<p>outside</p>"
        in report.html()
    )
