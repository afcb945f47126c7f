"""Old name of `ptychodask.judging.metrics`."""

import warnings

from ptychodask.judging.metrics import *  # noqa: F403

warnings.warn("ptychodask.metrics is now ptychodask.judging.metrics", DeprecationWarning, stacklevel=2)
