"""Options of `ingest` as a YAML file.

`inspect` proposes such a file, for the user to check, change and keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ptychodask.errors import PtychodaskError
from ptychodask.io.source import IngestSpec
from ptychodask.storage.records import plain

LONGEST_BYTES = 2**20
"""Largest accepted size of a file of options, which has a few lines."""


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
    return yaml.safe_dump(plain(options), sort_keys=False, allow_unicode=True)


def read_options(path: str | Path) -> dict[str, Any]:
    """Fields of `IngestSpec` from a YAML file.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    dict
        Name -> value; lists are converted to tuples for fields that are tuples.

    Raises
    ------
    PtychodaskError
        If the file cannot be read, is not YAML of names and values, or has a name that is not a field.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST_BYTES + 1)
        # safe_load creates plain values only: no YAML tag runs code.
        options = yaml.safe_load(text) if len(text) <= LONGEST_BYTES else None
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be read ({error.strerror or error}); pass a YAML file of options"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PtychodaskError(
            f"{path}: is not valid YAML ({' '.join(str(error).split())[:200]}); write lines of NAME: VALUE"
        ) from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise PtychodaskError(f"{path}: contains no options, expected lines of NAME: VALUE, as inspect writes them")
    known = {field.name for field in fields(IngestSpec)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise PtychodaskError(
            f"{path}: ingest has no option {unknown[0]!r}; the options are: {', '.join(sorted(known))}"
        )
    return {
        name: tuple(value) if name in ("centre", "affine", "step", "raster") and isinstance(value, list) else value
        for name, value in options.items()
    }


def with_recipe(recipe: str | Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options merged with those of a recipe; `options` take precedence."""
    return dict(options) if recipe is None else {**read_options(recipe), **options}
