"""Errors of the package, and checks of options and fields."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar, Protocol, TypeVar


class PtychodaskError(ValueError):
    """Invalid input or state.

    The message is one line: the file or argument, what was found, what was expected, and the remedy.
    """

    def __init__(self, message: str) -> None:
        super().__init__(in_one_line(message))

    def _render_traceback_(self) -> list[str]:
        """Text that IPython and Jupyter show in place of a traceback.

        Examples
        --------
        >>> PtychodaskError("a.npz: no such file")._render_traceback_()
        ['PtychodaskError: a.npz: no such file']
        """
        return [f"{type(self).__name__}: {self}"]


def in_one_line(text: str) -> str:
    r"""Text in one line, with control characters escaped.

    Names from files may contain line ends and terminal commands.

    Examples
    --------
    >>> in_one_line("key 'a\x1b[2J'\nis missing")
    "key 'a\\x1b[2J' is missing"
    """
    return "".join(
        each if each.isprintable() else " " if each.isspace() else each.encode("unicode_escape").decode()
        for each in text
    )


class Frozen(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Spec = TypeVar("Spec", bound=Frozen)


def in_brief(error: BaseException) -> str:
    """First line of an error's message; without one, its type.

    Examples
    --------
    >>> in_brief(ValueError("no chunk\\nand more")), in_brief(KeyError())
    ('no chunk', 'KeyError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_choice(name: str, value: object, choices: tuple[object, ...], label: str) -> None:
    """Raise `PtychodaskError` unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise PtychodaskError(f"{label}: {name} is {value!r}, expected one of: {listed}")


def with_fields(spec: Spec, given: dict[str, Any]) -> Spec:
    """Copy of a spec with some fields replaced.

    Raises
    ------
    PtychodaskError
        If the spec has no field of such a name; the message lists its fields.
    """
    names = [each.name for each in fields(spec)]
    unknown = [name for name in given if name not in names]
    if unknown:
        raise PtychodaskError(
            f"{type(spec).__name__}: no field {', '.join(unknown)}; the fields are: {', '.join(names)}"
        )
    return replace(spec, **given)
