"""Self-contained HTML pages with text, tables and figures, in light and dark mode."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..runtime.atomic_files import write_atomically
from .svg import to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
# Control characters, marks that reverse the direction of text, and halves of surrogate pairs.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_STYLE = """
:root { --ink: #1c1e21; --soft: #5d6570; --line: #d9dde3; --paper: #ffffff; --wash: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ae; --line: #363b42; --paper: #16181b; --wash: #1f2226; }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body { margin: 0 auto; max-width: 46rem; padding: 1.5rem 1.25rem 5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 0.5rem; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 0.5rem; }
p { margin: 0.5rem 0 1rem; }
.soft, figcaption, caption { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; width: max-content; min-width: 100%; position: relative; left: 50%;
  max-width: min(70rem, 100vw - 4rem); transform: translateX(-50%); }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.4rem; position: sticky; left: 0;
  max-width: min(43.5rem, 100vw - 2.5rem); }
th, td { padding: 0.4rem 0.75rem 0.4rem 0; text-align: right; border-top: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; white-space: normal;
  vertical-align: bottom; }
table.text th, table.text td { text-align: left; white-space: pre-wrap; vertical-align: top;
  overflow-wrap: anywhere; }
figure { margin: 0.75rem 0; }
/* Figures keep a white background in dark mode, so that their colors do not change. */
figure svg { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); font-family: "DejaVu Sans", Verdana, sans-serif; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin-top: 0.4rem; }
.gallery { display: grid; gap: 0 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); }
.gallery figure { margin: 0.75rem 0; min-width: 0; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--soft); font-size: 0.92rem; }
pre { background: var(--wash); padding: 0.75rem 1rem; border-radius: 6px; overflow-x: auto;
  font-size: 0.85rem; }
"""


class Report:
    """A page, built from blocks in reading order. All text is escaped.

    A page leads with its picture: a lead of at most two sentences, a figure, a table. Longer text
    is folded below.
    """

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._blocks = [f"<h1>{_text(title)}</h1>", f"<p>{_text(lead)}</p>"]
        self._figures = 0

    def heading(self, text: str) -> None:
        self._blocks.append(f"<h2>{_text(text)}</h2>")

    def paragraph(self, text: str, *, soft: bool = False) -> None:
        kind = ' class="soft"' if soft else ""
        self._blocks.append(f"<p{kind}>{_text(text)}</p>")

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        caption: str = "",
        is_text: bool = False,
    ) -> None:
        """Appends a table. Cells of text break into lines; others do not, as figures must not."""
        self._blocks.append(_table(header, rows, caption, is_text))

    def columns(
        self, columns: Mapping[str, Callable[[T], str]], rows: Iterable[T], *, caption: str = ""
    ) -> None:
        """Appends a table of records: `columns` maps each heading to the text of its cells."""
        cells = [[text(row) for text in columns.values()] for row in rows]
        self.table(list(columns), cells, caption=caption)

    @contextmanager
    def folded(self, summary: str) -> Iterator[None]:
        """Collapses the blocks that are appended inside under a summary."""
        self._blocks.append(f"<details><summary>{_text(summary)}</summary>")
        yield
        self._blocks.append("</details>")

    def gallery(self, pictures: Sequence[tuple[Figure, str, str]]) -> None:
        """Appends small figures (figure, alt, caption), in columns where there is room."""
        figures = "".join(self._picture(*picture) for picture in pictures)
        self._blocks.append(f'<div class="gallery">{figures}</div>')

    def picture(self, figure: Figure, *, alt: str, caption: str, notes: str = "") -> None:
        """Appends a matplotlib figure; `alt` describes it in words.

        `notes`, folded under the caption, say how to read it.
        """
        self._blocks.append(self._picture(figure, alt, caption, notes, cut="tight"))

    def code(self, text: str) -> None:
        self._blocks.append(f"<pre>{_text(text)}</pre>")

    def reproduction(
        self,
        summary: str,
        command: str,
        text: str,
        versions: Mapping[str, str],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Appends, folded, how to repeat the experiment: its command, versions and settings."""
        with self.folded(summary):
            self.code(command)
            listed = ", ".join(f"{name} {version}" for name, version in versions.items())
            self.paragraph(f"{text} {listed}.", soft=True)
            if config is not None:
                rows = [(name, to_text(value)) for name, value in config.items()]
                self.table(("setting", "value"), rows)

    def _picture(
        self, figure: Figure, alt: str, caption: str, notes: str = "", cut: str | None = None
    ) -> str:
        self._figures += 1
        drawing = to_svg(figure, alt=_visible(alt), salt=str(self._figures), cut=cut)
        folded = f"<details><summary>Notes</summary>{_text(notes)}</details>" if notes else ""
        return f"<figure>{drawing}<figcaption>{_text(caption)}{folded}</figcaption></figure>"

    def html(self) -> str:
        body = "\n".join(self._blocks)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n{body}\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        write_atomically(path, self.html())


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, is_text: bool
) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    kind = ' class="text"' if is_text else ""
    return (
        f'<div class="scroll"><table{kind}>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def png(figure: Figure) -> bytes:
    """Returns a figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def to_text(value: Any) -> str:
    """Returns a setting in words: JSON, but a string without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: str) -> str:
    return html.escape(_visible(value), quote=True)


def _visible(value: str) -> str:
    """Returns a text with hidden characters as escapes, such as \\x1b."""
    return _HIDDEN.sub(lambda match: ascii(match[0])[1:-1], str(value))
