"""Old name of `ptychodask.ptychodus_plugin`."""

import warnings

from ptychodask.ptychodus_plugin import *  # noqa: F403

warnings.warn("ptychodask.ptychodus is now ptychodask.ptychodus_plugin", DeprecationWarning, stacklevel=2)
