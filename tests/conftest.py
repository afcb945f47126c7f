"""What every test shares: the folder of real scans."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from pathlib import Path

import pytest

from ptychodask import cli, prediction
from ptychodask.cluster.clients import in_process_client
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.reconstruction import reconstruct

# The compiled libraries would otherwise print their own notes between the tests.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

SHARED = Path(__file__).resolve().parents[2] / "shared"


LONGEST = ("test_campaign.py", "test_fuzz.py", "test_object_store.py", "test_slurm.py")
"""Files that take the longest: they come first, so that two processes end together."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of scans made by others; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which a clone of the project does not hold")
    return SHARED


def set_refinement(*, polish, slow_phase):
    """Change the defaults of runs: those of the spec, and of the spec that `reconstruct` has made of them."""
    ReconstructionSpec.__init__.__kwdefaults__.update(polish=polish, slow_phase=slow_phase)
    for name, value in (("polish", polish), ("slow_phase", slow_phase)):
        object.__setattr__(inspect.signature(reconstruct).parameters["spec"].default, name, value)


@pytest.fixture(autouse=True, scope="session")
def unrefined_by_default():
    """Tests that are not about refinement have none, unless they ask for it: it would double their time."""
    set_refinement(polish=0, slow_phase=False)


@pytest.fixture
def with_refinement():
    """The defaults of users: refinement is automatic."""
    set_refinement(polish="auto", slow_phase="auto")
    yield
    set_refinement(polish=0, slow_phase=False)


@pytest.fixture(scope="module")
def client():
    """A Dask client whose one worker lives in this process."""
    with in_process_client() as client:
        yield client


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptychodask", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return call


@pytest.fixture
def refused(run):
    """Run a command that must be refused; gives its one line."""

    def call(*arguments):
        code, _, err = run(*arguments)
        assert code == 2, err
        assert "Traceback" not in err
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        return lines[0]

    return call


@pytest.fixture
def empty_caches(monkeypatch):
    """Nothing that an earlier test left in this process: no open store, no compiled network."""
    for name in ("_STORES", "_PREDICTORS"):
        monkeypatch.setattr(prediction, name, prediction._ProcessCache())


@pytest.fixture
def told():
    """Messages of the package's log; Dask's clusters of this process mute the handlers that pytest sets up."""
    messages = []

    class Listener(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    listener, of_package = Listener(), logging.getLogger("ptychodask")
    level = of_package.level
    of_package.addHandler(listener)
    of_package.setLevel(logging.INFO)
    yield messages
    of_package.setLevel(level)
    of_package.removeHandler(listener)
