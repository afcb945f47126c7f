"""The command line: what it does, and that bad input ends in one line, exit code 2 and nothing half-written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from typer.testing import CliRunner

from ptychodask import cli
from ptychodask.models import Model, ModelSpec, Optics, save_model
from ptychodask.models.networks import build_network
from ptychodask.result import make_dataset, open_result
from ptychodask.simulate import simulate
from ptychodask.store import StoredScan, open_scan
from ptychodask.store.annotate import record_model, replace_probe
from ptychodask.store.write import write_scan

N = 16

COMMANDS = [
    "demo",
    "run",
    "inspect",
    "ingest",
    "simulate",
    "group",
    "refine-probe",
    "set",
    "train",
    "plan",
    "reconstruct",
    "submit",
    "bench",
    "compare",
    "report",
    "export",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "scan.zarr"
    simulate(path, n_pixels=N, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate")
    return path


def untrained(path, store, **fields):
    """A bundle whose network has not been trained."""
    optics = Optics.of(open_scan(store))
    spec = ModelSpec(**{"n_pixels": optics.probe.shape[-1], "members": 4, "levels": 2} | fields)
    return save_model(Model(spec, build_network(spec, optics).get_weights(), optics), path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example: ptychodask " + command in result.output.replace("\n", " ")


def test_the_whole_path_runs_from_the_command_line(run, tmp_path):
    store = tmp_path / "scan.zarr"
    assert run("simulate", store, "--n-pixels", N, "--n-patterns", 80, "--step-px", 3, "--dose", 1e5)[0] == 0
    assert "80 groups of 4 as 'c4-k7-s0'" in run("group", store)[1]
    short = ["--epochs", 1, "--levels", 2, "--validation-fraction", 0.2]
    code, out, err = run("train", store, *short, "-q")
    assert code == 0, err
    assert "scan.pinn.model: " in out
    code, out, err = run("plan", store)
    assert code == 0, err
    assert "80 groups" in out or "80" in out
    code, out, err = run("reconstruct", store, "-q")
    assert code == 0, err
    assert open_result(tmp_path / "scan.object.zarr").ptycho.records["model"]["kind"] == "pinn"
    assert (tmp_path / "scan.object.png").stat().st_size > 10_000
    code, out, err = run("compare", f"PtychoPINN={tmp_path / 'scan.object.zarr'}", "--scan", store)
    assert code == 0, err
    assert "| PtychoPINN | amplitude |" in out


def test_a_probe_is_refined(run, tmp_path):
    store = tmp_path / "scan.zarr"
    scan = simulate(store, n_pixels=N, n_patterns=150, step_px=2.0, dose=1e6, probe="zone_plate")
    rng = np.random.default_rng(0)
    noise = rng.normal(size=scan.probe.shape) + 1j * rng.normal(size=scan.probe.shape)
    wrong = scan.probe + np.abs(scan.probe).max() * 0.2 * noise
    wrong *= np.sqrt((np.abs(scan.probe) ** 2).sum() / (np.abs(wrong) ** 2).sum())
    replace_probe(store, wrong.astype(np.complex64), {})
    code, out, err = run("refine-probe", store, "-q")
    assert code == 0, err
    assert "held-out patterns" in out


def npz(path, **changes):
    """A small PtychoPINN file; a value of None leaves the key out."""
    rng = np.random.default_rng(0)
    position = rng.uniform(N, 3 * N, size=(2, 30))
    arrays = {
        "diff3d": rng.random((30, N, N), dtype=np.float32),
        "ycoords": position[0],
        "xcoords": position[1],
        "probeGuess": np.ones((N, N), np.complex64),
    } | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


BAD_FILES = {
    "missing key": ({"xcoords": None}, r"xcoords.*diff3d"),
    "wrong shapes": ({"ycoords": np.zeros(29)}, "30.*29|29.*30"),
    "positions that are not finite": ({"ycoords": np.full(30, np.nan)}, "not finite"),
    "a size not divisible by 4": ({"diff3d": np.ones((30, 66, 66), np.float32), "probeGuess": None}, "66"),
    "negative values": ({"diff3d": -np.ones((30, N, N), np.float32)}, "negative"),
    "integers of unknown kind": ({"diff3d": np.ones((30, N, N), np.uint16)}, "--domain|domain="),
    "groups in place of patterns": ({"diff3d": np.ones((30, N, N, 4), np.float32)}, "group"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(refused, tmp_path, case):
    changes, expected = BAD_FILES[case]
    line = refused("ingest", npz(tmp_path / "bad.npz", **changes), tmp_path / "scan.zarr")
    assert re.search(expected, line), line
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.npz"]


def test_files_that_end_too_early_are_refused(refused, tmp_path):
    whole = npz(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "whole.npz").unlink()
    for name, content in {"empty.npz": b"", "cut.npz": whole[: len(whole) // 2], "text.npz": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        assert name in refused("ingest", tmp_path / name, tmp_path / "scan.zarr")
    assert {path.name for path in tmp_path.iterdir()} == {"empty.npz", "cut.npz", "text.npz"}


def test_a_pickled_metadata_is_read_around(run, tmp_path):
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self):
            return open, (str(canary), "w")

    path = npz(tmp_path / "a.npz")
    np.save(tmp_path / "_metadata.npy", np.array(Malicious(), dtype=object), allow_pickle=True)
    canary.unlink(missing_ok=True)
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(tmp_path / "_metadata.npy", "_metadata.npy")
    code, _, err = run("ingest", path, tmp_path / "scan.zarr")
    assert code == 0, err
    assert not canary.exists()


def test_missing_paths_are_named(refused, tmp_path):
    assert "no.npz" in refused("ingest", tmp_path / "no.npz", tmp_path / "scan.zarr")
    for command in ("group", "refine-probe", "train", "plan", "reconstruct"):
        assert "no such store" in refused(command, tmp_path / "no.zarr")
    assert "no.zarr" in refused("compare", tmp_path / "no.zarr", tmp_path / "no.zarr")


def change_root(store, **attributes):
    import zarr

    zarr.open_group(store, mode="r+").attrs.update(attributes)


def test_unfinished_and_newer_stores_are_refused(refused, tmp_path):
    simulate(tmp_path / "a.zarr", n_pixels=N, n_patterns=20, step_px=3.0)
    change_root(tmp_path / "a.zarr", state="writing")
    assert "unfinished" in refused("reconstruct", tmp_path / "a.zarr")
    change_root(tmp_path / "a.zarr", state="complete", format_version=99)
    assert "format version 99" in refused("train", tmp_path / "a.zarr")
    (tmp_path / ".b.zarr.writing").mkdir()
    assert "unfinished" in refused("plan", tmp_path / "b.zarr")


def test_without_a_model_it_says_what_to_run(refused, store):
    assert "ptychodask train" in refused("reconstruct", store)


def test_a_model_for_another_size_is_refused(refused, store, tmp_path):
    simulate(tmp_path / "other.zarr", n_pixels=24, n_patterns=30, step_px=3.0)
    untrained(tmp_path / "other.model", tmp_path / "other.zarr", levels=3)
    line = refused("reconstruct", store, "--model", tmp_path / "other.model", "--out", tmp_path / "o.zarr")
    assert "24" in line
    assert "16" in line
    assert not (tmp_path / "o.zarr").exists()


def test_a_model_for_another_number_of_members_is_refused(refused, run, store, tmp_path):
    run("group", store, "--members", 3)
    untrained(tmp_path / "four.model", store)
    name = next(name for name in StoredScan(store).table_names() if name.startswith("c3"))
    line = refused("reconstruct", store, "--model", tmp_path / "four.model", "--groups", name)
    assert "4" in line
    assert "3" in line


def test_a_recorded_model_that_is_gone_is_named(refused, tmp_path):
    simulate(tmp_path / "a.zarr", n_pixels=N, n_patterns=20, step_px=3.0)
    record_model(tmp_path / "a.zarr", kind="pinn", path=tmp_path / "gone.model", content_hash="0")
    assert "gone.model" in refused("reconstruct", tmp_path / "a.zarr")


def test_damaged_patterns_end_in_one_line_and_leave_no_result(refused, tmp_path):
    simulate(tmp_path / "a.zarr", n_pixels=N, n_patterns=20, step_px=3.0)
    untrained(tmp_path / "a.model", tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr" / "diffraction" / "c")
    line = refused("reconstruct", tmp_path / "a.zarr", "--model", tmp_path / "a.model", "--out", tmp_path / "o.zarr")
    assert "files are missing" in line
    assert {path.name for path in tmp_path.iterdir()} == {"a.zarr", "a.model"}


def test_an_existing_output_is_refused_before_the_work(refused, store, tmp_path):
    untrained(tmp_path / "a.model", store)
    (tmp_path / "o.zarr").mkdir()
    assert "exists already" in refused(
        "reconstruct", store, "--model", tmp_path / "a.model", "--out", tmp_path / "o.zarr"
    )
    assert "exists already" in refused("simulate", store)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["group", "--members", "0"], "members is 0"),
        (["group", "--members", "4", "--neighbours", "2"], "neighbours is 2"),
        (["train", "--validation-fraction", "2"], "validation_fraction is 2"),
        (["train", "--loss", "hinge"], "loss is 'hinge'"),
        (["reconstruct", "--roi", "1,2"], "--roi"),
        (["reconstruct", "--roi", "1,2,3,4.5"], "--roi"),
        (["reconstruct", "--roi", "nan,1,2,3"], "expected whole numbers"),
        (["reconstruct", "--roi", "0,inf,2,3"], "expected whole numbers"),
        (["reconstruct", "--window", "round"], "window is 'round'"),
        (["reconstruct", "--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "pass one of them"),
        (["refine-probe", "--fraction", "7"], "fraction is 7"),
        (["refine-probe", "--n-sweeps", "1"], "n_sweeps is 1"),
    ],
)
def test_bad_options_are_refused(refused, store, arguments, expected):
    assert expected in refused(arguments[0], store, *arguments[1:])


def test_bad_keys_and_centres_are_refused(refused, tmp_path):
    path = npz(tmp_path / "a.npz")
    assert "NAME=KEY" in refused("ingest", path, tmp_path / "s.zarr", "--key", "diff3d")
    assert "--centre" in refused("ingest", path, tmp_path / "s.zarr", "--centre", "1;2")


def test_a_full_disk_is_one_line_and_leaves_nothing(refused, tmp_path, monkeypatch):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = npz(tmp_path / "a.npz")
    monkeypatch.setattr("ptychodask.store.write._create_patterns", full)
    assert "No space left on device" in refused("ingest", path, tmp_path / "scan.zarr")
    assert list(tmp_path.iterdir()) == [path]


def test_the_installed_command_answers():
    done = subprocess.run(
        [sys.executable, "-c", "from ptychodask.cli import main; main()", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().count(".") == 2


def test_overwriting_replaces_only_what_is_of_the_same_kind(refused, run, store, tmp_path):
    untrained(tmp_path / "a.model", store)
    kept = (tmp_path / "a.model" / "weights.npz").read_bytes()
    arguments = ("reconstruct", store, "--model", tmp_path / "a.model", "--overwrite", "--out")
    assert "replaces only a ptychodask-result" in refused(*arguments, tmp_path / "a.model")
    assert (tmp_path / "a.model" / "weights.npz").read_bytes() == kept
    assert "replaces only a ptychodask-result" in refused(*arguments, tmp_path)
    assert "replaces only a ptychodask-model" in refused("train", store, "--out", store, "--overwrite")
    for _ in range(2):
        assert run(*arguments, tmp_path / "o.zarr", "-q")[0] == 0


def test_the_slow_phase_is_a_flag(run, store, tmp_path):
    untrained(tmp_path / "a.model", store)
    arguments = ("reconstruct", store, "--model", tmp_path / "a.model", "-q", "--out")
    code, _, err = run(*arguments, tmp_path / "o.zarr", "--slow-phase", "--polish", 1)
    assert code == 0, err
    attributes = open_result(tmp_path / "o.zarr").ptycho.records
    assert attributes["refinement"]["slow_phase"]["n_patterns"] == 60
    assert (attributes["spec"]["slow_phase"], attributes["refinement"]["sweeps"]) == (True, 1)
    code, _, err = run(*arguments, tmp_path / "p.zarr", "--polish", "often")
    assert code == 2
    assert "'often', expected a whole number, or auto" in " ".join(err.replace("│", "").split())


def test_one_result_without_truth_is_judged_by_the_patterns(run, tmp_path):
    simulate(tmp_path / "known.zarr", n_pixels=N, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate")
    scan = open_scan(tmp_path / "known.zarr")
    store = tmp_path / "scan.zarr"
    fields = {name: getattr(scan, name) for name in ("position_yx_px", "probe", "domain", "calibration")}
    write_scan(store, diffraction=scan.diffraction, **fields)
    untrained(tmp_path / "a.model", store)
    assert run("reconstruct", store, "--model", tmp_path / "a.model", "-q")[0] == 0
    code, out, err = run("compare", tmp_path / "scan.object.zarr", "--scan", store)
    assert code == 0, err
    assert re.fullmatch(r"PtychoPINN: R 0\.\d{4} over 60 patterns\n", out)


@pytest.fixture
def judged(store, tmp_path):
    """The truth as a result, and a poorer one as pty-chi's file, on pixels of its own."""
    truth = open_scan(store).truth
    ones = np.ones(truth.object.shape)
    corner = tuple(int(value) for value in truth.corner_yx_px)
    make_dataset(truth.object, ones, ones, ones, corner, pixel_size_m=None, attributes={}).ptycho.save(
        tmp_path / "ours.zarr"
    )
    noise = np.random.default_rng(0).normal(scale=0.05, size=ones.shape)
    np.savez(tmp_path / "ptychi.npz", reconstructed_object=truth.object + noise, algorithm="pty-chi")
    return tmp_path


def test_files_of_other_programs_are_compared_and_tables_written(run, store, judged):
    results = [judged / "ours.zarr", judged / "ptychi.npz"]
    tables = ["--csv", judged / "t.csv", "--markdown", judged / "t.md", "--png", judged / "t.png"]
    code, out, err = run("compare", *results, "--truth", store, "--baseline", "PtyChi", *tables)
    assert code == 0, err
    assert "| ours | amplitude | 1 |  |  |  | 1 |" in out
    assert "Difference from PtyChi:" in out
    assert (judged / "t.md").read_text().strip() == out.strip()
    assert (judged / "t.csv").read_text().startswith("method,part,correlation,")
    assert (judged / "t.png").stat().st_size > 10_000
    code, _, err = run("compare", *results, "--truth", store, *tables)
    assert (code, err.count("\n")) == (2, 1)
    assert "t.csv exists already; pass --overwrite, or name another file" in err
    assert run("compare", *results, "--truth", store, "--baseline", "PtyChi", *tables, "--overwrite")[0] == 0
    code, out, err = run("compare", f"A={judged / 'ptychi.npz'}", "--key", "A=reconstructed_object", "--truth", store)
    assert code == 0, err
    assert "| A | phase |" in out


def test_what_cannot_be_compared_is_one_line(refused, store, judged):
    ours, theirs = judged / "ours.zarr", judged / "ptychi.npz"
    for arguments, line in (
        ((ours,), "1 results and no truth"),
        ((ours, judged / "no.npz"), "no.npz: no such file"),
        ((theirs, "--key", "B=a", "--truth", store), "--key B=a: no result has this label"),
        ((f"A={theirs}", "--key", "A=a", "--truth", store), "has no array 'a'; keys found: reconstructed_object"),
        ((ours, theirs, "--baseline", "Nobody"), "baseline is 'Nobody', expected one of the results"),
        ((ours, theirs, "--peak", "high"), "peak is 'high', expected a positive number"),
        ((ours, theirs, "--csv", judged / "none" / "t.csv"), "none does not exist; make it first"),
        ((ours, theirs, "--csv", judged), "it is a folder; name a file"),
        ((ours, theirs, "--truth", ours), "expected 'ptychodask-scan'"),
    ):
        assert line in refused("compare", *arguments)


def test_pictures_are_checked_before_the_work(refused, store, tmp_path):
    untrained(tmp_path / "a.model", store)
    for name in ("no/a.png", "a.xyz", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        line = refused("reconstruct", store, "--model", tmp_path / "a.model", "--png", tmp_path / name)
        assert name in line
    assert not store.with_name("scan.object.zarr").exists()


def test_positions_in_another_unit_are_noticed(refused, tmp_path):
    path = npz(tmp_path / "a.npz", ycoords=np.linspace(0, 1e12, 30))
    assert "positions extend over 1e+12 px" in refused("ingest", path, tmp_path / "scan.zarr")


def test_what_does_not_fit_into_memory_is_one_line(refused, store, monkeypatch):
    def too_large(*_, **__):
        raise MemoryError("Unable to allocate 931 GiB")

    monkeypatch.setattr("ptychodask.store.groups.group", too_large)
    assert "not enough memory (Unable to allocate 931 GiB)" in refused("group", store)


@pytest.fixture
def result(store, tmp_path):
    """A stored result that records its scan."""
    ones, scan = np.ones((40, 50)), open_scan(store)
    attributes = {"store": str(store), "data_hash": scan.data_hash}
    make_dataset(ones, ones, ones, ones, (-20, -25), pixel_size_m=None, attributes=attributes).ptycho.save(
        tmp_path / "object.zarr"
    )
    return tmp_path / "object.zarr"


def test_results_and_scans_are_exported(run, store, result, tmp_path):
    optics = "--pixel-size-m", 1e-9, "--energy-ev", 9000, "--distance-m", 2
    for source, format, name in (
        (result, "ptychodus", "a.h5"),
        (store, "cxi", "a.cxi"),
        (result, "ptychopinn", "a.npz"),
    ):
        code, out, err = run("export", source, "--format", format, "--out", tmp_path / name, *optics, "-q")
        assert (code, out) == (0, f"{tmp_path / name}: {format}\n"), err
        assert (tmp_path / name).stat().st_size > 1000
    assert "exists already" in run("export", store, "--format", "cxi", "--out", tmp_path / "a.cxi", *optics)[2]
    assert run("export", store, "--format", "cxi", "--out", tmp_path / "a.cxi", *optics, "--overwrite", "-q")[0] == 0


def test_what_cannot_be_exported_is_said_in_one_line(refused, store, result, tmp_path):
    for source, format, name, expected in (
        (result, "jpeg", "a.jpg", "format is 'jpeg', expected one of: ptychodus, cxi,"),
        (result, "tiff", "a.png", "a file of format tiff must end in .tif or .tiff"),
        (store, "tiff", "a.tif", "format tiff is only for results"),
        (result, "cxi", "a.cxi", "needs pixel_size_m, which is not recorded; pass pixel_size_m= (--pixel-size-m)"),
        (tmp_path / "no.zarr", "cxi", "a.cxi", "no such result"),
        (result, "png", "none/a.png", "does not exist; make it first"),
    ):
        assert expected in refused("export", source, "--format", format, "--out", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"object.zarr"}
