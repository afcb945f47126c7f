"""Names of units of length and energy."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import numpy as np

from ptychodask.errors import PtychodaskError

Unit = Literal["px", "m", "cm", "mm", "um", "nm", "pm", "angstrom"]
"""Unit of positions; "px" are object pixels."""

Dimension = Literal["m", "eV"]
"""Kind of a quantity, by the unit that its values are converted to."""

EV_PER_JOULE = 1 / 1.602176634e-19
"""Electronvolts in a joule (SI, exact)."""

_PREFIXES = {
    "T": 1e12,
    "G": 1e9,
    "M": 1e6,
    "k": 1e3,
    "K": 1e3,
    "d": 1e-1,
    "c": 1e-2,
    "m": 1e-3,
    "u": 1e-6,
    "µ": 1e-6,
    "μ": 1e-6,
    "n": 1e-9,
    "p": 1e-12,
    "f": 1e-15,
    "a": 1e-18,
}
_PREFIX_WORDS = {
    "tera": 1e12,
    "giga": 1e9,
    "mega": 1e6,
    "kilo": 1e3,
    "deci": 1e-1,
    "centi": 1e-2,
    "milli": 1e-3,
    "micro": 1e-6,
    "nano": 1e-9,
    "pico": 1e-12,
    "femto": 1e-15,
    "atto": 1e-18,
}
_SYMBOLS: dict[str, tuple[Dimension, float]] = {
    "m": ("m", 1.0),
    "eV": ("eV", 1.0),
    "J": ("eV", EV_PER_JOULE),
    "V": ("eV", 1.0),
}
_WORDS: dict[str, tuple[Dimension, float]] = {
    "meter": ("m", 1.0),
    "metre": ("m", 1.0),
    "electronvolt": ("eV", 1.0),
    "electron-volt": ("eV", 1.0),
    "electron volt": ("eV", 1.0),
    "electron_volt": ("eV", 1.0),
    "joule": ("eV", EV_PER_JOULE),
    "volt": ("eV", 1.0),
}
_ALONE: dict[str, tuple[Dimension, float]] = {
    "micron": ("m", 1e-6),
    "a": ("m", 1e-10),
    "å": ("m", 1e-10),
    "angstrom": ("m", 1e-10),
    "ångström": ("m", 1e-10),
    "ångstrom": ("m", 1e-10),
    "angstroem": ("m", 1e-10),
    "inch": ("m", 0.0254),
}
_PIXEL = frozenset({"px", "pixel", "pixels", "pix"})
_SCALED = re.compile(r"^(10\^[+-]?[0-9]+|[0-9.]+(?:e[+-]?[0-9]+)?)\s*[*. ]?\s*(\D.*)$", re.IGNORECASE)


def unit_text(attribute: Any) -> str | None:
    """Name of a unit from an attribute; None if empty.

    Examples
    --------
    >>> unit_text(np.array([[b"um"]])), unit_text(" mm "), unit_text(b"")
    ('um', 'mm', None)
    """
    if attribute is None:
        return None
    try:
        values = np.atleast_1d(np.asarray(attribute)).reshape(-1).tolist()
    except (TypeError, ValueError):
        return None
    names = {text for value in values if (text := _plain(value))}
    # Several different names, one per column, are no name of one unit.
    return " and ".join(sorted(names)) or None


def _plain(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.strip().strip("\0[]()").strip() if value is not None else ""


def factor_of(name: str, dimension: Dimension) -> float | None:
    """Factor from a unit to metres or electronvolts.

    None if the name is no unit of this dimension.

    Examples
    --------
    >>> factor_of("micrometers", "m"), factor_of("keV", "eV"), factor_of("1e-9 m", "m"), factor_of("s", "m")
    (1e-06, 1000.0, 1e-09, None)
    """
    text = " ".join(name.replace("Å", "Å").split())
    unit = _of_name(text)
    if unit is None and (scaled := _SCALED.match(text)):
        number, unit = scaled.group(1), _of_name(scaled.group(2).strip())
        if unit is not None:
            power = _number(f"1e{number[3:]}" if number.startswith("10^") else number)
            unit = None if power is None else (unit[0], unit[1] * power)
    return unit[1] if unit is not None and unit[0] == dimension else None


def _number(text: str) -> float | None:
    """Positive finite number of a text; None if it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None


def _of_name(text: str) -> tuple[Dimension, float] | None:
    for symbol, (dimension, size) in _SYMBOLS.items():
        if text == symbol:
            return dimension, size
        if text.endswith(symbol) and (factor := _PREFIXES.get(text[: -len(symbol)])):
            return dimension, _exact(factor * size)
    lower = text.casefold()
    for word in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if word in _ALONE:
            return _ALONE[word]
        for base, (dimension, size) in _WORDS.items():
            if word == base:
                return dimension, size
            if word.endswith(base) and (factor := _PREFIX_WORDS.get(word[: -len(base)].rstrip("-"))):
                return dimension, _exact(factor * size)
    # Files write symbols in any case. M is mega only before a symbol in its own case, which was read above.
    for symbol, (dimension, size) in _SYMBOLS.items():
        low = symbol.lower()
        if lower == low:
            return dimension, size
        if lower.endswith(low) and (factor := _PREFIXES.get(lower[: -len(low)])):
            return dimension, _exact(factor * size)
    return None


def _exact(value: float) -> float:
    return float(f"{value:.15g}")


def position_unit(name: str | None) -> Unit | None:
    """Unit of positions by any of its names; None if unknown.

    Examples
    --------
    >>> position_unit("Micrometer"), position_unit("pixels"), position_unit("Å"), position_unit("deg")
    ('um', 'px', 'angstrom', None)
    """
    if name is None:
        return None
    if name.strip().casefold() in _PIXEL:
        return "px"
    size = factor_of(name, "m")
    if size is None:
        return None
    return next((unit for unit in get_args(Unit) if unit != "px" and np.isclose(metres_in(unit), size, atol=0)), None)


def metres_in(unit: Unit) -> float:
    """Metres in a unit of length.

    Raises
    ------
    PtychodaskError
        For "px", which is no length.
    """
    size = factor_of(unit, "m")
    if size is None:
        raise PtychodaskError(f"units is {unit!r}, expected a length; pass one of: {', '.join(get_args(Unit)[1:])}")
    return size
