"""The order of the modules, who may load what, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ptychodask
from ptychodask.simulate import simulate

PACKAGE = Path(ptychodask.__file__).parent

FLOORS = [
    "errors",
    "jit",
    "options",
    "html",
    "scan",
    "probes",
    "forward",
    "progress",
    "grouping",
    "storage",
    "store",
    "reassembly",
    "result",
    "pyramid",
    "io",
    "simulate",
    "refinement",
    "iterative",
    "models",
    "training",
    "prediction",
    "plan",
    "cluster",
    "reconstruction",
    "judging",
    "inspection",
    "export",
    "study",
    "bench",
    "demo",
    "run",
    "recipes",
    "ptychodus_plugin",
    "cli",
]
"""Modules and folders from the top of the house down; each imports only those before it."""

LAYER = {name: layer for layer, name in enumerate(FLOORS)}

ALIASES = {
    "metrics": "judging.metrics",
    "ptychodus": "ptychodus_plugin",
    "models.recipes": "recipes",
}
"""Names of version 0.1 that its documentation gave; they import with a warning and hold nothing of their own."""

OWNERS = {
    "scipy.spatial": {"grouping"},
    "zarr": {"storage", "store", "pyramid", "result", "reconstruction", "inspection", "export"},
    "obstore": {"storage"},
    "h5py": {"io", "models", "export"},
    "h5netcdf": {"export"},
    "tifffile": {"export"},
    "keras": {"models"},
    "tensorflow": {"models", "training"},
    "xarray": {
        "recipes",
        "result",
        "refinement",
        "iterative",
        "reconstruction",
        "judging",
        "demo",
        "study",
        "export",
        "ptychodus_plugin",
    },
    "numba": {"jit"},
    "dask": {"reconstruction", "cluster", "result"},
    "distributed": {"cluster"},
    "skimage": {"judging"},
    "matplotlib": {"judging", "inspection"},
    "rich": {"progress", "cli"},
    "typer": {"cli"},
}
"""Floors that may import each heavy library. xarray is also the type of results, which later floors take and return."""


def modules() -> dict[str, Path]:
    """Modules of the package by their names without the package's; those of aliases left out."""
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and name not in ALIASES:
            named[name] = path
    return named


MODULES = modules()


def imports() -> list[tuple[str, str]]:
    """(module, imported module) for every import in the package, at the top of a file or inside a function."""
    pairs = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                pairs += [(name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                pairs.append((name, str(node.module)))
                # `from ptychodask.store import groups` imports a module, not a name.
                pairs += [
                    (name, f"{node.module}.{alias.name}")
                    for alias in node.names
                    if f"{node.module}.{alias.name}".removeprefix("ptychodask.") in MODULES
                ]
    return pairs


def floor_of(module: str) -> str:
    return module.split(".")[0]


def inside(module: str) -> str:
    """Name of a module of the package without the package's."""
    return module.removeprefix("ptychodask.")


def test_every_module_has_one_floor() -> None:
    assert len(set(FLOORS)) == len(FLOORS)
    assert {floor_of(name) for name in MODULES} == set(FLOORS)


def test_imports_point_up_the_list() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, module in imports()
        if module.startswith("ptychodask.") and LAYER[floor_of(inside(module))] > LAYER[floor_of(name)]
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Packages count as their own modules here, so that circles inside a folder are seen."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, module in imports():
        if module.startswith("ptychodask.") and inside(module) != name:
            graph[name].add(inside(module))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_only_the_figures_of_a_result_are_reached_for_down_the_list() -> None:
    """`import ptychodask` gives every name; what is taken from it points up the list too, with one exception."""
    down = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module == "ptychodask":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ptychodask":
                names = [node.attr]
            # A name is a module, or an object that knows its module.
            homes = [getattr(getattr(ptychodask, one, None), "__module__", f"ptychodask.{one}") for one in names]
            floor = floor_of(name)
            down |= {(floor, home) for home in homes if LAYER[floor_of(inside(home))] > LAYER[floor]}
    assert down == {("result", "ptychodask.judging.plotting")}


def test_heavy_libraries_have_one_owner() -> None:
    strangers = [
        f"{name} imports {module}"
        for name, module in imports()
        for library, owners in OWNERS.items()
        if (module == library or module.startswith(f"{library}.")) and floor_of(name) not in owners
    ]
    assert not strangers


@pytest.mark.parametrize("old", ALIASES)
def test_names_that_the_documentation_gave_import_with_a_warning(old: str) -> None:
    code = (
        "import importlib, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    alias = importlib.import_module('ptychodask.{old}')\n"
        f"new = importlib.import_module('ptychodask.{ALIASES[old]}')\n"
        "assert any(each.category is DeprecationWarning for each in caught), 'no warning'\n"
        "public = getattr(new, '__all__', [name for name in vars(new) if not name.startswith('_')])\n"
        "assert all(getattr(alias, name) is getattr(new, name) for name in public)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_functions_that_the_documentation_gave_import_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"ptychodask\.store\.write\.write_scan"):
        from ptychodask.store import write_scan
    from ptychodask.store.write import write_scan as moved

    assert write_scan is moved


def test_what_has_the_name_of_its_module_stays_a_function() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ptychodask.judging.compare
        import ptychodask.plan
        import ptychodask.training.train
    assert all(callable(each) for each in (ptychodask.plan, ptychodask.compare, ptychodask.training.train))


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


@pytest.mark.parametrize("command", [["plan"], ["reconstruct", "--model", "iterative", "--polish", "1", "-q"]])
def test_plans_and_sweeps_load_no_network_library(tmp_path: Path, command: list[str]) -> None:
    store = tmp_path / "scan.zarr"
    simulate(store, n_patterns=30, step_px=8.0, progress=False)
    code = (
        f"import sys\nfrom ptychodask.cli import app\n"
        f"try:\n    app({[command[0], str(store), *command[1:]]!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(n in sys.modules for n in ('keras', 'tensorflow', 'torch', 'jax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
