"""Figures as SVG inside an HTML page: the same bytes on every run, and text that stays text."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # not allowed in XML
# The page names the font family once. matplotlib writes it in either form, by its version.
_FONT = re.compile(r"font: ([\d.]+px) [^;]*")
_FAMILY = re.compile(r"font-family: [^;]*(; |$)")
_DECIMALS = re.compile(r"(\d+\.\d\d)\d+")
_REFERENCE = re.compile(r"#([\w-]+)")


def to_svg(figure: Figure, *, alt: str, salt: str, cut: str | None = None) -> str:
    """Returns a figure as an <svg> element of an HTML page.

    Args:
        alt: the figure in words, for screen readers.
        salt: distinct for each figure of a page, because ids are shared by the whole page.
        cut: "tight" removes the margins.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches=cut, metadata=_NO_METADATA)
    root = ElementTree.fromstring(_CONTROL.sub("\ufffd", buffer.getvalue()))
    values = " ".join(value for element in root.iter() for value in element.attrib.values())
    references = set(_REFERENCE.findall(values))
    for element in root.iter():
        for child in [child for child in element if child.tag.endswith(("}style", "}metadata"))]:
            element.remove(child)
        element.tag = element.tag.rpartition("}")[2]  # HTML knows svg without its namespace
        attributes = {
            name.rpartition("}")[2]: _compact(value) for name, value in element.attrib.items()
        }
        if attributes.get("id") not in references:
            attributes.pop("id", None)
        element.attrib = attributes
        element.text, element.tail = (
            text if text and text.strip() else None for text in (element.text, element.tail)
        )
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode")


def _compact(value: str) -> str:
    """Returns an attribute with two decimals, and without line breaks and font family."""
    text = _FAMILY.sub("", _FONT.sub(r"font-size: \1", " ".join(value.split())))
    return _DECIMALS.sub(r"\1", text)
