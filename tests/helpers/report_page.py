"""Shared by test_run_report and others."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Text, pictures and tables of a page; raises where a tag is not closed in its turn."""

    def __init__(self, path):
        super().__init__()
        self.open: list[str] = []
        self.images: list[Any] = []
        self.text: Any = []
        self.rows: list[list[Any]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.text).split())
        self.table = {row[0]: row[1:] for row in self.rows if row}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not {"href", "srcset", "data", "style", "onload"} & attrs.keys(), attrs
        assert tag not in ("script", "link", "iframe", "object"), tag
        if tag == "img":
            self.images.append(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
            if self.open and self.open[-1] == "td":
                self.rows[-1].append(data)
