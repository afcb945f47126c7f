"""Plain values of JSON: conversion, text for attributes, and differences in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Value as JSON types.

    Mappings and dataclasses become objects, sequences and arrays lists, and other values their text.

    Examples
    --------
    >>> plain({"tile": np.int64(256), "roi": (0, 8), "rows": slice(3)})
    {'tile': 256, 'roi': [0, 8], 'rows': 'slice(None, 3, None)'}
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    return str(value)


def as_text(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of an xarray object in types that its `to_netcdf` supports.

    Numbers, text, arrays and lists of either stay as they are, others become JSON text.

    Examples
    --------
    >>> as_text({"plan": {"tile": 256}, "box": [0, 8], "resumed": False})
    {'plan': '{"tile": 256}', 'box': [0, 8], 'resumed': 'false'}
    """
    return {
        str(name): value if _is_supported(value) else json.dumps(plain(value)) for name, value in attributes.items()
    }


def _is_supported(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iufU"
    items = value if isinstance(value, list | tuple) else [value]
    kinds = {str if isinstance(item, str) else float for item in items}
    is_plain = all(isinstance(item, str | int | float | np.number) and not isinstance(item, bool) for item in items)
    return is_plain and len(kinds) == 1


def from_text(value: Any) -> Any:
    """Value of an attribute; JSON text of `as_text` is parsed.

    Examples
    --------
    >>> from_text('{"tile": 256}'), from_text("m"), from_text(3)
    ({'tile': 256}, 'm', 3)
    """
    if not isinstance(value, str) or not (value[:1] in ("{", "[") or value in ("null", "true", "false")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def differences(recorded: Any, expected: Any, name: str = "") -> list[str]:
    """Differences between nested plain values, in words.

    Examples
    --------
    >>> differences({"spec": {"tile": 256, "crop": None}}, {"spec": {"tile": 512, "crop": None}})
    ['spec.tile was 256, is 512']
    """
    if isinstance(recorded, dict) and isinstance(expected, dict):
        names = sorted(recorded.keys() | expected.keys())
        return [
            difference
            for key in names
            for difference in differences(recorded.get(key), expected.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if recorded == expected else [f"{name} was {_brief(recorded)}, is {_brief(expected)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
