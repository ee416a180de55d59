"""Shared by test_run_report and others."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Text, pictures and tables of a page; raises where a tag is not closed in its turn.

    page: its file, or its text.

    ids: all ids of the page. blocks: [tag, text] of its figures, tables and paragraphs in order,
    without those that are folded. `text` leaves out the words inside pictures.
    """

    def __init__(self, page):
        super().__init__()
        self.open: list[str] = []
        self.images: list[Any] = []
        self.text: Any = []
        self.rows: list[list[Any]] = []
        self.ids: list[str] = []
        self.blocks: list[list[str]] = []
        self.source = page if isinstance(page, str) else page.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.text).split())
        self.table = {row[0]: row[1:] for row in self.rows if row}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not {"src", "srcset", "data", "onload"} & attrs.keys(), attrs
        assert attrs.get("href", "#").startswith("#"), attrs
        assert "style" not in attrs or "svg" in self.open, attrs
        assert tag not in ("script", "link", "iframe", "object", "img", "style") or (
            tag == "style" and self.open == ["html", "head"]
        ), tag
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "svg":
            self.images.append({"alt": attrs["aria-label"]})
        if tag in ("figure", "table", "p") and "details" not in self.open:
            self.blocks.append([tag, ""])
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        if "p" in self.open and "details" not in self.open:
            self.blocks[-1][1] += data
        if "svg" in self.open:
            return
        if "style" not in self.open:
            self.text.append(data)
            if self.open and self.open[-1] == "td":
                self.rows[-1].append(data)
