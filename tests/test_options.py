"""Facts of the fields of specs, and what follows from them: signatures, help, commands and lists of names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

import ptychodask
from ptychodask.cli import COMMANDS
from ptychodask.cli.fields import complete, options_of, typer_command
from ptychodask.cluster.job import JobSpec
from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec
from ptychodask.io.append import OF_EACH_SEGMENT, OF_FIRST_SEGMENT
from ptychodask.io.source import FORMAT_OPTIONS, IngestSpec
from ptychodask.options import facts_of, flags_of, names_where, option
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.training.spec import TrainingSpec

SPECS = [ReconstructionSpec, TrainingSpec, IngestSpec, GroupingSpec, JobSpec]

FUNCTIONS = {
    "reconstruct": ReconstructionSpec,
    "plan": ReconstructionSpec,
    "train": TrainingSpec,
    "ingest": IngestSpec,
    "submit": JobSpec,
    "batch_script": JobSpec,
    "slurm_client": JobSpec,
}

COMMANDS_OF = {
    "reconstruct": (ReconstructionSpec, {}),
    "plan": (ReconstructionSpec, {"planned": True}),
    "bench": (ReconstructionSpec, {"timed": True}),
    "train": (TrainingSpec, {}),
    "ingest": (IngestSpec, {}),
    "inspect": (IngestSpec, {"inspected": True}),
    "run": (IngestSpec, {"inspected": True}),
    "group": (GroupingSpec, {}),
    "submit": (JobSpec, {}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_list_the_fields_in_signature_and_help(name):
    function, spec = getattr(ptychodask, name), FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    for each in fields(spec):
        assert parameters[each.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[each.name].default is each.default
        assert f"\n{each.name} : {each.type}, default {each.default!r}\n    " in inspect.getdoc(function)
    assert not [each for each in parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]


def test_simulate_lists_its_options():
    kinds = {each.kind for each in inspect.signature(ptychodask.simulate).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


@pytest.mark.parametrize("name", ["reconstruct", "plan", "train"])
def test_an_unknown_name_is_refused_with_the_names_of_the_fields(name, tmp_path):
    with pytest.raises(PtychodaskError, match=f"no field crpo; the fields are: {fields(FUNCTIONS[name])[0].name}, "):
        getattr(ptychodask, name)(tmp_path / "scan.zarr", crpo=4)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each.__name__)
def test_commands_have_the_fields_as_options(command):
    spec, facts = COMMANDS_OF.get(command.__name__, (None, {}))
    kept = set(inspect.signature(command).parameters)
    added = set(inspect.signature(complete(command)).parameters) - kept
    assert added == (set() if spec is None else set(names_where(spec, **facts)) - kept)
    shown = {parameter.name: parameter for parameter in typer_command(command).params}
    for name in added:
        assert flags_of(spec)[name] == shown[name].opts[0]
        help_text = facts_of(spec)[name].help
        assert help_text[1:].rstrip(".") in shown[name].help
        assert shown[name].default is None


@pytest.mark.parametrize("spec", SPECS)
def test_every_field_has_its_facts(spec):
    facts = facts_of(spec)
    assert all(each.help.endswith(".") for each in facts.values())
    assert len(set(flags_of(spec).values())) == len(facts)


def test_lists_of_names_follow_from_the_facts():
    of_run = {
        "stored": ("live", "follow", "follow_timeout_s"),
        "growing": ("verify", "cache", "position_yx_px"),
        "changes_result": ("device", "on_error", "verify", "pyramid", "memory_bytes"),
    }
    for fact, names in of_run.items():
        assert names_where(ReconstructionSpec, **{fact: False}) == names
    assert names_where(ReconstructionSpec, one_scan=True) == ("drop", "cache", "position_yx_px")
    orders = ("flip_y", "flip_x", "swap_xy")
    sources = ("step", "raster", "positions", "diffraction")
    assert ("keys", "domain", "axes", "dc", "units", *orders, *sources) == FORMAT_OPTIONS
    assert OF_EACH_SEGMENT == ("positions", "diffraction", "drop_frames", "scratch")
    of_probe = ["probe", "probe_diameter_px", "probe_stop_px", "probe_defocus", "probe_defocus_m"]
    assert list(OF_FIRST_SEGMENT) == [*of_probe, "calibration", "incident_counts", "mask"]


def test_an_unknown_fact_is_an_error():
    with pytest.raises(TypeError, match="stroed"):
        option(1, help="A number.", stroed=False)
    with pytest.raises(AttributeError, match="stroed"):
        names_where(GroupingSpec, stroed=False)


@dataclass(frozen=True, kw_only=True)
class EveryKind:
    """A field of each type that options are made of."""

    number: int = option(1, help="A number.")
    length_m: float | None = option(None, help="A length.")
    word: Literal["a", "b"] = option("a", help="A word.")
    text: str | None = option(None, help="A text.", flag="--named")
    path: str | Path | None = option(None, help="A path.")
    off: bool = option(False, help="Off by default.")
    on: bool = option(True, help="On by default.")
    corners: tuple[int, int] | None = option(None, help="Two numbers.")
    middle: Literal["auto"] | tuple[float, float] = option("auto", help="A word or numbers.")
    lines: tuple[str, ...] = option((), help="Lines.", flag="--line")
    keys: Mapping[str, str] | None = option(None, help="Keys.", flag="--key")
    indices: Sequence[int] | NDArray[np.integer[Any]] = option((), help="Indices.")


@options_of(__name__, "EveryKind")
def show(name: str, *, quiet: bool = False, **given: Any) -> None:
    """Show the fields that were set."""
    typer.echo(json.dumps({key: str(value) for key, value in given.items()}))


def test_options_are_read_as_their_fields_types(tmp_path):
    np.save(tmp_path / "i.npy", np.arange(3))

    def read(*arguments):
        app = typer.Typer()
        app.command()(complete(show))
        return json.loads(CliRunner().invoke(app, ["name", *map(str, arguments)], catch_exceptions=False).output)

    assert read() == {}
    assert read("--number", 0, "--length-m", "0.0", "--word", "b", "--named", "x", "--path", "p") == {
        "number": "0",
        "length_m": "0.0",
        "word": "b",
        "text": "x",
        "path": "p",
    }
    assert read("--off", "--no-on") == {"off": "True", "on": "False"}
    assert read("--corners", "1,2", "--middle", "auto") == {"corners": "(1, 2)", "middle": "auto"}
    assert read("--middle", "1.5,2") == {"middle": "(1.5, 2.0)"}
    assert read("--line", "a", "--line", "b", "--key", "y=pos") == {"lines": "('a', 'b')", "keys": "{'y': 'pos'}"}
    assert read("--indices", tmp_path / "i.npy") == {"indices": "[0 1 2]"}
    with pytest.raises(PtychodaskError, match=r"--corners 1\.5,2: expected whole numbers"):
        read("--corners", "1.5,2")
    with pytest.raises(PtychodaskError, match=r"expected a \.npy file of indices"):
        read("--indices", tmp_path / "none.npy")


def test_listing_the_commands_imports_no_spec():
    listed = {each.__name__: set(inspect.signature(each).parameters) for each in COMMANDS}
    assert "crop" not in listed["reconstruct"]
    assert "epochs" not in listed["train"]
