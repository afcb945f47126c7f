"""What every test shares: the folder of real scans."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The compiled libraries would otherwise print their own notes between the tests.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of scans made by others; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which a clone of the project does not hold")
    return SHARED
