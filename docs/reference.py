"""Reference pages generated from the package: all commands and public names.

MkDocs runs this module as a hook. MkDocs itself is imported only then, so the tests can generate the pages without it.
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, get_args

import typer

import ptychodask
from ptychodask.cli import COMMANDS
from ptychodask.cli.fields import complete
from ptychodask.progress import quiet_stderr

NAMES = {
    "Scans": ["Scan", "open_scan", "set_metadata", "ingest", "IngestSpec", "simulate", "PtychodaskError"],
    "Groups": ["GroupingSpec", "Groups", "group"],
    "Probe and iterative reconstruction": [
        "refine_probe",
        "apply_positions",
        "ProbeRefinement",
        "reconstruct_iterative",
    ],
    "Networks": ["Model", "ModelSpec", "CallableModel", "load_model"],
    "Training": ["train", "TrainingSpec", "GroupReader", "as_tf_dataset", "as_torch_dataset"],
    "Reconstruction": ["plan", "Plan", "reconstruct", "ReconstructionSpec", "open_result"],
    "Judging": ["compare", "residuals", "outliers", "resolution", "StudySpec", "read_study", "run_study"],
    "Figures and reports": [
        "plot",
        "plot_complex",
        "plot_comparison",
        "plot_refinement",
        "plot_residuals",
        "plot_split_half",
        "write_report",
    ],
}
"""Public names by topic; unlisted names come last."""

ACCESSOR = "ptychodask.result.PtychoAccessor"
"""Class of ``ds.ptycho``."""

METRICS = "ptychodask.judging.metrics"
"""Module of the metrics of arrays, such as `spoke_contrast`."""

WORKER_FROM_ELSEWHERE = "https://unpkg.com/iframe-worker/shim"
"""Script that the theme loads when the pages are opened from a folder."""

WORKER = "offline-worker.js"
"""Script of this site that replaces it."""


def cli_page() -> str:
    """Markdown of all commands: description, examples, arguments and options."""
    head = [
        "# Command line",
        "",
        "`ptychodask COMMAND --help` prints the same text. Exit codes: 2 after bad input, with a one-line error; 130 "
        "after Ctrl-C; 143 after SIGTERM.",
    ]
    return "\n".join([*head, *(line for command in COMMANDS for line in _command(command))]) + "\n"


def _command(command: Callable[..., None]) -> Iterator[str]:
    yield from ("", f"## {command.__name__.replace('_', '-')}", "")
    for paragraph in inspect.getdoc(command).split("\n\n"):
        example = paragraph.partition("Example: ")[2]
        yield from ("```sh", example, "```", "") if example else (paragraph, "")
    yield from ("| argument or option | type | meaning |", "|---|---|---|")
    for name, parameter in inspect.signature(complete(command), eval_str=True).parameters.items():
        kind, info = get_args(parameter.annotation)
        if info.hidden:
            continue
        cells = (_flags(name, info), _kind(kind), html.escape(info.help, quote=False) + _default(parameter.default))
        yield "| {} | {} | {} |".format(*(cell.replace("|", r"\|").replace("*", r"\*") for cell in cells))


def _default(value: Any) -> str:
    if value in (None, False, inspect.Parameter.empty):
        return ""
    return f" Default: `{value.value if isinstance(value, Enum) else value}`."


def _flags(name: str, info: Any) -> str:
    if isinstance(info, typer.models.ArgumentInfo):
        return f"`{name.upper()}`"
    # In an annotation typer stores the first flag in the attribute `default`.
    declared = [
        flag for text in (info.default, *(info.param_decls or ())) if isinstance(text, str) for flag in text.split("/")
    ]
    return ", ".join(f"`{flag}`" for flag in declared or [f"--{name.replace('_', '-')}"])


def _kind(kind: Any) -> str:
    """Name of a parameter's type, with "repeatable" for lists."""
    if type(None) in get_args(kind):
        kind = next(one for one in get_args(kind) if one is not type(None))
    if get_args(kind):
        return f"{_kind(get_args(kind)[0])}, repeatable"
    if issubclass(kind, Enum):
        return ", ".join(member.value for member in kind)
    return {bool: "flag", int: "whole number", float: "number", str: "text"}.get(kind, "path")


def public_names() -> dict[str, list[str]]:
    """`NAMES`, with unlisted public names under "More"."""
    listed = {name for names in NAMES.values() for name in names}
    more = sorted(set(ptychodask.__all__) - listed)
    return NAMES | ({"More": more} if more else {})


def api_page() -> str:
    """Markdown of all public names, as directives for mkdocstrings."""
    lines = [
        "# Python",
        "",
        "All names are attributes of the package: `ptychodask.reconstruct`. A result is an `xarray.Dataset`; its "
        "accessor `ds.ptycho` adds methods of ptychodask.",
    ]
    for title, names in public_names().items():
        lines += ["", f"## {title}"]
        for name in names:
            public = getattr(ptychodask, name)
            lines += ["", f"::: {public.__module__}.{public.__qualname__}"]
    return "\n".join(
        [
            *lines,
            "",
            "## Metrics of arrays",
            "",
            f"::: {METRICS}",
            "",
            "## The accessor of results",
            "",
            f"::: {ACCESSOR}",
            "",
        ]
    )


def on_post_page(output: str, page: Any, config: Any) -> str:
    """MkDocs hook: load the search worker from the site instead of the internet."""
    depth = page.file.dest_uri.count("/")
    return output.replace(WORKER_FROM_ELSEWHERE, f"{'../' * depth}{WORKER}")


def on_files(files: Any, config: Any) -> Any:
    """MkDocs hook: add the generated pages."""
    from mkdocs.structure.files import File

    with quiet_stderr():
        pages = {"reference/cli.md": cli_page(), "reference/api.md": api_page()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files
