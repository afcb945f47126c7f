"""Numbers with a unit, as HDF5 files note them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ptychodask.io.source import Container, IngestSpec, Unit
from ptychodask.scan import PtychodaskError

METRES: Mapping[str, float] = {
    "m": 1.0,
    "metre": 1.0,
    "metres": 1.0,
    "meter": 1.0,
    "meters": 1.0,
    "cm": 1e-2,
    "mm": 1e-3,
    "um": 1e-6,
    "µm": 1e-6,
    "μm": 1e-6,
    "micron": 1e-6,
    "microns": 1e-6,
    "nm": 1e-9,
    "pm": 1e-12,
    "a": 1e-10,
    "å": 1e-10,
    "angstrom": 1e-10,
    "angstroms": 1e-10,
}
"""Units of length, in small letters -> metres."""

EV_PER_JOULE = 1 / 1.602176634e-19
"""Electronvolts in a joule (SI, exact)."""

ELECTRONVOLTS: Mapping[str, float] = {
    "ev": 1.0,
    "kev": 1e3,
    "j": EV_PER_JOULE,
    "joule": EV_PER_JOULE,
    "joules": EV_PER_JOULE,
}
"""Units of energy, in small letters -> electronvolts."""


SQUARENESS = 1e-3
"""By how much the sides of a pixel may differ, relative to one of them."""


@dataclass(frozen=True)
class Optic:
    """A number of the instrument that a file may hold."""

    name: str
    option: str
    """Field of `IngestSpec` that can take its place."""

    units: Mapping[str, float]
    """Units that it may have, and what they are in that of the option."""

    low: float
    high: float
    """What it can be; beyond, the file has another unit than it or its format says."""

    @property
    def way_out(self) -> str:
        """What to do where a file does not say it well."""
        return f"pass {self.option}= (--{self.option.replace('_', '-')})"


ENERGY = Optic("photon energy", "energy_ev", ELECTRONVOLTS, 1.0, 1e7)
WAVELENGTH = Optic("wavelength", "wavelength_m", METRES, 1e-13, 2e-6)
DISTANCE = Optic("distance of a detector", "distance_m", METRES, 1e-4, 1e3)
DETECTOR_PIXEL = Optic("detector pixel", "detector_pixel_m", METRES, 1e-7, 1e-2)


def optic(container: Container, keys: Sequence[str], what: Optic, *, defined: str | None) -> float | None:
    """The first of `keys` that a file has, in the unit of the option; None where it has none of them.

    Parameters
    ----------
    container : Container
    keys : sequence of str
    what : Optic
    defined : str, optional
        The unit that the format defines, where the file notes none; None where the format leaves it open.

    Raises
    ------
    PtychodaskError
        If it is no positive number, its unit is not known, or it cannot be what it is said to be.
    """
    key = next((key for key in keys if container.has(key)), None)
    if key is None:
        return None
    label = f"{container.label}[{key}]"
    unit = _unit(container, key, what.units, defined, what.way_out)
    values = np.unique(container.array(key)) if container.dtype(key).kind in "iuf" else np.zeros(0)
    if len(values) != 1 or not (np.isfinite(values[0]) and values[0] > 0):
        found = f"is {values[0]}" if len(values) == 1 else f"holds {len(values)} different numbers"
        raise PtychodaskError(f"{label}: {found}, expected one positive number, the {what.name}; {what.way_out}")
    value = float(values[0]) * what.units[unit]
    if not what.low <= value <= what.high:
        raise PtychodaskError(
            f"{label}: {values[0]:.6g} {unit} is no {what.name}, so the number has another unit; {what.way_out}"
        )
    return value


def read_optics(
    container: Container, spec: IngestSpec, optics: Sequence[tuple[Optic, Sequence[str], str | None]]
) -> dict[str, float]:
    """Numbers of the instrument that the user does not say; an energy makes a wavelength needless."""
    found: dict[str, float] = {}
    for what, keys, defined in optics:
        if getattr(spec, what.option) is not None or (what is WAVELENGTH and ("energy_ev" in found or spec.energy_ev)):
            continue
        value = optic(container, keys, what, defined=defined)
        if value is not None:
            found[what.option] = value
    return found


def metres_of(container: Container, key: str, said: Unit | None, *, defined: str | None) -> float:
    """Metres in the unit of an array of lengths: what the user says, else the file, else its format.

    Raises
    ------
    PtychodaskError
        If none of them does, or the unit is none of length.
    """
    if said == "px":
        raise PtychodaskError(
            f"{container.label}[{key}]: is a length by its format; pass units='um' or 'm', or leave it out"
        )
    if said is not None:
        return METRES[said]
    return METRES[_unit(container, key, METRES, defined, "pass units= (--units)")]


def _unit(container: Container, key: str, units: Mapping[str, float], defined: str | None, way_out: str) -> str:
    noted = container.unit(key)
    unit = (defined or "" if noted is None else noted).strip().lower()
    if unit not in units:
        found = "the file notes no unit" if noted is None else f"the file notes the unit {noted!r}"
        raise PtychodaskError(f"{container.label}[{key}]: {found}, expected one of: {', '.join(units)}; {way_out}")
    return unit
