"""A run's report in a real browser: every picture where it belongs, nothing wider than the screen,
in light and dark, on a phone and on a desk."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

from fastdistill.run_report import write_run_report
from helpers.training import ragged, train

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

PAPER = {"light": (255, 255, 255), "dark": (0x16, 0x18, 0x1B)}
WIDTHS = (400, 1200)
# The page in a frame of so many pixels, and behind it what it measured of itself.
MEASURE = """<!doctype html><iframe id="f" style="border:0;width:{width}px;height:20000px"
srcdoc="{page}"></iframe><pre id="found"></pre><script>
window.onload = () => {{
  const page = document.getElementById("f").contentDocument;
  const box = e => {{ const b = e.getBoundingClientRect();
    return [b.left, b.top, b.width, b.height].map(Math.round); }};
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth, height: Math.ceil(page.body.offsetHeight),
    title: box(page.querySelector("h1")), images: [...page.images].map(box),
    outside: [...page.querySelectorAll("h1, h2, p, figure, div.scroll, details, pre")]
      .map(box).filter(b => b[0] < 0 || b[0] + b[2] > {width}).length }});
}};</script>"""


def browse(tmp_path, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measured(tmp_path, page, width):
    """Boxes (left, top, width, height) in pixels of what a page shows at this width."""
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
    dom = browse(tmp_path, "--dump-dom", f"--window-size={width + 50},900", frame.as_uri())
    return json.loads(html.unescape(re.search(r'<pre id="found">(.+?)</pre>', dom).group(1)))


def shot(tmp_path, page, width, height, scheme):
    """The page as the browser paints it, [height, width, 3] of 0 to 255."""
    path, picture = tmp_path / "page.html", tmp_path / "shot.png"
    path.write_text(page, encoding="utf-8")
    dark = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    size = f"--window-size={width},{height}"
    browse(tmp_path, dark, size, f"--screenshot={picture}", path.as_uri())
    found = matplotlib.image.imread(picture)[..., :3] * 255
    assert found.shape == (height, width, 3)
    return found


def coarse(picture, cells=12):
    """Mean colours over a grid, so that the browser's way of scaling does not matter."""
    rows, columns = (np.array_split(np.arange(n), cells) for n in picture.shape[:2])
    return np.array([[picture[np.ix_(r, c)].mean((0, 1)) for c in columns] for r in rows])


def embedded(page):
    """The pictures in a page's data URIs, as they were drawn."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    drawn = (matplotlib.image.imread(io.BytesIO(base64.b64decode(data))) for data in found)
    return [picture[..., :3] * 255 for picture in drawn]


def misplaced(page, seen, boxes):
    """Of the pictures of a page: those that are not painted in their boxes. Painted 8 pixels off
    they differ from themselves by 3 to 4 on average, blank paper by 3 to 10, in place by 0 to 2."""
    drawn, wrong = [coarse(picture) for picture in embedded(page)], []
    for i, (x, y, w, h) in enumerate(boxes):
        inside = coarse(seen[y + 1 : y + h - 1, x + 1 : x + w - 1])  # without the border
        apart = [np.abs(inside - picture).mean() for picture in drawn]
        assert np.abs(drawn[i] - 255).mean() > 2.5  # there is something on it to recognise
        if np.argmin(apart) != i or apart[i] > 2:
            wrong.append(i)
    return wrong


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    watching = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    watching["max_grad_norm"] = 1e6  # transformers 5.0 logs the norm only where it may clip
    train(folder, max_steps=6, learning_rate=0.1, eval_dataset=ragged(5), **watching)
    return write_run_report(folder / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", PAPER)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_is_at_its_place(tmp_path, page, width, scheme):
    boxes = measured(tmp_path, page, width)
    seen = shot(tmp_path, page, width, boxes["height"], scheme)
    assert len(boxes["images"]) == 14
    assert misplaced(page, seen, boxes["images"]) == []
    for corner in (seen[0, 0], seen[-1, 0], seen[0, -1], seen[-1, -1]):
        assert np.abs(corner - PAPER[scheme]).max() <= 2
    x, y, w, h = boxes["title"]
    contrast = np.abs(seen[y : y + h, x : x + w] - PAPER[scheme]).max()
    assert contrast > 180  # the title can be read


def test_pictures_stand_in_two_columns_on_a_desk_and_in_one_on_a_phone(tmp_path, page):
    columns = [len({box[0] for box in measured(tmp_path, page, w)["images"]}) for w in WIDTHS]
    assert columns == [1, 2]


@pytest.mark.parametrize("width", [320, *WIDTHS])
def test_nothing_is_wider_than_the_screen(tmp_path, page, width):
    found = measured(tmp_path, page.replace("<details>", "<details open>"), width)
    assert found["width"] <= width
    assert found["outside"] == 0


def test_a_broken_page_would_be_seen(tmp_path, page):
    bare = page.replace('<div class="scroll">', "<div>")
    assert measured(tmp_path, bare.replace("<details>", "<details open>"), 320)["width"] > 320
    boxes = measured(tmp_path, page, 400)
    damaged = re.sub(r"base64,[^\"]{40}", "base64," + "A" * 40, page, count=1)
    seen = shot(tmp_path, damaged, 400, boxes["height"], "light")
    assert 0 in misplaced(page, seen, boxes["images"])
