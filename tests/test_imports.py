"""The order of the modules, who may load what, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ptychodask

PACKAGE = Path(ptychodask.__file__).parent

ORDER = [
    ("display",),
    ("scan",),
    ("progress",),
    ("places",),
    ("folders",),
    ("places",),
    ("grouping",),
    ("store",),
    ("growing",),
    ("patches",),
    ("io",),
    ("simulate",),
    ("models",),
    ("result",),
    ("iterative",),
    ("training",),
    ("prediction",),
    ("reassembly",),
    ("survey",),
    ("plan",),
    ("polishing",),
    ("cluster",),
    ("reconstruction",),
    ("registration", "metrics", "compare", "residuals", "resolution"),
    # A program that trains the packaged models and judges them; no module imports it.
    ("models.recipes",),
    ("plotting", "report"),
    # What comes in from other programs is read in io; what goes out to them is written here, below results and figures.
    ("export",),
    ("ptychodus",),
    ("inspection", "bench", "demo", "study"),
    ("cli",),
]
LAYER = {name: layer for layer, names in enumerate(ORDER) for name in names}

OWNERS = {
    "scipy.spatial": {"grouping"},
    "zarr": {"places", "store", "growing", "patches", "result", "export"},
    "obstore": {"places"},
    "h5py": {"io", "models", "export"},
    "h5netcdf": {"export"},
    "tifffile": {"export"},
    "keras": {"models", "training"},
    "tensorflow": {"models", "training"},
    "xarray": {
        "models.recipes",
        "result",
        "iterative",
        "reconstruction",
        "compare",
        "resolution",
        "metrics",
        "residuals",
        "plotting",
        "report",
        "demo",
        "study",
        "export",
        "ptychodus",
    },
    "numba": {"reassembly"},
    "dask": {"reconstruction", "cluster", "result", "residuals"},
    "distributed": {"reconstruction", "cluster", "residuals", "study"},
    "skimage": {"metrics", "registration", "compare"},
    "matplotlib": {"plotting", "report"},
    "rich": {"progress", "cli"},
    "typer": {"cli"},
}
"""Stages that may import each heavy library. xarray is also the type of results, which later stages take and give."""


def imports() -> list[tuple[str, str]]:
    """(stage, imported module) for every import in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        stage = stage_of(".".join(parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(stage, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                found.append((stage, str(node.module)))
    return found


def stage_of(module: str) -> str:
    """The stage of a module of the package, named without it: its first word, but for `models.recipes`."""
    return module if module in LAYER else module.split(".")[0]


def test_every_module_has_a_place_in_the_order() -> None:
    stages = {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert stages - {"__init__"} <= set(LAYER)


def test_imports_point_up_the_list() -> None:
    wrong = [
        f"{stage} imports {module}"
        for stage, module in imports()
        if module.startswith("ptychodask.") and LAYER[stage_of(module.removeprefix("ptychodask."))] > LAYER[stage]
    ]
    assert not wrong


def test_only_the_figures_of_a_result_are_reached_for_down_the_list() -> None:
    """`import ptychodask` gives every name; what is taken from it points up the list too, with one exception."""
    down = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        stage = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module == "ptychodask":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ptychodask":
                names = [node.attr]
            # A name is a module, or an object that knows its module.
            homes = [getattr(getattr(ptychodask, name, None), "__module__", f"ptychodask.{name}") for name in names]
            down |= {(stage, home) for home in homes if LAYER[home.split(".")[1]] > LAYER[stage]}
    assert down == {("result", "ptychodask.plotting")}


def test_heavy_libraries_have_one_owner() -> None:
    strangers = [
        f"{stage} imports {module}"
        for stage, module in imports()
        for library, owners in OWNERS.items()
        if (module == library or module.startswith(f"{library}.")) and stage not in owners
    ]
    assert not strangers


@pytest.mark.parametrize("command", ["import ptychodask", "from ptychodask.cli import main"])
def test_importing_loads_no_network_library(command: str) -> None:
    code = f"import sys; {command}; sys.exit(any(n in sys.modules for n in ('keras', 'tensorflow', 'torch', 'jax')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_loads_no_network_library() -> None:
    code = (
        "import sys\nfrom ptychodask.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(n in sys.modules for n in ('keras', 'tensorflow', 'torch', 'jax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
