"""Models packaged with ptychodask, read by name: ``pretrained:<name>``."""

from __future__ import annotations

from pathlib import Path

from ptychodask.errors import PtychodaskError

PREFIX = "pretrained:"

FOLDER = Path(__file__).with_name("packaged")
"""Folder of the bundles, each with a card of its training data and validation."""

CARD = "CARD.md"


def pretrained_names() -> list[str]:
    """Names of the packaged models, in the order of preference of `reconstruct`."""
    names = [path.name for path in FOLDER.iterdir() if (path / "model.json").is_file()] if FOLDER.is_dir() else []
    return sorted(names, key=_rank)


def _rank(name: str) -> tuple[bool, int]:
    """Sort key: PINNs before baselines, then by decreasing group size."""
    kind, _, members = name.split("-")
    return kind != "pinn", -int(members.removeprefix("c"))


def is_pretrained(path: object) -> bool:
    """True if a path is the name of a packaged model."""
    return isinstance(path, str | Path) and str(path).startswith(PREFIX)


def bundle_folder(path: str | Path) -> Path:
    """Folder of a model's bundle, which may be a packaged one."""
    return packaged_folder(path) if is_pretrained(path) else Path(path)


def packaged_folder(path: str | Path) -> Path:
    """Folder of the bundle of ``pretrained:<name>`` on this machine.

    Raises
    ------
    PtychodaskError
        If there is no such model.
    """
    name = str(path).removeprefix(PREFIX)
    if name not in pretrained_names():
        raise PtychodaskError(f"{path}: no such packaged model; available: {', '.join(pretrained_names()) or 'none'}")
    return FOLDER / name


def pretrained_for(n_pixels: int) -> str | None:
    """Default packaged model for patterns of N pixels, or None.

    Examples
    --------
    >>> pretrained_for(64), pretrained_for(52)
    ('pretrained:pinn-n64-c4', None)
    """
    fitting = [name for name in pretrained_names() if f"n{n_pixels}" in name.split("-")]
    return f"{PREFIX}{fitting[0]}" if fitting else None
