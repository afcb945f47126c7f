"""Facts of spec fields: help, flag, and effect on a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from inspect import Parameter, cleandoc, signature
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

from ptychodask.errors import Frozen, PtychodaskError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of a field that functions, commands and runs depend on."""

    help: str
    """Meaning in one line, for ``help(function)`` and ``--help``."""

    flag: str | None = None
    """Flag of the command line; by default the name of the field."""

    stored: bool = True
    """False: sets when a run starts and how it is displayed, so that a result does not record it."""

    recorded_at_default: bool = True
    """False: a result records it only if it is not the default, because version 0.1, whose runs can be resumed, did not
    have it."""

    changes_result: bool = True
    """False: the pixels of tiles do not depend on it, so that a run can be resumed with another value."""

    one_scan: bool = False
    """Refers to the patterns of one scan, so that several scans cannot share it."""

    growing: bool = True
    """False: needs a complete scan, so that a growing scan cannot be followed with it."""

    planned: bool = False
    """The command `plan` takes it too."""

    timed: bool = False
    """The command `bench` takes it too."""

    of_format: bool = False
    """Property of a file that some formats define; these refuse the option."""

    segment: Literal["same", "first", "each"] = "same"
    """Segments of a growing scan: the option is the same for all, only applies to the first, or may differ."""

    inspected: bool = True
    """The command `inspect` takes it too."""


def option(default: Any, *, compare: bool = True, **facts: Any) -> Any:
    """Field of a spec, with its default and its `Facts`.

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class Spec:
    ...     crop: int = option(20, help="Pixels that are used.", changes_result=False)
    >>> Spec().crop, names_where(Spec, changes_result=False)
    (20, ('crop',))
    """
    return field(default=default, compare=compare, metadata={"facts": Facts(**facts)})


WORDS_OF_TYPES = {"bool": "True or False", "int": "a whole number", "float": "a number"}
"""Descriptions of the types of fields, for messages."""


def check_types(spec: Frozen, label: str) -> None:
    """Raise `PtychodaskError` unless numbers and switches have their fields' types.

    Numbers of NumPy become plain ones, as JSON needs them.

    Parameters
    ----------
    spec : dataclass
        During its ``__post_init__``.
    label : str
        Start of messages.

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class Spec:
    ...     epochs: int = option(50, help="Number of epochs.")
    ...
    ...     def __post_init__(self):
    ...         check_types(self, "training")
    >>> Spec(epochs=1.5)
    Traceback (most recent call last):
    ...
    ptychodask.errors.PtychodaskError: training: epochs is 1.5, expected a whole number
    """
    for each in fields(spec):
        kind, _, optional = str(each.type).partition(" | ")
        value = getattr(spec, each.name)
        if kind not in WORDS_OF_TYPES or optional not in ("", "None") or (optional and value is None):
            continue
        # NumPy's switches are no bool, and a bool is a whole number to Python.
        is_switch = type(value).__name__ in ("bool", "bool_")
        fits = {"bool": is_switch, "int": isinstance(value, Integral), "float": isinstance(value, Real)}[kind]
        if not fits or (is_switch and kind != "bool"):
            raise PtychodaskError(f"{label}: {each.name} is {value!r}, expected {WORDS_OF_TYPES[kind]}")
        object.__setattr__(spec, each.name, {"bool": bool, "int": int, "float": float}[kind](value))


def facts_of(spec: type[Frozen]) -> dict[str, Facts]:
    """Facts of the fields of a spec, by name."""
    return {each.name: each.metadata["facts"] for each in fields(spec)}


def names_where(spec: type[Frozen], **expected: Any) -> tuple[str, ...]:
    """Names of the fields with the given facts."""
    return tuple(
        name
        for name, facts in facts_of(spec).items()
        if all(getattr(facts, fact) == value for fact, value in expected.items())
    )


def values_to_record(spec: Frozen) -> dict[str, Any]:
    """Values of a spec that a result records, by name.

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class Spec:
    ...     crop: int = option(20, help="Pixels that are used.")
    ...     added: bool = option(False, help="An option of a later version.", recorded_at_default=False)
    >>> values_to_record(Spec()), values_to_record(Spec(added=True))
    ({'crop': 20}, {'crop': 20, 'added': True})
    """
    facts = facts_of(type(spec))
    return {
        each.name: getattr(spec, each.name)
        for each in fields(spec)
        if facts[each.name].stored
        and (facts[each.name].recorded_at_default or getattr(spec, each.name) != each.default)
    }


def flags_of(spec: type[Frozen]) -> dict[str, str]:
    """Flags of the fields of a spec, by name."""
    return {name: facts.flag or f"--{name.replace('_', '-')}" for name, facts in facts_of(spec).items()}


def takes_fields(spec: type[Frozen]) -> Callable[[Function], Function]:
    """Decorator that lists the fields of a spec in signature and help.

    The function keeps its ``**`` parameter, and checks the names with `with_fields`.
    """

    def decorate(function: Function) -> Function:
        plain = signature(function)
        declared = [each for each in plain.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
        added = [
            Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in fields(spec)
        ]
        function.__signature__ = plain.replace(parameters=[*declared, *added])  # type: ignore[attr-defined]
        function.__doc__ = f"{cleandoc(function.__doc__ or '')}\n\n{_section(spec)}"
        return function

    return decorate


def _section(spec: type[Frozen]) -> str:
    """Section of a docstring that lists the fields of a spec."""
    names = {flag: name for name, flag in flags_of(spec).items()}
    lines = ["Other Parameters", "----------------"]
    for each in fields(spec):
        meaning = re.sub("--[a-z-]+", lambda flag: names.get(flag[0], flag[0]), each.metadata["facts"].help)
        lines += [f"{each.name} : {each.type}, default {each.default!r}", f"    {meaning}"]
    return "\n".join(lines)
