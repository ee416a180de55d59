"""A run's report in a real browser: every picture where it belongs, nothing wider than the screen,
in light and dark, on a phone and on a desk."""

from __future__ import annotations

import re

import numpy as np
import pytest

from helpers.browser import BROWSER, measured, misplaced, shot
from helpers.report_pages import PAGES

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

PAPER = {"light": (255, 255, 255), "dark": (0x16, 0x18, 0x1B)}
WIDTHS = (400, 1200)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return PAGES["run"](tmp_path_factory.mktemp("watched"))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("scheme", PAPER)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_is_at_its_place(tmp_path, page, width, scheme):
    boxes = measured(tmp_path, page, width)
    seen = shot(tmp_path, page, width, boxes["height"], scheme)
    assert len(boxes["images"]) == 14
    assert misplaced(tmp_path, page, seen, boxes["images"]) == []
    for corner in (seen[0, 0], seen[-1, 0], seen[0, -1], seen[-1, -1]):
        assert np.abs(corner - PAPER[scheme]).max() <= 2
    x, y, w, h = boxes["title"]
    contrast = np.abs(seen[y : y + h, x : x + w] - PAPER[scheme]).max()
    assert contrast > 180  # the title can be read


@pytest.mark.slow
def test_pictures_stand_in_two_columns_on_a_desk_and_in_one_on_a_phone(tmp_path, page):
    columns = [len({box[0] for box in measured(tmp_path, page, w)["images"]}) for w in WIDTHS]
    assert columns == [1, 2]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("width", [320, *WIDTHS])
def test_nothing_is_wider_than_the_screen(tmp_path, page, width):
    sizes = measured(tmp_path, page.replace("<details>", "<details open>"), width)
    assert sizes["width"] <= width
    assert sizes["outside"] == 0


@pytest.mark.slow
def test_a_broken_page_would_be_seen(tmp_path, page):
    bare = page.replace('<div class="scroll">', "<div>")
    assert measured(tmp_path, bare.replace("<details>", "<details open>"), 320)["width"] > 320
    boxes = measured(tmp_path, page, 400)
    damaged = re.sub(r"(<svg [^>]*>).*?</svg>", r"\1</svg>", page, count=1, flags=re.DOTALL)
    seen = shot(tmp_path, damaged, 400, boxes["height"], "light")
    assert 0 in misplaced(tmp_path, page, seen, boxes["images"])
