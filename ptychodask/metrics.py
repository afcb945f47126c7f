"""Old name of `ptychodask.judging.metrics`."""

import sys
import warnings
from importlib import import_module

warnings.warn("ptychodask.metrics is now ptychodask.judging.metrics", DeprecationWarning, stacklevel=2)

# The name stands for the moved module itself.
sys.modules[__name__] = import_module("ptychodask.judging.metrics")
