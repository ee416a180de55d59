"""Pages in a headless Chromium: where their boxes are, and what is painted."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


# The page in a frame of so many pixels, and behind it what it measured of itself.
MEASURE = """<!doctype html><iframe id="f" style="border:0;width:{width}px;height:20000px"
srcdoc="{page}"></iframe><pre id="found"></pre><script>
window.onload = () => {{
  const page = document.getElementById("f").contentDocument;
  const box = e => {{ const b = e.getBoundingClientRect();
    return [b.left, b.top, b.width, b.height].map(Math.round); }};
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth, height: Math.ceil(page.body.offsetHeight),
    title: box(page.querySelector("h1")), images: [...page.querySelectorAll("figure svg")].map(box),
    outside: [...page.querySelectorAll("h1, h2, p, figure, div.scroll, details, pre, caption")]
      .map(box).filter(b => b[0] < 0 || b[0] + b[2] > {width}).length }});
}};</script>"""


def browse(tmp_path, *options):
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measured(tmp_path, page, width):
    """Boxes (left, top, width, height) in pixels of what a page shows at this width."""
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
    dom = browse(tmp_path, "--dump-dom", f"--window-size={width + 50},900", frame.as_uri())
    match = re.search(r'<pre id="found">(.+?)</pre>', dom)
    assert match is not None
    return json.loads(html.unescape(match.group(1)))


def shot(tmp_path, page, width, height, scheme):
    """The page as the browser paints it, [height, width, 3] of 0 to 255."""
    path, picture = tmp_path / "page.html", tmp_path / "shot.png"
    path.write_text(page, encoding="utf-8")
    dark = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    size = f"--window-size={width},{height}"
    browse(tmp_path, dark, size, f"--screenshot={picture}", path.as_uri())
    image = matplotlib.image.imread(picture)[..., :3] * 255
    assert image.shape == (height, width, 3)
    return image


def coarse(picture, cells=12):
    """Mean colors over a grid, so that the browser's way of scaling does not matter."""
    rows, columns = (np.array_split(np.arange(n), cells) for n in picture.shape[:2])
    return np.array([[picture[np.ix_(r, c)].mean((0, 1)) for c in columns] for r in rows])


def drawings(tmp_path, page):
    """The pictures of a page, as the browser paints them on a page of their own."""
    head, pictures = page[: page.index("<body>")], re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    figures = "".join(f"<figure>{picture}</figure>" for picture in pictures)
    alone = f"{head}<body><h1>-</h1>{figures}</body></html>"
    seen = measured(tmp_path, alone, 600)
    paper = shot(tmp_path, alone, 600, seen["height"], "light")
    return [paper[y + 1 : y + h - 1, x + 1 : x + w - 1] for x, y, w, h in seen["images"]]


def misplaced(tmp_path, page, seen, boxes):
    """Of the pictures of a page: those that are not painted in their boxes. Pictures of a run and
    of a transfer differ from themselves by 0.2 to 1.9 on average, from each other by 1.9 to 8, and
    from blank paper by 2.4 to 14."""
    drawn, wrong = [coarse(picture) for picture in drawings(tmp_path, page)], []
    for i, (x, y, w, h) in enumerate(boxes):
        inside = coarse(seen[y + 1 : y + h - 1, x + 1 : x + w - 1])  # without the border
        apart = [np.abs(inside - picture).mean() for picture in drawn]
        assert np.abs(drawn[i] - 255).mean() > 2  # there is something on it to recognise
        if np.argmin(apart) != i or apart[i] > 2:
            wrong.append(i)
    return wrong
