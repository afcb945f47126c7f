"""User-supplied networks: any callable as a model for reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.models.contract import InputDomain, Output, Predict, check_n_pixels, predict_in_batches
from ptychodask.models.spec import Precision
from ptychodask.scan import Scan


@dataclass(frozen=True, kw_only=True, eq=False)
class CallableModel:
    """A network of any library as two functions: one loads, one predicts.

    Examples
    --------
    >>> def load():
    ...     return lambda x, offset_yx_px: np.moveaxis(x, -1, 1) * np.complex64(1j)
    >>> model = CallableModel(load=load, n_pixels=8, members=1, content_hash="times i, version 1")
    >>> model.predict(np.ones((3, 8, 8, 1), np.float32), np.zeros((3, 1, 2), np.float32)).shape
    (3, 1, 8, 8)
    """

    load: Callable[[], Callable[[NDArray[np.float32], NDArray[np.float32]], Any]]
    """Loads the network and returns its prediction function; called once per process, so the network is never sent.

    The returned function takes float32 arrays of one fixed batch size, patterns (batch, N, N, C) in the unit of
    `input_domain` and offsets (batch, C, 2), (y, x), pixels; it returns complex patches (batch, C, N, N) for "member",
    (batch, N, N) for "group".
    """

    n_pixels: int
    """Pixels across a pattern and a patch, N."""

    members: int
    """Patterns in one group, C."""

    content_hash: str
    """Identifies the weights, for instance the SHA-256 of their file: models with equal hashes count as the same."""

    output: Output = "member"
    """One patch per member at its position, or one per group at its centre."""

    input_domain: InputDomain = "normalised"
    """Unit of the patterns passed to the network."""

    kind: str = "own"
    """Short name, recorded with results."""

    normalization: float | None = None
    """Factor from amplitude to X of the scan it is bound to."""

    precisions: ClassVar[tuple[Precision, ...]] = ("float32",)
    """Precisions it can compute in."""

    runs_on_keras: ClassVar[bool] = False
    """False: `load` chooses the device."""

    trained_on: ClassVar[Mapping[str, Any]] = {}
    """Empty: the training is unknown."""

    def __post_init__(self) -> None:
        check_choice("output", self.output, get_args(Output), "model")
        check_choice("input_domain", self.input_domain, get_args(InputDomain), "model")
        for name, value in (("n_pixels", self.n_pixels), ("members", self.members)):
            if value < 1:
                raise PtychodaskError(f"model: {name} is {value}, expected 1 or more")
        if not self.content_hash:
            raise PtychodaskError("model: content_hash is empty, expected a string that changes with the weights")

    @property
    def path(self) -> None:
        """None: there is no bundle, so workers receive the model itself."""
        return None

    def bind(self, scan: Scan) -> CallableModel:
        """The model with a scan's normalisation.

        Raises
        ------
        PtychodaskError
            If the scan's patterns differ in size from the network's.
        """
        check_n_pixels(self, scan)
        return replace(self, normalization=scan.normalization)

    def compile(self, batch_size: int, precision: Precision = "float32") -> Predict:
        """Prediction function of a fixed batch size.

        From normalised X and offsets, as in `Model.compile`, to complex64 patches.

        Raises
        ------
        PtychodaskError
            If the input unit depends on the scan and none is bound; when called, if the network returns patches of
            another shape than `output` implies, or that are not complex.
        """
        rescale = self._rescale()
        network = self.load()
        n_pixels = self.n_pixels
        shape = (batch_size, *((self.members,) if self.output == "member" else ()), n_pixels, n_pixels)

        def call(x: NDArray[np.float32], offset_yx_px: NDArray[np.float32]) -> NDArray[np.complex64]:
            patches = np.asarray(network(rescale(x), offset_yx_px))
            if patches.shape != shape or patches.dtype.kind != "c":
                raise PtychodaskError(
                    f"model: its network returned {patches.dtype} {patches.shape}, expected complex {shape} for "
                    f"output={self.output!r}; correct the function that load returns"
                )
            return patches.astype(np.complex64, copy=False)

        return call

    def _rescale(self) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        if self.input_domain == "normalised":
            return lambda x: x
        if self.normalization is None:
            raise PtychodaskError(
                f"model: reads {self.input_domain}, whose scale depends on the scan; call bind(scan) before predicting"
            )
        factor = np.float32(1 / self.normalization)
        if self.input_domain == "amplitude":
            return lambda x: x * factor
        return lambda x: np.square(x * factor)

    def predict(self, x: NDArray[np.float32], offset_yx_px: NDArray[np.float32]) -> NDArray[np.complex64]:
        """Patches of any number of groups; arguments as in `Model.predict`."""
        return predict_in_batches(self, x, offset_yx_px)
