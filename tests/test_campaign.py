"""Ten runs of the campaign; `python -m tests.campaigns.campaign` plays as many as one likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_broken_runs_end_with_the_identical_object():
    """Each fault once; what this machine cannot have is left out, and says so."""
    command = [sys.executable, "-m", "tests.campaigns.campaign", "--runs", "10", "--keras-every", "0", "--seed", "1"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-2000:]
    assert "identical" in told.stdout
    assert "BROKEN" not in told.stdout
