"""Plain values of JSON: conversion, and differences in words."""

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
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    return str(value)


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
