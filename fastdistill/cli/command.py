"""From a dataclass of settings to a verb: options for its fields, key=value, --config and the rest.

    defaults of the dataclass  <  --config FILE  <  KEY=VALUE  <  --option

A verb's module is imported when the verb runs. It has run(own, more) and tell(found), and may have
dry(own, more) for --dry-run, as_json(found), MORE() naming further settings that key=value takes,
and shown(own, more) for what --print-config prints; `own` is the dataclass, `more` the others.
"""

from __future__ import annotations

import inspect
import sys
import typing
from contextlib import redirect_stdout
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..files import check_folder
from .printing import print_json
from .settings import Text, as_yaml, fill, gather, names_of, nearest, refuse_unknown

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
_METAVARS = {int: "INT", float: "NUMBER", Path: "PATH"}


def add(app: typer.Typer, name: str, kind: type, module: str) -> None:
    """Give `app` a command whose settings are the dataclass `kind`, whose docstring is its help,
    and whose work is `module`'s."""

    def command(**given: Any) -> None:
        said = gather(given.pop("config"), given.pop("pairs") or [])
        print_config, as_json = given.pop("print_config"), given.pop("as_json")
        dry_run = given.pop("dry_run", False)
        typed = {key: value for key, value in given.items() if value is not None}
        said |= {k: Text(value) if isinstance(value, str) else value for k, value in typed.items()}
        verb = import_module(f".{module}", __package__)
        own_names = names_of(kind)
        refuse_unknown(said, [*own_names, *getattr(verb, "MORE", list)()])
        more = {key: value for key, value in said.items() if key not in own_names}
        own = fill(kind, {key: said[key] for key in own_names if key in said})
        if print_config:
            shown = verb.shown(own, more) if hasattr(verb, "shown") else vars(own)
            print(as_yaml(shown), end="")
            return
        if hasattr(own, "out"):
            check_folder("out", own.out)
        # Libraries print; stdout is for what was asked.
        with redirect_stdout(sys.stderr):
            found = verb.dry(own, more) if dry_run else verb.run(own, more)
        if found is None:  # another process of this run tells
            return
        if as_json:
            print_json(verb.as_json(found) if hasattr(verb, "as_json") else found)
        else:
            verb.tell(found)

    hints = _options(kind) | _common(dry=getattr(kind, "DRY_RUN", False))
    command.__annotations__ = hints
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if hint in _FLAGS else None,
                annotation=hint,
            )
            for key, hint in hints.items()
        ]
    )
    app.command(name, cls=_parser(kind, module), help=kind.__doc__)(command)


def _parser(kind: type, module: str) -> type[TyperCommand]:
    """A parser of options that names the setting where somebody wrote one as an option."""

    class Parser(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            given = list(args)
            try:
                return super().parse_args(ctx, args)
            except Exception as error:
                option = getattr(error, "option_name", None)  # of click's NoSuchOption
                hint = "" if option is None else _as_setting(option, given, kind, module)
                if not hint:
                    raise
                raise ValueError(f"No such option: {option}. {hint}") from None

    return Parser


def _as_setting(option: str, given: list[str], kind: type, module: str) -> str:
    """How to write an option that is a setting, or is like one; empty where none is."""
    verb, own = import_module(f".{module}", __package__), list(_options(kind))
    known = sorted({*names_of(kind), *getattr(verb, "MORE", list)()})
    key = option.strip("-").replace("-", "_")
    near = [key] if key in known else nearest(key, known)
    value = _value_of(option, given)
    told = [f"--{n.replace('_', '-')} {value}" if n in own else f"{n}={value}" for n in near]
    return f"Write {' or '.join(told)}" if told else ""


def _value_of(option: str, given: list[str]) -> str:
    """What stands behind an option, or VALUE."""
    for i, word in enumerate(given):
        name, equals, value = word.partition("=")
        if name == option and equals:
            return value
        if word == option and i + 1 < len(given) and not given[i + 1].startswith("--"):
            return given[i + 1]
    return "VALUE"


_Print = Annotated[bool, typer.Option("--print-config", help="Print all settings as --config.")]
_Dry = Annotated[bool, typer.Option("--dry-run", help="Check everything, and do nothing.")]
_FLAGS = (_Print, _Dry, Json)


def _common(dry: bool) -> dict[str, Any]:
    pairs = typer.Argument(metavar="KEY=VALUE", hidden=True)
    file = typer.Option(metavar="YAML", help="Settings from a file.", show_default=False)
    return {
        "pairs": Annotated[list[str] | None, pairs],
        "config": Annotated[Path | None, file],
        "print_config": _Print,
        **({"dry_run": _Dry} if dry else {}),
        "as_json": Json,
    }


def _options(kind: type) -> dict[str, Any]:
    """Options are texts here: settings.fit reads them, so that every way in gives one error."""
    hints, found = typing.get_type_hints(kind, include_extras=True), {}
    for field in fields(kind):
        if typing.get_origin(hints[field.name]) is not Annotated:
            continue
        hint, help = typing.get_args(hints[field.name])
        members = typing.get_args(hint) or (hint,)
        if field.default is not None:
            help += f" [{_in_words(field.default)}]"
        if bool in members:
            option = typer.Option(help=help, show_default=False)
            found[field.name] = Annotated[bool | None, option]
            continue
        metavar = next((_METAVARS[m] for m in members if m in _METAVARS), "TEXT")
        option = typer.Option(help=help, show_default=False, metavar=metavar)
        found[field.name] = Annotated[str | None, option]
    return found


def _in_words(default: Any) -> str:
    if default is MISSING:
        return "required"
    if isinstance(default, tuple):
        return ",".join(f"{part:g}" for part in default)
    return str(default).lower() if isinstance(default, bool) else str(default)
