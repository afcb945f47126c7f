"""Old name of `ptychodask.recipes`."""

import sys
import warnings
from importlib import import_module

warnings.warn("ptychodask.models.recipes is now ptychodask.recipes", DeprecationWarning, stacklevel=2)

if __name__ == "__main__":
    import_module("ptychodask.recipes").main()
else:
    # The name stands for the moved module itself.
    sys.modules[__name__] = import_module("ptychodask.recipes")
