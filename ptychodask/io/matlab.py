"""MATLAB 5 files, read into memory; MATLAB 7.3 files are HDF5."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import scipy.io

from ptychodask.errors import PtychodaskError
from ptychodask.io.arrays import NamedArrays


class MatlabFile(NamedArrays):
    """Arrays of a MATLAB 5 file by their names, as a `Container`.

    Parameters
    ----------
    file : binary file
        Open and seekable; the caller closes it.
    label : str
        Name of the file, for messages.
    scratch : Path
        Not used: the format is limited to 2 GB, and is read at once.
    stack : ExitStack
        Not used.
    """

    def __init__(self, file: IO[bytes], label: str, scratch: Path, stack: ExitStack) -> None:
        file.seek(0)
        try:
            content = scipy.io.loadmat(file)
        # scipy raises errors of many types on a damaged file.
        except Exception as error:
            raise PtychodaskError(
                f"{label}: cannot be read as a MATLAB 5 file ({error}); copy it again, or save it with -v7.3"
            ) from error
        arrays = {
            key: values
            for key, values in content.items()
            if isinstance(values, np.ndarray) and values.dtype.kind in "buifc"
        }
        super().__init__(label, arrays)
