"""TensorFlow, JAX and PyTorch: the same weights give the same patches, and learn the same from a batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models_for_tests import when_installed


def run(backend, folder):
    """What a backend answers, by name."""
    path = folder / f"{backend}.npz"
    environment = os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("backend_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(path, allow_pickle=False) as found:
        answers = dict(found)
    assert str(answers.pop("backend")) == backend
    return answers


@pytest.fixture(scope="module")
def tensorflow(tmp_path_factory):
    return run("tensorflow", tmp_path_factory.mktemp("backends"))


@pytest.mark.parametrize("backend", [when_installed("jax"), when_installed("torch")])
def test_a_backend_agrees_with_tensorflow(tensorflow, backend, tmp_path):
    answers = run(backend, tmp_path)
    assert answers.keys() == tensorflow.keys()
    for name, expected in tensorflow.items():
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(answers[name], expected, atol=1e-4 * np.abs(expected).max(), rtol=0, err_msg=name)
