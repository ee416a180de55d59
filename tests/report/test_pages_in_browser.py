"""Every page in a real browser: nothing is wider than the screen, folded text included."""

from __future__ import annotations

import pytest

from helpers.browser import BROWSER, measured
from helpers.report_pages import PAGES

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_a_phone(tmp_path, name):
    page = PAGES[name](tmp_path).replace("<details>", "<details open>")
    seen = measured(tmp_path, page, 360)
    assert seen["width"] <= 360
    assert seen["outside"] == 0
    assert all(left >= 0 and left + width <= 360 for left, _, width, _ in seen["images"])
