"""`bench`: its figures belong together, it leaves nothing behind, and what it builds is what it says."""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pytest

from ptychodask import cli, models
from ptychodask.bench import BenchSpec, bench, describe
from ptychodask.errors import PtychodaskError
from ptychodask.models import CallableModel
from ptychodask.simulate import simulate

N = 16
STAGES = {"total", "load", "read", "predict", "splat", "merge", "write"}


def _load():
    return lambda x, offset_yx_px: np.moveaxis(x, -1, 1).astype(np.complex64)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of a network that costs nothing, on a stored scan."""
    folder = tmp_path_factory.mktemp("bench")
    store = folder / "scan.zarr"
    simulate(store, n_pixels=N, n_patterns=120, step_px=3.0, dose=1e4, progress=False)
    model = CallableModel(load=_load, n_pixels=N, members=4, content_hash="copies")
    found = bench(store, model, folder=folder, progress=False)
    assert [path.name for path in folder.iterdir()] == ["scan.zarr"]
    return found


def test_it_tells_every_stage_and_plain_values(report):
    assert report["end_to_end"]["seconds"].keys() >= STAGES
    assert json.loads(json.dumps(report)) == report


def test_rates_and_efficiency_follow_from_what_was_measured(report):
    whole, bare = report["end_to_end"], report["bare"]
    assert report["plan"]["n_groups"] == 120
    assert whole["groups_per_s"] == pytest.approx(120 / whole["seconds"]["total"])
    assert whole["patterns_per_s"] == pytest.approx(whole["groups_per_s"])
    mean = (bare["before_groups_per_s"] + bare["after_groups_per_s"]) / 2
    assert whole["efficiency"] == pytest.approx(whole["groups_per_s"] / mean)
    assert whole["efficiency_with_start_up"] < whole["efficiency"]


def test_the_bare_loop_takes_whole_batches_of_the_plan(report):
    calls = report["bare"]["batches"] * report["plan"]["batch_size"]
    assert report["bare"]["before_groups_per_s"] == pytest.approx(calls / report["bare"]["seconds"][0])


def test_the_scan_and_the_machine_are_described(report):
    assert report["scan"] | {"stored_bytes": 0} == {
        "n_patterns": 120,
        "n_pixels": N,
        "dtype": "uint16",
        "stored_bytes": 0,
        "simulated": False,
    }
    assert 0 < report["scan"]["stored_bytes"] < 120 * N * N * 2
    assert report["workers"]["n_workers"] == 1
    (machine,) = report["workers"]["machines"]
    assert machine["cores"] >= 1
    assert "ptychodask" in machine["versions"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells and forgets the peak of a process")
def test_one_process_with_all_roles_is_reported_once(report):
    (only,) = report["memory"].items()
    assert only[0] == "client, scheduler and worker in one process"
    assert only[1] >= 0


def test_the_table_names_every_figure(report):
    table = describe(report)
    for word in ("bare", "end to end", "efficiency", *(STAGES - {"total"}), "peak memory"):
        assert word in table
    assert f"{report['end_to_end']['efficiency']:.3f} of the bare network" in table


def test_the_command_simulates_a_scan_builds_a_network_and_removes_both(monkeypatch, capsys, tmp_path):
    flags = ["--n-groups", 60, "--n-pixels", N, "--n-filters-scale", 1, "--folder", tmp_path / "work"]
    (tmp_path / "work").mkdir()
    asked = ["ptychodask", "bench", *flags, "--json", tmp_path / "bench.json", "--quiet"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in asked])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    found = json.loads((tmp_path / "bench.json").read_text())
    assert describe(found) in capsys.readouterr().out
    assert found["scan"]["simulated"]
    assert (found["model"]["kind"], found["model"]["members"], found["plan"]["n_groups"]) == ("pinn", 4, 60)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["scan.zarr", "--n-groups", "5"], "--n-groups is for a simulated scan, but scan.zarr was passed"),
        (["--model", "a.model", "--network", "pinn"], "--network is for an untrained network, but a.model"),
        (["--network", "resnet"], "network is 'resnet', expected one of: pinn, ptychopinn"),
        (
            ["--workers", "2", "--scheduler", "tcp://a"],
            "bench: --workers starts a cluster, but --scheduler names a running one",
        ),
        (["--json", "nowhere/a.json"], "cannot write nowhere/a.json: folder nowhere does not exist"),
        (["--folder", "nowhere"], "nowhere: no such folder"),
        (["missing.zarr"], "missing.zarr: no such store"),
        (["--n-groups", "20", "--network", "ptychopinn", "--n-pixels", "32"], "PtychoPINN supports only: 64, 128, 256"),
    ],
)
def test_bad_input_ends_in_one_line(monkeypatch, capfd, tmp_path, arguments, match):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptychodask", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert match in line
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_ptychopinns_sizes_has_its_layers(shared):
    def layers_of(model):
        return Counter((layer.kind, np.shape(model.weights.get(layer.name, [()])[0])) for layer in model.layers)

    built = models.untrained_ptychopinn(64, 4, 2)
    assert layers_of(built) == layers_of(models.load_model(shared / "reference" / "ptychopinn_bundle"))
    assert built.network().count_params() == 2_340_208


def test_a_larger_pattern_has_a_deeper_network():
    built = models.untrained_ptychopinn(128, 1, 1)
    assert [layer.kind for layer in built.layers].count("MaxPooling2D") == 4
    patches = built.predict(np.ones((1, 128, 128, 1), np.float32), np.zeros((1, 1, 2), np.float32))
    assert patches.shape == (1, 128, 128)


def test_no_other_network_can_be_asked_for():
    with pytest.raises(PtychodaskError, match=r"network is 'unet', expected one of: pinn, ptychopinn"):
        BenchSpec(network="unet")
