"""Plain values of JSON: conversion, text for attributes, and differences in words."""

from __future__ import annotations

import json
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
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
    # Before text, since a `JsonRecord` is both.
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    return str(value)


class JsonRecord(str):
    """JSON text of an object, which is a read-only mapping as well.

    Attributes of an xarray object must be text to be written by its `to_netcdf`; programs read their values by key.

    Parameters
    ----------
    text : str
        JSON of an object.

    Examples
    --------
    >>> record = JsonRecord('{"tile": 256}')
    >>> record["tile"], dict(record), str(record)
    (256, {'tile': 256}, '{"tile": 256}')
    """

    def _values(self) -> dict[str, Any]:
        values = json.loads(str(self))
        assert isinstance(values, dict)
        return values

    def __str__(self) -> str:
        return str.__str__(self)

    def __getitem__(self, key: Any) -> Any:
        return self._values()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __contains__(self, key: object) -> bool:
        return key in self._values()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Mapping):
            return self._values() == dict(other)
        return str.__eq__(self, other) if isinstance(other, str) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return self._values() | dict(other)

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(other) | self._values()

    def get(self, key: str, default: Any = None) -> Any:
        return self._values().get(key, default)

    def keys(self) -> KeysView[str]:
        return self._values().keys()

    def values(self) -> ValuesView[Any]:
        return self._values().values()

    def items(self) -> ItemsView[str, Any]:
        return self._values().items()


Mapping.register(JsonRecord)


def as_record(text: str) -> Any:
    """Text as `JsonRecord` if it is JSON of an object, else the text itself."""
    try:
        is_object = isinstance(json.loads(str(text)), dict)
    except ValueError:
        is_object = False
    return JsonRecord(text) if is_object else text


def with_records(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with mappings as `JsonRecord`, so that NetCDF can have them.

    Other values that NetCDF has no type for are JSON text: None, truth values, nested lists.

    Examples
    --------
    >>> with_records({"plan": {"tile": 256}, "box": [0, 8], "resumed": False})
    {'plan': '{"tile": 256}', 'box': [0, 8], 'resumed': 'false'}
    """
    return {name: _for_netcdf(value) for name, value in attributes.items()}


def _for_netcdf(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value if isinstance(value, JsonRecord) else JsonRecord(json.dumps(plain(value)))
    items = value if isinstance(value, list | tuple) else [value]
    kinds = {str if isinstance(item, str) else float for item in items if _has_type(item)}
    has_types = all(map(_has_type, items)) and len(kinds) == 1
    return value if has_types or isinstance(value, np.ndarray) else json.dumps(plain(value))


def _has_type(item: Any) -> bool:
    return isinstance(item, str | int | float | np.number) and not isinstance(item, bool)


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
