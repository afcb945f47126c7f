"""Pages of the site that are made from the package: every command with its options, every public name.

MkDocs runs it as a hook; it needs no part of MkDocs until then, so the tests read the pages without it.
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, get_args, get_type_hints

import typer

import ptychodask
from ptychodask.cli import COMMANDS
from ptychodask.progress import quiet_stderr

NAMES = {
    "Scans": ["Scan", "open_scan", "ingest", "IngestSpec", "simulate", "PtychodaskError"],
    "Groups": ["GroupingSpec", "Groups", "group"],
    "Probe and iterative reconstruction": ["refine_probe", "ProbeRefinement", "reconstruct_iterative"],
    "Networks": ["Model", "ModelSpec", "CallableModel", "load_model"],
    "Training": ["train", "TrainingSpec", "GroupReader", "as_tf_dataset", "as_torch_dataset"],
    "Reconstruction": ["plan", "Plan", "reconstruct", "ReconstructionSpec", "open_result"],
    "Judging": ["compare", "residuals", "outliers", "resolution", "StudySpec", "read_study", "run_study"],
    "Figures and reports": [
        "plot",
        "plot_complex",
        "plot_comparison",
        "plot_residuals",
        "plot_split_half",
        "write_report",
    ],
}
"""Public names by what they are about; names that are in none of these come last."""

ACCESSOR = "ptychodask.result.PtychoAccessor"
"""What ``ds.ptycho`` is."""

WORKER_FROM_ELSEWHERE = "https://unpkg.com/iframe-worker/shim"
"""What the theme's pages load where they are read from a folder."""

WORKER = "offline-worker.js"
"""What they load in its place."""


def cli_page() -> str:
    """Every command: what it does, its examples, its arguments and options, as Markdown."""
    head = [
        "# Command line",
        "",
        "`ptychodask COMMAND --help` says the same in a terminal. Bad input ends in one line and exit code 2, Ctrl-C "
        "in 130, SIGTERM in 143.",
    ]
    return "\n".join([*head, *(line for command in COMMANDS for line in _command(command))]) + "\n"


def _command(command: Callable[..., None]) -> Iterator[str]:
    yield from ("", f"## {command.__name__.replace('_', '-')}", "")
    for paragraph in inspect.getdoc(command).split("\n\n"):
        example = paragraph.partition("Example: ")[2]
        yield from ("```sh", example, "```", "") if example else (paragraph, "")
    yield from ("| argument or option | type | meaning |", "|---|---|---|")
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, told = get_args(hints[name])
        cells = (_flags(name, told), _kind(kind), html.escape(told.help, quote=False) + _default(parameter.default))
        yield "| {} | {} | {} |".format(*(cell.replace("|", r"\|").replace("*", r"\*") for cell in cells))


def _default(value: Any) -> str:
    if value in (None, False, inspect.Parameter.empty):
        return ""
    return f" Default: `{value.value if isinstance(value, Enum) else value}`."


def _flags(name: str, told: Any) -> str:
    if isinstance(told, typer.models.ArgumentInfo):
        return f"`{name.upper()}`"
    # Beside an annotation the first flag stands where a default would.
    declared = [
        flag for text in (told.default, *(told.param_decls or ())) if isinstance(text, str) for flag in text.split("/")
    ]
    return ", ".join(f"`{flag}`" for flag in declared or [f"--{name.replace('_', '-')}"])


def _kind(kind: Any) -> str:
    """The type of a parameter in words; a repeated one says so."""
    if type(None) in get_args(kind):
        kind = next(one for one in get_args(kind) if one is not type(None))
    if get_args(kind):
        return f"{_kind(get_args(kind)[0])}, repeatable"
    if issubclass(kind, Enum):
        return ", ".join(member.value for member in kind)
    return {bool: "flag", int: "whole number", float: "number", str: "text"}.get(kind, "path")


def public_names() -> dict[str, list[str]]:
    """`NAMES`, and under "More" those that the package has beside them."""
    listed = {name for names in NAMES.values() for name in names}
    more = sorted(set(ptychodask.__all__) - listed)
    return NAMES | ({"More": more} if more else {})


def api_page() -> str:
    """Every public name, as instructions for mkdocstrings."""
    lines = [
        "# Python",
        "",
        "All of these are attributes of the package: `ptychodask.reconstruct`. A result is an `xarray.Dataset`; what "
        "it can do beside that is in its accessor `ds.ptycho`.",
    ]
    for title, names in public_names().items():
        lines += ["", f"## {title}"]
        for name in names:
            found = getattr(ptychodask, name)
            lines += ["", f"::: {found.__module__}.{found.__qualname__}"]
    return "\n".join([*lines, "", "## The accessor of results", "", f"::: {ACCESSOR}", ""])


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Load the search's stand-in for workers from the site itself; MkDocs calls this by its name."""
    depth = page.file.dest_uri.count("/")
    return output.replace(WORKER_FROM_ELSEWHERE, f"{'../' * depth}{WORKER}")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages; MkDocs calls this by its name."""
    from mkdocs.structure.files import File

    with quiet_stderr():
        pages = {"reference/cli.md": cli_page(), "reference/api.md": api_page()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files
