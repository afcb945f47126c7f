"""Options of commands that are fields of specs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import typer

from ptychodask.cli.flags import numbers, numbers_in, numbers_or_file, pairs, whole_numbers
from ptychodask.errors import Frozen
from ptychodask.options import facts_of, flags_of, names_where

Command = Callable[..., None]
Reader = Callable[[Any], Any]


def options_of(module: str, spec: str, **facts: Any) -> Callable[[Command], Command]:
    """Decorator that adds the fields of a spec to a command.

    They come before its keyword-only parameters. The command gets the fields that were set as ``**fields``; for the
    others, the defaults of the spec apply.

    Parameters
    ----------
    module, spec : str
        Module and name of the spec; imported by `complete`, since the list of commands must not wait for it.
    **facts
        `Facts` of the fields to add; by default all are.
    """

    def decorate(command: Command) -> Command:
        plain = inspect.signature(command, eval_str=True)
        declared = [each for each in plain.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]

        def with_fields() -> Command:
            parameters, readers = _options(getattr(import_module(module), spec), plain.parameters, facts)

            @wraps(command)
            def run(**values: Any) -> None:
                given = {name: values.pop(name) for name in readers}
                fields = {name: readers[name](value) for name, value in given.items() if value is not None}
                command(**values, **fields)

            ordered = [
                *(each for each in declared if each.kind is not Parameter.KEYWORD_ONLY),
                *parameters,
                *(each for each in declared if each.kind is Parameter.KEYWORD_ONLY),
            ]
            run.__signature__ = plain.replace(parameters=ordered)  # type: ignore[attr-defined]
            return run

        command.__signature__ = plain.replace(parameters=declared)  # type: ignore[attr-defined]
        command.with_fields = with_fields  # type: ignore[attr-defined]
        return command

    return decorate


def complete(command: Command) -> Command:
    """Command with the fields of its spec as parameters."""
    return command.with_fields() if hasattr(command, "with_fields") else command


def typer_command(command: Command) -> Any:
    """Typer's command with all of its options."""
    app = typer.Typer(add_completion=False)
    app.command()(complete(command))
    return typer.main.get_command(app)


def _options(
    spec: type[Frozen], taken: Collection[str], facts: dict[str, Any]
) -> tuple[list[Parameter], dict[str, Reader]]:
    """Parameters of a command, and functions that read their values."""
    parameters, readers = [], {}
    hints, flags, known = get_type_hints(spec), flags_of(spec), facts_of(spec)
    for name in names_where(spec, **facts):
        if name not in taken:
            kind, meaning, readers[name] = _as_text(hints[name], flags[name], known[name].help)
            # On by default, or if it can be: the flag that turns it off is an option too.
            is_on = kind is bool and spec.__dataclass_fields__[name].default in (True, "auto")
            flag = f"{flags[name]}/--no-{flags[name][2:]}" if is_on else flags[name]
            is_read = isinstance(kind, _NumberOr)
            option: Any = Annotated[
                Any if is_read else kind, typer.Option(flag, help=meaning, parser=kind if is_read else None)
            ]
            parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=option))
    return parameters, readers


def _as_text(hint: Any, flag: str, meaning: str) -> tuple[Any, str, Reader]:
    """Type, help and reader of the option for a field."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    origins = {get_origin(kind): get_args(kind) for kind in kinds}
    content = f"{meaning[0].lower()}{meaning[1:]}"
    parts = origins.get(tuple, ())
    if Path in kinds:
        return Path, meaning, _unchanged
    if Mapping in origins:
        return list[str], f"NAME=KEY: {content} Repeatable.", pairs
    if Ellipsis in parts:
        return list[str], f"{meaning} Repeatable.", tuple
    if bool in kinds:
        return bool, meaning, _unchanged
    if int in kinds and Literal in origins:
        return _NumberOr(origins[Literal]), meaning, _unchanged
    if parts:
        read, words = (whole_numbers if parts[0] is int else numbers), origins.get(Literal, ())
        return str, meaning, lambda text: text if text in words else read(flag, text, len(parts))
    if str in kinds or Literal in origins:
        return str, meaning, _unchanged
    if Sequence in origins:
        return (
            str,
            f"{meaning[:-1]}: numbers such as 17,40, or a .npy file.",
            lambda text: numbers_or_file(flag, text, content.rstrip(".")),
        )
    if np.ndarray in origins:
        return Path, f".npy file of {content}", lambda path: numbers_in(flag, path, content.rstrip("."))
    return next(kind for kind in kinds if kind is not NoneType), meaning, _unchanged


class _NumberOr:
    """Parser of a whole number, or of one of some words.

    Commands that pass options on check them by it too.
    """

    def __init__(self, words: Collection[str]) -> None:
        self._words = words
        self.__name__ = " or ".join(["number", *words])

    def __call__(self, text: str) -> int | str:
        if text not in self._words and not text.isdecimal():
            raise typer.BadParameter(f"{text!r}, expected a whole number, or {' or '.join(self._words)}")
        return text if text in self._words else int(text)


def _unchanged(value: Any) -> Any:
    return value
