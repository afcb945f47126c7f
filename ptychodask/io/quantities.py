"""Numbers with a unit in HDF5 files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptychodask.errors import PtychodaskError
from ptychodask.io.source import Container, IngestSpec
from ptychodask.io.units import Dimension, Unit, factor_of, metres_in

SQUARENESS = 1e-3
"""Largest relative difference between the sides of a square pixel."""


@dataclass(frozen=True)
class Optic:
    """A quantity of the instrument that a file may contain."""

    name: str
    """Name, for messages."""

    option: str
    """Field of `IngestSpec` that replaces it."""

    dimension: Dimension
    """Kind of its unit."""

    low: float
    """Smallest plausible value, in the unit of the option; outside, the recorded unit is wrong."""

    high: float
    """Largest plausible value."""

    @property
    def expected(self) -> str:
        """Plausible values, for messages."""
        return f"{self.name} of {self.low:g} to {self.high:g} {self.option.rpartition('_')[2].replace('ev', 'eV')}"

    @property
    def remedy(self) -> str:
        """Remedy in an error about the value in a file."""
        return f"pass {self.option}= (--{self.option.replace('_', '-')})"


ENERGY = Optic("photon energy", "energy_ev", "eV", 1.0, 1e7)
WAVELENGTH = Optic("wavelength", "wavelength_m", "m", 1e-13, 2e-6)
DISTANCE = Optic("detector distance", "distance_m", "m", 1e-4, 1e3)
DETECTOR_PIXEL = Optic("detector pixel", "detector_pixel_m", "m", 1e-7, 1e-2)


def optic(container: Container, keys: Sequence[str], quantity: Optic, *, defined: str | None) -> float | None:
    """Value of an instrument quantity, in the unit of the option.

    Parameters
    ----------
    container : Container
        The file.
    keys : sequence of str
        Keys of the quantity; the first that the file has is read.
    quantity : Optic
        The quantity.
    defined : str, optional
        Unit that the format defines, used if the file records none; None if the format defines none.

    Returns
    -------
    float or None
        None if the file has none of the keys.

    Raises
    ------
    PtychodaskError
        If it is not a positive number, its unit is unknown, or the value is not plausible.
    """
    key = next((key for key in keys if container.has(key)), None)
    if key is None:
        return None
    label = f"{container.label}[{key}]"
    unit, factor = _unit(container, key, quantity.dimension, defined, quantity.remedy)
    values = np.unique(container.array(key)) if container.dtype(key).kind in "iuf" else np.zeros(0)
    if len(values) != 1 or not (np.isfinite(values[0]) and values[0] > 0):
        content = f"is {values[0]}" if len(values) == 1 else f"contains {len(values)} different numbers"
        raise PtychodaskError(
            f"{label}: {content}, expected one positive number, the {quantity.name}; {quantity.remedy}"
        )
    value = float(values[0]) * factor
    if not quantity.low <= value <= quantity.high:
        raise PtychodaskError(
            f"{label}: is {values[0]:.6g} {unit}, expected a {quantity.expected}, so its unit is wrong; "
            f"{quantity.remedy}"
        )
    return value


def read_optics(
    container: Container, spec: IngestSpec, optics: Sequence[tuple[Optic, Sequence[str], str | None]]
) -> dict[str, float]:
    """Quantities of the instrument that the user does not pass.

    No wavelength is read if the energy is known.
    """
    values: dict[str, float] = {}
    for quantity, keys, defined in optics:
        if getattr(spec, quantity.option) is not None or (
            quantity is WAVELENGTH and ("energy_ev" in values or spec.energy_ev)
        ):
            continue
        value = optic(container, keys, quantity, defined=defined)
        if value is not None:
            values[quantity.option] = value
    return values


def pixel_aspect(container: Container, detector: str, *, defined: str | None) -> float:
    """Height of a detector pixel over its width; 1 if the file has not both."""
    keys = [f"{detector}/{axis}_pixel_size" for axis in ("y", "x")]
    if not all(container.has(key) for key in keys):
        return 1.0
    height, width = (optic(container, [key], DETECTOR_PIXEL, defined=defined) for key in keys)
    return height / width if height and width else 1.0


def metres_of(container: Container, key: str, given: Unit | None, *, defined: str | None) -> float:
    """Unit of an array of lengths, in metres.

    The unit that the user passes, else the one in the file, else the one that the format defines.

    Raises
    ------
    PtychodaskError
        If there is none, or it is not a unit of length.
    """
    if given == "px":
        raise PtychodaskError(
            f"{container.label}[{key}]: is a length, but units='px'; pass units='um' or units='m', or leave units= out"
        )
    if given is not None:
        return metres_in(given)
    return _unit(container, key, "m", defined, "pass units= (--units)")[1]


EXAMPLES = {"m": "m, cm, mm, um, nm, pm, angstrom", "eV": "eV, keV, MeV, J"}
"""Names of units in messages, by dimension."""


def _unit(container: Container, key: str, dimension: Dimension, defined: str | None, remedy: str) -> tuple[str, float]:
    """Name of the unit of an array, and its factor to metres or electronvolts."""
    recorded = container.unit(key)
    unit = (defined or "" if recorded is None else recorded).strip()
    factor = factor_of(unit, dimension)
    if factor is None:
        content = "has no unit" if recorded is None else f"has the unit {recorded!r}"
        raise PtychodaskError(f"{container.label}[{key}]: {content}, expected one of: {EXAMPLES[dimension]}; {remedy}")
    return unit, factor
