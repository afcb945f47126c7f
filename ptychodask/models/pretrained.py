"""Models that come with the package, read by name: ``pretrained:<name>``."""

from __future__ import annotations

from pathlib import Path

from ptychodask.scan import PtychodaskError

PREFIX = "pretrained:"

FOLDER = Path(__file__).with_name("packaged")
"""Bundles by name, each with a card that says what it was trained on and how it was judged."""

CARD = "CARD.md"


def pretrained_names() -> list[str]:
    """Names of the models that come with the package, in the order in which `reconstruct` takes them."""
    found = [path.name for path in FOLDER.iterdir() if (path / "model.json").is_file()] if FOLDER.is_dir() else []
    return sorted(found, key=_rank)


def _rank(name: str) -> tuple[bool, int]:
    """A PINN in front of a baseline, and of several the one that reads most patterns together."""
    kind, _, members = name.split("-")
    return kind != "pinn", -int(members.removeprefix("c"))


def is_pretrained(path: object) -> bool:
    """Whether a path is the name of a packaged model."""
    return isinstance(path, str | Path) and str(path).startswith(PREFIX)


def bundle_folder(path: str | Path) -> Path:
    """The folder that the path of a model names: it, or where a packaged model lies."""
    return packaged_folder(path) if is_pretrained(path) else Path(path)


def packaged_folder(path: str | Path) -> Path:
    """Where the bundle of a ``pretrained:<name>`` lies on this machine.

    Raises
    ------
    PtychodaskError
        If there is no such model.
    """
    name = str(path).removeprefix(PREFIX)
    if name not in pretrained_names():
        raise PtychodaskError(f"{path}: no such packaged model; there are: {', '.join(pretrained_names()) or 'none'}")
    return FOLDER / name


def pretrained_for(n_pixels: int) -> str | None:
    """``pretrained:<name>`` of the packaged model that `reconstruct` takes for patterns of N pixels, or None.

    Examples
    --------
    >>> pretrained_for(64), pretrained_for(52)
    ('pretrained:pinn-n64-c4', None)
    """
    fitting = [name for name in pretrained_names() if f"n{n_pixels}" in name.split("-")]
    return f"{PREFIX}{fitting[0]}" if fitting else None
