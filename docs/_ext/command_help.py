"""The directive `command-help`: a section per command, with its --help and its other settings."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fastdistill.cli import verbs
from fastdistill.cli.app import app as cli


class CommandHelp(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        root = typer.main.get_command(cli)
        text = "\n".join(_section(words, command) for words, command in leaves(root))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def leaves(command: Any, words: tuple[str, ...] = ("fastdistill",)) -> Iterator[tuple[Any, Any]]:
    """Yield (words, command) of every command that is not a group."""
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from leaves(child, (*words, name))
        else:
            yield (*words, name), child


def _section(words: tuple[str, ...], command: Any) -> str:
    parent = typer.Context(command, info_name=" ".join(words), terminal_width=80)
    text = command.get_help(parent)
    name = "".join(word.capitalize() for word in words[-1].split("-"))
    kind = getattr(verbs, {"Build": "CacheBuild"}.get(name, name), None)
    title = " ".join(words)
    return f"## {title}\n\n```text\n{text}\n```\n\n{_settings(kind) if kind else ''}"


def _settings(kind: type[Any]) -> str:
    """Return a table of the settings that are KEY=VALUE only."""
    hints = typing.get_type_hints(kind, include_extras=True)
    rows = [
        f"| `{field.name}` | `{_type(hints[field.name])}` | `{field.default}` |"
        for field in fields(kind)
        if typing.get_origin(hints[field.name]) is not Annotated and field.default is not MISSING
    ]
    if not rows:
        return ""
    table = "| setting | type | default |\n|---|---|---|\n"
    return "Settings of the form `KEY=VALUE`:\n\n" + table + "\n".join(rows) + "\n"


def _type(hint: Any) -> str:
    return str(hint).replace("|", "or") if typing.get_args(hint) else hint.__name__


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
