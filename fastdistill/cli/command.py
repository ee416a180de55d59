"""Build a command from a dataclass: options for its fields, KEY=VALUE, --config and common options.

    defaults of the dataclass  <  --config FILE  <  KEY=VALUE  <  --option

The module of a command is imported when the command runs. It defines run(options, extra) and
print_result(result), and optionally dry_run(options, extra) for --dry-run, extra_keys() (further
settings that KEY=VALUE accepts) and resolved_settings(options, extra) for --print-config. `options`
is the dataclass, `extra` the other settings.
"""

from __future__ import annotations

import inspect
import typing
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..runtime.atomic_files import check_folder
from .printing import print_json, stdout_for_result
from .settings import Text, check_keys, field_names, fill, gather, nearest, to_yaml

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
_METAVARS = {int: "INT", float: "NUMBER", Path: "PATH"}


def add(app: typer.Typer, name: str, kind: type[Any], module: str) -> None:
    """Add a command to `app`: settings and help from the dataclass `kind`, code from `module`."""

    def command(**cli_args: Any) -> None:
        raw = gather(cli_args.pop("config"), cli_args.pop("key_values") or [])
        print_config, as_json = cli_args.pop("print_config"), cli_args.pop("as_json")
        dry_run = cli_args.pop("dry_run", False)
        typed = {key: value for key, value in cli_args.items() if value is not None}
        raw |= {k: Text(value) if isinstance(value, str) else value for k, value in typed.items()}
        own_names = field_names(kind)
        with stdout_for_result():
            verb = import_module(f".{module}", __package__)
            check_keys(raw, [*own_names, *getattr(verb, "extra_keys", list)()])
        extra = {key: value for key, value in raw.items() if key not in own_names}
        options = fill(kind, {key: raw[key] for key in own_names if key in raw})
        if print_config:
            resolve = getattr(verb, "resolved_settings", lambda options, _: vars(options))
            with stdout_for_result():
                text = to_yaml(resolve(options, extra))
            print(text, end="")
            return
        if hasattr(options, "out"):
            check_folder("out", options.out)
        with stdout_for_result():
            import_module(".loaders", __package__).silence_transformers()
            result = (verb.dry_run if dry_run else verb.run)(options, extra)
        if result is None:  # another rank prints the result
            return
        if as_json:
            print_json(result.as_json() if hasattr(result, "as_json") else result)
        else:
            verb.print_result(result)

    hints = _option_hints(kind) | _common_hints(dry=getattr(kind, "DRY_RUN", False))
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
    register = app.command(
        name, cls=_parser(kind, module), help=kind.__doc__, short_help=kind.SHORT_HELP
    )
    register(command)


def _parser(kind: type[Any], module: str) -> type[TyperCommand]:
    """Return a command class whose errors suggest the setting that an unknown option stands for."""

    class Parser(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            cli_args = list(args)  # click empties the list
            try:
                return super().parse_args(ctx, args)
            except Exception as error:
                option = getattr(error, "option_name", None)  # of click's NoSuchOption
                hint = "" if option is None else _suggest_setting(option, cli_args, kind, module)
                if not hint:
                    raise
                raise ValueError(f"No such option: {option}. {hint}") from None

    return Parser


def _suggest_setting(option: str, cli_args: list[str], kind: type[Any], module: str) -> str:
    """Return how to write the setting closest to an unknown option; empty if none is close."""
    verb, options = import_module(f".{module}", __package__), list(_option_hints(kind))
    known = sorted({*field_names(kind), *getattr(verb, "extra_keys", list)()})
    key = option.strip("-").replace("-", "_")
    names = [key] if key in known else nearest(key, known)
    value = _option_value(option, cli_args)
    suggestions = [
        f"--{n.replace('_', '-')} {value}" if n in options else f"{n}={value}" for n in names
    ]
    return f"Write {' or '.join(suggestions)}" if suggestions else ""


def _option_value(option: str, cli_args: list[str]) -> str:
    """Return the value that follows an option, or VALUE."""
    for i, word in enumerate(cli_args):
        name, equals, value = word.partition("=")
        if name == option and equals:
            return value
        if word == option and i + 1 < len(cli_args) and not cli_args[i + 1].startswith("--"):
            return cli_args[i + 1]
    return "VALUE"


_Print = Annotated[
    bool, typer.Option("--print-config", help="Print all settings as YAML for --config.")
]
_Dry = Annotated[bool, typer.Option("--dry-run", help="Check the request without running it.")]
_FLAGS = (_Print, _Dry, Json)


def _common_hints(dry: bool) -> dict[str, Any]:
    key_values = typer.Argument(metavar="KEY=VALUE", hidden=True)
    file = typer.Option(metavar="YAML", help="Read settings from a YAML file.", show_default=False)
    return {
        "key_values": Annotated[list[str] | None, key_values],
        "config": Annotated[Path | None, file],
        "print_config": _Print,
        **({"dry_run": _Dry} if dry else {}),
        "as_json": Json,
    }


def _option_hints(kind: type[Any]) -> dict[str, Any]:
    """Return a hint per option; values stay text, so that settings.coerce reports every error."""
    hints, options = typing.get_type_hints(kind, include_extras=True), {}
    for field in fields(kind):
        if typing.get_origin(hints[field.name]) is not Annotated:
            continue
        hint, help = typing.get_args(hints[field.name])
        members = typing.get_args(hint) or (hint,)
        if field.default is not None:
            help += f" [{_format_default(field.default)}]"
        if bool in members:
            option = typer.Option(help=help, show_default=False)
            options[field.name] = Annotated[bool | None, option]
            continue
        metavar = next((_METAVARS[m] for m in members if m in _METAVARS), "TEXT")
        option = typer.Option(help=help, show_default=False, metavar=metavar)
        options[field.name] = Annotated[str | None, option]
    return options


def _format_default(default: Any) -> str:
    if default is MISSING:
        return "required"
    if isinstance(default, tuple):
        return ",".join(f"{part:g}" for part in default)
    return str(default).lower() if isinstance(default, bool) else str(default)
