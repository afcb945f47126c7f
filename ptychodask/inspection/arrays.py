"""Roles of the arrays of a foreign file.

The role follows from shape and type, and from the name if several arrays fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptychodask.errors import PtychodaskError
from ptychodask.io.geometry import wavelength_m_of
from ptychodask.io.parts import joined_keys
from ptychodask.io.quantities import SQUARENESS
from ptychodask.io.source import Container, frame_axes, raster_shape
from ptychodask.io.units import Dimension, factor_of

YX_WORDS = (("y", "x"), ("slow", "fast"), ("row", "col"), ("vertical", "horizontal"))
"""Pairs of words (y, x) that distinguish the names of the two position arrays."""

_POSITION = re.compile(r"pos|coord|scan|transl|point|stage|motor", re.IGNORECASE)
_PROBE = re.compile(r"probe|prb|illum", re.IGNORECASE)
_OBJECT = re.compile(r"obj", re.IGNORECASE)
_PATTERNS = re.compile(r"diff|dp|data|pattern|frame|recip|intens|image|det", re.IGNORECASE)
_AXIS = re.compile(r"(^|_)[yx](_|$|coord|pos)", re.IGNORECASE)

LEAST_PIXELS = 8
"""Fewest pixels across a pattern: smaller arrays are monitors or settings."""

MOST_UNMATCHED = 0.25
"""Largest share of patterns without a position at which arrays still are taken for positions."""

_SECOND_BEST = re.compile(r"start|nominal|true|offset|relative|err|std", re.IGNORECASE)

_OPTICS: tuple[tuple[str, re.Pattern[str], Dimension], ...] = (
    # option, its name in files, dimension
    ("energy_ev", re.compile(r"energy|^((accel|beam|high)\w*_)?voltage(_k?v)?$", re.IGNORECASE), "eV"),
    ("wavelength_m", re.compile(r"wavelength|lambda", re.IGNORECASE), "m"),
    ("distance_m", re.compile(r"distance|^z(_m)?$", re.IGNORECASE), "m"),
    (
        "detector_pixel_m",
        re.compile(r"(x|det\w*|ccd)_pixel(_?size)?(_[a-z]{1,2})?$|pixel_?size(_x|_m|_um|_mm)*$|psize", re.IGNORECASE),
        "m",
    ),
)

_GUESSED_UNITS = {
    "energy_ev": ((1e-18, 1e-12, "J"), (1.0, 200.0, "keV"), (200.0, 1e6, "eV")),
    "wavelength_m": ((1e-12, 1e-7, "m"), (1e-3, 50.0, "nm")),
    "distance_m": ((1e-3, 50.0, "m"), (50.0, 5e4, "mm")),
    "detector_pixel_m": ((1e-7, 1e-3, "m"), (1.0, 500.0, "um")),
}
"""Ranges (low, high) of a number without a unit, and the likely unit in each."""


@dataclass(frozen=True)
class ArrayNote:
    """One array of a file."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    """Type of its values, or the reason why it is ignored."""

    unit: str | None = None
    """Unit recorded in the file."""

    role: str | None = None
    """Assigned role: a name of `IngestSpec.keys`, or one of its fields."""

    @property
    def kind(self) -> str:
        """NumPy kind of the type, or "" if the array is ignored."""
        try:
            return np.dtype(self.dtype).kind
        except (TypeError, ValueError, SyntaxError):
            return ""

    @property
    def n_bytes(self) -> int:
        """Bytes of all values; 0 if the array is ignored."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize if self.kind else 0

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self.key.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Optic:
    """An instrument parameter read from a file."""

    option: str
    """Field of `IngestSpec`."""

    key: str
    value: float
    """In the unit of the option."""

    unit: str
    """Unit in the file."""

    is_guess: bool
    """True if that unit is guessed from the size of the number."""


def note_arrays(container: Container) -> list[ArrayNote]:
    """All arrays of a file; `dtype` is the reason for unreadable ones."""
    return [_note(container, key) for key in container.keys()]  # noqa: SIM118 a container is no dict


def note_joined(container: Container, notes: Sequence[ArrayNote]) -> list[ArrayNote]:
    """Arrays that a file stores in numbered parts, each as one array.

    Parts whose shapes or types do not fit each other are no array.
    """
    stackable = [note.key for note in notes if note.kind and len(note.shape) > 1]
    joined = [_note(container, key) for key in joined_keys(stackable)]
    return [note for note in joined if note.kind]


def _note(container: Container, key: str) -> ArrayNote:
    try:
        dtype = container.dtype(key)
        type_name = "pickled objects or text, never loaded" if dtype.hasobject else str(dtype)
        return ArrayNote(key, container.shape(key), type_name, container.unit(key))
    except PtychodaskError as error:
        return ArrayNote(key, (), f"unreadable: {error}")


def find_patterns(notes: Sequence[ArrayNote]) -> ArrayNote | None:
    """Array of the patterns: three axes, real; by name, then by size."""
    fitting = [
        note
        for note in notes
        if note.kind in set("buif") and _are_patterns(_axes(note)) and not note.name.startswith("label")
    ]
    return max(fitting, key=lambda note: (bool(_PATTERNS.search(note.name)), note.n_bytes), default=None)


def _are_patterns(axes: tuple[int, ...]) -> bool:
    return len(axes) == 3 and min(axes) > 1 and sorted(axes)[1] >= LEAST_PIXELS


def _axes(note: ArrayNote) -> tuple[int, ...]:
    """Shape with the two axes of a raster merged into one."""
    axes, raster = frame_axes(note.shape), raster_shape(note.shape)
    return axes if raster is None else (raster[0] * raster[1], *axes[2:])


def find_keys(notes: Sequence[ArrayNote], patterns: ArrayNote) -> dict[str, str]:
    """Mapping from names of `IngestSpec.keys` to arrays of a file.

    Examples
    --------
    >>> notes = [ArrayNote("dp", (9, 8, 8), "uint16"), ArrayNote("pos/y", (9,), "float64"),
    ...          ArrayNote("pos/x", (9,), "float64"), ArrayNote("P", (1, 8, 8), "complex64")]
    >>> find_keys(notes, notes[0])
    {'diffraction': 'dp', 'y': 'pos/y', 'x': 'pos/x', 'probe': 'P'}
    """
    axes = _axes(patterns)
    keys = {"diffraction": patterns.key}
    n_patterns, frame = axes[0], axes[1:]
    position_keys = _find_positions(notes, n_patterns, raster_shape(patterns.shape))
    if not position_keys and (position_keys := _find_positions(notes, axes[2])):
        n_patterns, frame = axes[2], axes[:2]
    if not position_keys:
        position_keys = _nearest_positions(notes, n_patterns)
    keys |= position_keys
    keys |= _named("probe", [n for n in notes if n.kind == "c" and _is_probe(n, frame)], _PROBE)
    masks = [n for n in notes if n.kind in set("biu") and _long(n.shape) == frame and "mask" in n.name.lower()]
    keys |= {"mask": masks[0].key} if len(masks) == 1 else {}
    keys |= _find_labels(notes, (n_patterns, *frame) if n_patterns == axes[0] else (*frame, n_patterns))
    indices = [n for n in notes if n.name == "scan_index" and n.shape == (n_patterns,) and n.kind in set("iu")]
    return keys | ({"scan_index": indices[0].key} if indices else {})


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _find_labels(notes: Sequence[ArrayNote], axes: tuple[int, ...]) -> dict[str, str]:
    """Keys of labels, by name and the shape of the patterns."""
    fitting = {n.name: n for n in notes if n.name in ("label", "label_amp", "label_phase") and _axes(n) == axes}
    if "label" in fitting and fitting["label"].kind == "c":
        return {"label": fitting["label"].key}
    polar = [name for name in ("label_amp", "label_phase") if name in fitting and fitting[name].kind in set("iuf")]
    return {name: fitting[name].key for name in polar} if len(polar) == 2 else {}


def find_step(container: Container, notes: Sequence[ArrayNote], patterns: ArrayNote) -> tuple[float, float] | None:
    """Step (y, x) in metres of the raster in an EMD file.

    Each axis of the patterns has an array dim0, dim1, ... beside them, with all its values or the first two, and its
    unit. None without them, or if the unit is no length.
    """
    raster = raster_shape(patterns.shape)
    known = {note.key for note in notes if note.kind in set("iuf")}
    folder = patterns.key.removesuffix(patterns.name)
    names = next((pair for pair in (("dim0", "dim1"), ("dim1", "dim2")) if {folder + n for n in pair} <= known), None)
    if raster is None or names is None:
        return None
    steps = []
    for name, n in zip(names, raster, strict=True):
        values, unit = container.array(folder + name).astype(np.float64).ravel(), container.unit(folder + name) or ""
        metres = factor_of(unit.strip().strip("[]").replace("_", ""), "m")
        apart = np.diff(values)
        if metres is None or len(values) not in (2, n) or not len(apart) or not np.allclose(apart, apart[0]):
            return None
        steps.append(float(f"{apart[0] * metres:.9g}"))
    return (steps[0], steps[1]) if all(steps) else None


def _is_probe(note: ArrayNote, frame: tuple[int, ...]) -> bool:
    axes = tuple(n for n in note.shape if n != 1)
    return axes[-2:] == frame or (len(axes) == 3 and axes[:2] == frame and frame[0] == frame[1])


def _nearest_positions(notes: Sequence[ArrayNote], n_patterns: int) -> dict[str, str]:
    """Keys of positions almost as many as the patterns."""
    lengths = {max(n.shape) for n in notes if n.shape and _POSITION.search(n.key + " pos" * _is_axis(n))}
    near = sorted(
        (n for n in lengths if abs(n - n_patterns) <= MOST_UNMATCHED * n_patterns), key=lambda n: abs(n - n_patterns)
    )
    return next((keys for n in near if (keys := _find_positions(notes, n))), {})


def _is_axis(note: ArrayNote) -> bool:
    return bool(_AXIS.search(note.name))


def _find_positions(
    notes: Sequence[ArrayNote], n_patterns: int, raster: tuple[int, int] | None = None
) -> dict[str, str]:
    """Keys of the likeliest arrays of `n_patterns` positions; empty if none fit."""
    numbers = [note for note in notes if note.kind in set("iuf")]
    columns = {n.key: n for n in numbers if _is_column(n.shape, n_patterns, raster)}
    choices: list[tuple[tuple[bool, bool, int], dict[str, str]]] = [
        (_likelihood(y), {"y": y, "x": x}) for y, x in _pairs(columns) if _differ(columns[y], columns[x])
    ]
    choices += [
        (_likelihood(note.key), {"position": note.key})
        for note in numbers
        if note.shape in ((n_patterns, 2), (1, n_patterns, 2), (2, n_patterns), (*(raster or (n_patterns,)), 2))
    ]
    if not choices and raster is not None:
        axes = {n.key: n for n in numbers if len(n.shape) == 1}
        choices = [
            (_likelihood(y), {"y": y, "x": x})
            for y, x in _pairs(axes)
            if _differ(axes[y], axes[x]) and (*axes[y].shape, *axes[x].shape) == raster
        ]
    return max(choices, key=lambda choice: choice[0])[1] if choices else {}


def _is_column(shape: tuple[int, ...], n_patterns: int, raster: tuple[int, int] | None) -> bool:
    """True for a vector or map of one number per pattern."""
    long = tuple(n for n in shape if n != 1)
    # Without a raster, an array with an axis of two may be pairs.
    is_map = len(long) == 2 and (long == raster or (raster is None and 2 not in long))
    return int(np.prod(shape, dtype=object)) == n_patterns and (len(long) == 1 or is_map)


def _differ(one: ArrayNote, other: ArrayNote) -> bool:
    return one.key != other.key and one.kind == other.kind


def _likelihood(key: str) -> tuple[bool, bool, int]:
    return not _SECOND_BEST.search(key), bool(_POSITION.search(key)), -len(key)


def _pairs(keys: Sequence[str] | dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of keys that differ by one of `YX_WORDS`, (y, x)."""
    for key in keys:
        for y_word, x_word in YX_WORDS:
            for match in re.finditer(y_word, key, re.IGNORECASE):
                word = x_word.upper() if match.group().isupper() else x_word
                other = key[: match.start()] + word + key[match.end() :]
                if other in keys:
                    yield key, other


def _named(role: str, fitting: list[ArrayNote], name: re.Pattern[str]) -> dict[str, str]:
    """Key of the only fitting array, or the first matching by name."""
    named = [note for note in fitting if name.search(note.key)]
    chosen = named or (fitting if len(fitting) == 1 and not _OBJECT.search(fitting[0].key) else [])
    return {role: chosen[0].key} if chosen else {}


_PARTICLE = re.compile(r"particle|radiation|(probe|beam|source)_?type|^probe$", re.IGNORECASE)
_OF_ELECTRONS = re.compile(r"^((accel|beam|high)\w*_)?voltage(_k?v)?$|electron_energy", re.IGNORECASE)
_OBJECT_PIXEL = re.compile(r"^(?:obj\w*_)?pixel(?:_?size)?_([a-z]+)(?:_(\d+))?$", re.IGNORECASE)


def find_particle(container: Container, notes: Sequence[ArrayNote]) -> str | None:
    """Name of what says that a file is of electrons; None if nothing does."""
    for note in notes:
        if _OF_ELECTRONS.search(note.name) and note.kind in set("iuf"):
            return note.key
        if _PARTICLE.search(note.name) and "electron" in (container.text(note.key) or "").lower():
            return note.key
    return next((name for name in container.numbers("") if _OF_ELECTRONS.search(name)), None)


def find_aspect(container: Container, notes: Sequence[ArrayNote]) -> float | None:
    """Height of a detector pixel over its width; None if square or unknown."""
    sizes = {}
    for note in notes:
        match = re.search(r"^([yx])_pixel_?size|pixel_?size_([yx])$", note.name, re.IGNORECASE)
        if match and note.kind in set("iuf") and int(np.prod(note.shape, dtype=object)) == 1:
            factor = factor_of(note.unit or "m", "m") or 1.0
            sizes[(match.group(1) or match.group(2)).lower()] = factor * float(container.array(note.key).reshape(-1)[0])
    if set(sizes) != {"y", "x"} or not min(sizes.values()) > 0:
        return None
    aspect = sizes["y"] / sizes["x"]
    return None if abs(aspect - 1) <= SQUARENESS else aspect


def find_object_pixel(container: Container, n_pixels: int) -> tuple[str, float] | None:
    """Attribute of the file with the size of an object pixel, and that in metres.

    Of several, the one whose name ends with the number of pixels of a frame.
    """
    fitting: dict[str, float] = {}
    for name, value in container.numbers("").items():
        match = _OBJECT_PIXEL.search(name)
        factor = None if match is None else factor_of(match.group(1), "m")
        if match is not None and factor is not None and value > 0 and match.group(2) in (None, str(n_pixels)):
            fitting[name] = float(f"{value * factor:.15g}")
    return max(fitting.items(), key=lambda item: item[0].endswith(f"_{n_pixels}"), default=None)


def find_optics(container: Container, notes: Sequence[ArrayNote]) -> list[Optic]:
    """Energy, wavelength, distance and detector pixel size, in units of `IngestSpec`."""
    optics: dict[str, Optic] = {}
    for note in notes:
        if note.kind not in set("iuf") or int(np.prod(note.shape, dtype=object)) not in (1, 2):
            continue
        for option, name, dimension in _OPTICS:
            if option not in optics and name.search(note.name):
                values = container.array(note.key).reshape(-1)
                if (values != values[0]).any():
                    continue  # pixels that are not square have no single size
                value = float(values[0])
                unit, is_guess = _unit_of(option, note, value, dimension)
                factor = None if unit is None else factor_of(unit, dimension)
                if unit is not None and factor is not None and np.isfinite(value) and value > 0:
                    optics[option] = Optic(option, note.key, float(f"{value * factor:.15g}"), unit, is_guess)
    if "energy_ev" in optics and "wavelength_m" in optics:
        del optics["wavelength_m"]
    return list(optics.values())


def _unit_of(option: str, note: ArrayNote, value: float, dimension: Dimension) -> tuple[str | None, bool]:
    """Unit of a number, and True if it is guessed.

    The unit is the one recorded in the file, the ending of the name, or a guess from the size of the number.
    """
    ending = note.name.rsplit("_", 1)[-1]
    for noted in (note.unit, ending):
        if noted is not None and factor_of(noted, dimension) is not None:
            return noted.strip(), False
    if note.unit is not None:
        return None, False  # a unit of something else
    for low, high, unit in _GUESSED_UNITS[option]:
        if low <= value < high:
            return unit, True
    return None, True


def wavelength_of(options: dict[str, Any]) -> float | None:
    """Wavelength in metres from the options; None without wavelength or energy."""
    energy_ev = options.get("energy_ev")
    return wavelength_m_of(energy_ev, options.get("particle")) if energy_ev else options.get("wavelength_m")
