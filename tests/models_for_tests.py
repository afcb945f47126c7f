"""Models in plain NumPy that the engine takes for networks, which worker processes import too; other backends."""

from __future__ import annotations

import importlib.util
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError


def when_installed(backend):
    """A backend of Keras as a parameter of tests, which are skipped where it is not installed."""
    missing = importlib.util.find_spec(backend) is None
    return pytest.param(backend, marks=pytest.mark.skipif(missing, reason=f"{backend} is not installed"))


@dataclass(eq=False)
class LinearModel:
    """Patches that depend on each pattern, on its group and on its offset, and on nothing else."""

    content_hash: str = "linear"
    members: int = 4
    n_pixels: int = 16
    output: Literal["member", "group"] = "member"
    kind: str = "linear"
    path: str | None = None
    calls: list[tuple[int, ...]] = field(default_factory=list)
    """Shape of X in each call; shared with the tasks that run in this process."""

    precisions: ClassVar = ("float32",)
    runs_on_keras: ClassVar = False
    trained_on: ClassVar = {}

    def bind(self, scan):
        if scan.n_pixels != self.n_pixels:
            raise PtychodaskError(f"model takes N={self.n_pixels}, the scan has N={scan.n_pixels}")
        return self

    def compile(self, batch_size, precision="float32"):
        def call(x, offset_yx_px):
            assert x.shape == (batch_size, self.n_pixels, self.n_pixels, self.members)
            assert offset_yx_px.shape == (batch_size, self.members, 2)
            assert (x.dtype, offset_yx_px.dtype) == (np.float32, np.float32)
            self.calls.append(x.shape)
            return self.patches(x, offset_yx_px)

        return call

    def patches(self, x, offset_yx_px):
        """complex64 (batch, C, N, N), or (batch, N, N)."""
        own = np.moveaxis(x, -1, 1)
        shift = (offset_yx_px @ np.array([0.1, 0.05j], np.complex64))[..., None, None]
        patches = (own + 1j * own[:, :1] + shift).astype(np.complex64)
        return patches if self.output == "member" else patches[:, 0] + patches[:, -1]


@dataclass(eq=False)
class NotFiniteModel(LinearModel):
    """A network that diverged."""

    content_hash: str = "not finite"

    def patches(self, x, offset_yx_px):
        return super().patches(x, offset_yx_px) * np.float32(np.nan)


@dataclass(eq=False)
class FailingModel(LinearModel):
    """A network whose runtime fails."""

    content_hash: str = "failing"

    def patches(self, x, offset_yx_px):
        raise RuntimeError("the device went away\nand this is its long story")


@dataclass(eq=False)
class DyingModel(LinearModel):
    """A network that takes its whole process down the first time it is called anywhere."""

    flag: str = ""
    """File that says it happened."""

    def patches(self, x, offset_yx_px):
        try:
            Path(self.flag).touch(exist_ok=False)
        except FileExistsError:
            return super().patches(x, offset_yx_px)
        os._exit(1)


@dataclass(eq=False)
class SlowModel(LinearModel):
    """A network that takes its time, and notes each call in a file that all processes see."""

    content_hash: str = "slow"
    seconds: float = 0.05
    """Of each call."""

    noted_in: str | None = None
    """File with a line for each call."""

    def patches(self, x, offset_yx_px):
        time.sleep(self.seconds)
        if self.noted_in is not None:
            # One write of a few bytes at the end of a file is whole, whoever else writes there.
            with Path(self.noted_in).open("a") as file:
                file.write(f"{os.getpid()}\n")
        return super().patches(x, offset_yx_px)


@dataclass(eq=False)
class DeadlyModel(LinearModel):
    """A network that takes its process down whenever it meets one pattern."""

    content_hash: str = "deadly"
    marker: float = 0.0
    """Sum of the network's input over that pattern."""

    def patches(self, x, offset_yx_px):
        if np.isclose(x.sum(axis=(1, 2)), self.marker, rtol=1e-6).any():
            os._exit(1)
        return super().patches(x, offset_yx_px)


@dataclass(eq=False)
class MoodyModel(LinearModel):
    """A network whose answer depends on the process that it runs in."""

    content_hash: str = "moody"
    by: float = 1e-2
    """Relative difference between two processes."""

    def patches(self, x, offset_yx_px):
        return super().patches(x, offset_yx_px) * np.float32(1 + self.by * (os.getpid() % 97) / 97)


@dataclass(eq=False)
class PatchyModel(LinearModel):
    """A network that diverges for groups whose seed is one pattern."""

    content_hash: str = "patchy"
    marker: float = 0.0
    """Sum of the network's input over that pattern."""

    def patches(self, x, offset_yx_px):
        bad = np.isclose(x[..., 0].sum(axis=(1, 2)), self.marker, rtol=1e-6)
        patches = super().patches(x, offset_yx_px)
        patches[bad] = np.nan
        return patches


@dataclass(eq=False)
class CrampedModel(LinearModel):
    """A network whose device holds a few groups at a time."""

    content_hash: str = "cramped"
    holds: int = 3

    def patches(self, x, offset_yx_px):
        if len(x) > self.holds:
            raise MemoryError("RESOURCE_EXHAUSTED: OOM when allocating tensor")
        return super().patches(x, offset_yx_px)
