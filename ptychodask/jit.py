"""Loops compiled to machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., object])


def compiled(kernel: Kernel) -> Kernel:
    """Kernel compiled on its first call, cached where possible.

    It runs without Python's lock, and rounds as written: the compiler may not reorder its sums.
    """
    # No fastmath: the compiler could reorder sums, and the object would depend on the machine.
    try:
        return cast(Kernel, numba.njit(nogil=True, cache=True)(kernel))
    except RuntimeError:
        # Neither the installation nor the user's cache folder can be written: each process compiles anew.
        return cast(Kernel, numba.njit(nogil=True)(kernel))
