"""What a process knows of its devices, whichever backend Keras has."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import keras

from ptychodask.scan import PtychodaskError

logger = logging.getLogger(__name__)

OUT_OF_MEMORY_NAMES = {"ResourceExhaustedError", "OutOfMemoryError"}
"""Names of what TensorFlow and PyTorch raise when a device's memory is full."""

OUT_OF_MEMORY_TEXTS = ("RESOURCE_EXHAUSTED", "CUDA out of memory")
"""What the errors of JAX and of older PyTorch say of it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 8 GiB"))
    True
    """
    named = any(kind.__name__ in OUT_OF_MEMORY_NAMES for kind in type(error).__mro__)
    return named or any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


def visible_gpus() -> list[Any]:
    """GPUs that Keras' backend sees in this process."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return list(import_module("tensorflow").config.list_physical_devices("GPU"))
    if backend == "jax":
        return [device for device in import_module("jax").devices() if device.platform == "gpu"]
    if backend == "torch":
        return list(range(import_module("torch").cuda.device_count()))
    return []


def check_gpu(who: str) -> None:
    """Raise `PtychodaskError` when this process sees no GPU.

    Parameters
    ----------
    who : str
        What asks for it, for the message.
    """
    if not visible_gpus():
        raise PtychodaskError(
            f"{who}: a GPU is asked for, and {keras.backend.backend()} sees none in this process; check "
            "CUDA_VISIBLE_DEVICES and the installed extra (pip install 'ptychodask[gpu]'), or ask for none"
        )


def use_given_gpu() -> None:
    """Keep a TensorFlow process to the first GPU that it sees, and its memory to what it needs.

    Notes
    -----
    The first one is a process's own: SLURM shows no other, and dask-cuda puts it in front. TensorFlow would take the
    memory of all of them. JAX and PyTorch use the first one unasked.
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
        # TensorFlow settles its devices with the first tensor: somebody else has chosen them.
        logger.info("the GPU stays as it was set: %s", error)
