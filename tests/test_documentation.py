"""The documentation names every command, every option and every public name, and only what there is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ptychodask
from ptychodask.cli import COMMANDS, app

ROOT = Path(__file__).resolve().parents[1]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def reference():
    """The module that makes the pages of the reference."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sections(reference):
    """What the page of the command line says of each command."""
    parts = re.split(r"^## (\S+)$", reference.cli_page(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def options_of(command):
    """Flags that `--help` lists."""
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output
    found = re.findall(r"^\W*(--[a-z][a-z-]*)(?: +(--no-[a-z-]*))?", shown, flags=re.MULTILINE)
    return {flag for flags in found for flag in flags if flag} - {"--help"}


def test_every_command_has_a_section_and_there_is_no_other(sections):
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output
    commands = re.findall(r"^│ ([a-z][a-z-]*) ", shown, flags=re.MULTILINE)
    assert len(commands) == len(COMMANDS)
    assert list(sections) == commands


@pytest.mark.parametrize("command", [command.__name__.replace("_", "-") for command in COMMANDS])
def test_a_section_has_the_options_that_help_lists_and_an_example(sections, command):
    section = sections[command]
    listed = set(re.findall(r"`(--[a-z][a-z-]*)`", section.partition("| argument")[2]))
    assert listed == options_of(command)
    assert f"```sh\nptychodask {command}" in section


def test_every_public_name_is_in_the_reference_once(reference):
    named = re.findall(r"^::: (ptychodask\.\S+)$", reference.api_page(), flags=re.MULTILINE)
    public = [getattr(ptychodask, name) for name in ptychodask.__all__]
    expected = {f"{found.__module__}.{found.__qualname__}" for found in public}
    assert sorted(named) == sorted(expected | {reference.ACCESSOR, reference.METRICS})


def test_every_listed_name_is_public(reference):
    listed = [name for names in reference.NAMES.values() for name in names]
    assert set(listed) <= set(ptychodask.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_commands_and_options_that_there_are(page):
    commands = {command.__name__.replace("_", "-") for command in COMMANDS}
    text = page.read_text().replace("\\\n", " ")
    for command, rest in re.findall(
        r"^(?:.*&& )?ptychodask ([a-z][a-z-]*)\b([^\n#|]*)", "\n".join(code_in(text)), re.MULTILINE
    ):
        assert command in commands, command
        assert set(re.findall(r"--[a-z][a-z-]*", rest.partition(" -- ")[0])) <= options_of(command) | {"--help"}, (
            f"{command}{rest}"
        )


def code_in(text):
    """Lines of shell blocks, and what stands between backticks outside them."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [*(line for block in blocks for line in block.splitlines()), *re.findall(r"`([^`\n]+)`", prose)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_there_are(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http") and not target.startswith("reference/"):
            assert (page.parent / target).exists(), target
