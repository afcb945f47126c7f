"""GPUs visible to a process and out-of-memory errors, for each Keras backend."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from ptychodask.errors import PtychodaskError
from ptychodask.models.backend import keras

logger = logging.getLogger(__name__)

OUT_OF_MEMORY_NAMES = {"ResourceExhaustedError", "OutOfMemoryError"}
"""Names of the exceptions of TensorFlow and PyTorch for full device memory."""

OUT_OF_MEMORY_TEXTS = ("RESOURCE_EXHAUSTED", "CUDA out of memory")
"""Texts of the errors of JAX and of older PyTorch for full device memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error reports that a device is out of memory.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 8 GiB"))
    True
    """
    named = any(kind.__name__ in OUT_OF_MEMORY_NAMES for kind in type(error).__mro__)
    return named or any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


def visible_gpus() -> list[Any]:
    """GPUs visible to Keras' backend in this process."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return list(import_module("tensorflow").config.list_physical_devices("GPU"))
    if backend == "jax":
        return [device for device in import_module("jax").devices() if device.platform == "gpu"]
    if backend == "torch":
        return list(range(import_module("torch").cuda.device_count()))
    return []


def check_gpu(who: str) -> None:
    """Raise `PtychodaskError` if this process sees no GPU.

    Parameters
    ----------
    who : str
        Name of the stage that needs it, for the message.
    """
    if not visible_gpus():
        raise PtychodaskError(
            f"{who}: a GPU is required, but {keras.backend.backend()} sees none in this process; check "
            "CUDA_VISIBLE_DEVICES and the installed extra (pip install 'ptychodask[gpu]'), or run without one"
        )


def use_given_gpu() -> None:
    """Restrict TensorFlow to the first visible GPU, with memory allocated on demand.

    Notes
    -----
    The first one is the GPU of this process: SLURM shows no other, and dask-cuda lists it first. By default TensorFlow
    allocates the memory of all GPUs. JAX and PyTorch use only the first one anyway.
    """
    if keras.backend.backend() != "tensorflow":
        return
    config, gpus = import_module("tensorflow").config, visible_gpus()
    if not gpus:
        return
    try:
        config.set_visible_devices(gpus[0], "GPU")
        config.experimental.set_memory_growth(gpus[0], True)
    except RuntimeError as error:
        # TensorFlow fixes its devices with the first tensor, so that the caller has chosen them already.
        logger.info("GPU settings left unchanged: %s", error)
