"""Old name of `ptychodask.ptychodus_plugin`."""

import sys
import warnings
from importlib import import_module

warnings.warn("ptychodask.ptychodus is now ptychodask.ptychodus_plugin", DeprecationWarning, stacklevel=2)

# The name stands for the moved module itself.
sys.modules[__name__] = import_module("ptychodask.ptychodus_plugin")
