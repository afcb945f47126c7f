"""Options of `ingest` as a YAML file: what `inspect` proposes, to be looked at, changed and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ptychodask.io.source import IngestSpec
from ptychodask.scan import PtychodaskError

LONGEST_BYTES = 2**20
"""Of a file of options, which has a few lines."""


def as_yaml(options: Mapping[str, Any]) -> str:
    """Fields of `IngestSpec` as YAML.

    Examples
    --------
    >>> print(as_yaml({"keys": {"diffraction": "dp"}, "centre": (3.0, 4.0)}), end="")
    keys:
      diffraction: dp
    centre:
    - 3.0
    - 4.0
    """
    return yaml.safe_dump(
        {name: list(value) if isinstance(value, tuple) else _plain(value) for name, value in options.items()},
        sort_keys=False,
        allow_unicode=True,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, bool | int | float | str | list) else str(value)


def read_options(path: str | Path) -> dict[str, Any]:
    """Fields of `IngestSpec` from a YAML file.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict
        Name -> value; lists that stand for a tuple are tuples.

    Raises
    ------
    PtychodaskError
        If there is no such file, it is no YAML of names and values, or a name is no field.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST_BYTES + 1)
        # Only plain values are made: no tag of YAML calls anything.
        found = yaml.safe_load(text) if len(text) <= LONGEST_BYTES else None
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be read ({error.strerror or error}); pass a YAML file of options"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PtychodaskError(
            f"{path}: is no YAML ({' '.join(str(error).split())[:200]}); write lines of NAME: VALUE"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise PtychodaskError(
            f"{path}: holds no names and values, expected lines of NAME: VALUE, as inspect writes them"
        )
    known = {field.name for field in fields(IngestSpec)}
    unknown = sorted(set(found) - known)
    if unknown:
        raise PtychodaskError(
            f"{path}: ingest has no option {unknown[0]!r}, expected some of: {', '.join(sorted(known))}"
        )
    return {
        name: tuple(value) if name in ("centre", "affine") and isinstance(value, list) else value
        for name, value in found.items()
    }


def with_recipe(recipe: str | Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, and those of a file where they leave something open."""
    return dict(options) if recipe is None else {**read_options(recipe), **options}
