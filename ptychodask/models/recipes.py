"""Old name of `ptychodask.recipes`."""

import warnings

from ptychodask.recipes import *  # noqa: F403
from ptychodask.recipes import main

warnings.warn("ptychodask.models.recipes is now ptychodask.recipes", DeprecationWarning, stacklevel=2)

if __name__ == "__main__":
    main()
