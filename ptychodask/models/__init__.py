"""Networks, their physics and their bundles."""

from ptychodask.models.bundle import load_model, save_model
from ptychodask.models.model import Model, limit_threads
from ptychodask.models.spec import ModelSpec, Optics

__all__ = ["Model", "ModelSpec", "Optics", "limit_threads", "load_model", "save_model"]
