"""Keras, loaded without the start-up notes of its backend."""

from __future__ import annotations

import logging

from ptychodask.progress import quiet_stderr

with quiet_stderr():
    import keras
    from keras import layers, ops

__all__ = ["keras", "layers", "ops"]


class _NoRetracing(logging.Filter):
    """Leaves out TensorFlow's advice on functions that are traced often.

    It counts the functions of all networks of a process as one, so that the third network is taken for a loop.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "triggered tf.function retracing" not in record.getMessage()


logging.getLogger("tensorflow").addFilter(_NoRetracing())
