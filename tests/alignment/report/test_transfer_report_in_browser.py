"""A transfer report in a real browser: pictures in place, nothing wider than the screen."""

from __future__ import annotations

import pytest

from helpers.browser import BROWSER, measured, misplaced, shot
from helpers.made_students import arm, controls, experiment

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

LONG = (
    "addition prompts, full KL over the whole vocabulary, <b>T = 4</b>, other_initialisation_" * 2
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    students = [*arm("clean", checkpoints=3), *arm(LONG, tau=0.4, checkpoints=3), *controls()]
    made = experiment(students=students, audits=[], development=[])
    path = made.to_html(tmp_path_factory.mktemp("page") / "report.html")
    return path.read_text(encoding="utf-8").replace("<details>", "<details open>")


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_every_picture_is_at_its_place(tmp_path, page, width, scheme):
    boxes = measured(tmp_path, page, width)
    seen = shot(tmp_path, page, width, boxes["height"], scheme)
    assert len(boxes["images"]) == 3
    assert misplaced(tmp_path, page, seen, boxes["images"]) == []


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("width", [320, 400, 1200])
def test_nothing_is_wider_than_the_screen(tmp_path, page, width):
    sizes = measured(tmp_path, page, width)
    assert sizes["width"] <= width
    assert sizes["outside"] == 0
