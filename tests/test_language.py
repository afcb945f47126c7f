"""The package's English: first words of docstrings, words and names that are out, why-comments."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptychodask

PACKAGE = Path(ptychodask.__file__).parent
ROOT = Path(__file__).parent.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = [
    page
    for page in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "notebooks").glob("*.ipynb")),
    )
    if page.exists()
]

FIRST_WORDS_OUT = {"What", "Which", "Whether", "How", "Where", "Who", "When"}

LONGEST_FIRST_LINE = 12
"""Words in the first line of a docstring, at most."""

OUT = re.compile(
    r"\b(told|tells?|says?|said|called for|calls for|go on|goes on|going on|went on|gone on|ways? out|traits?"
    r"|Course|Parcel|todo|lies?|lying)\b"
)

EXCEPTIONS: dict[str, str] = {}
"""Text around a word that is out, and the reason why it stays."""

NAMES_OUT = set(
    [
        "found",
        "todo",
        "told",
        "told_by",
        "called_for",
        "hold",
        "to_its_end",
        "where",
        "place",
        "placed",
        "places",
        "light",
        "go_on",
        "going_on",
        "likeness_to_twin",
        "lesson",
        "Lesson",
        "course",
        "Course",
        "traits",
        "Parcel",
        "Form",
        "own",
        "way_out",
        "said",
        "say",
    ]
)
"""Names of variables, arguments, functions and classes that had several meanings, or none that a newcomer knows."""

NAMES_KEPT: dict[tuple[str, str], str] = {}
"""(module, name) of a name that is out and kept, with the reason."""

PARTICIPLES_KEPT = {
    "grouping",
    "training",
    "polishing",
    "stitching",
    "judging",
    "plotting",
    "pretrained",
    "untrained",
    "mapping",
}
"""Stages named after what happens in them, and `mapping`, which is a noun here."""

WHY = (
    "reconstruction/scheduler.py",
    "reconstruction/ledger.py",
    "plan/plan.py",
    "plan/chunks.py",
    "storage/atomic.py",
    "storage/objects.py",
    "storage/s3.py",
    "storage/zarr_checks.py",
    "store/__init__.py",
    "store/write.py",
    "store/append.py",
)
"""Scheduler, ledger, planning, atomic writing and store safety: comments there give the why between functions."""

LEAST_WHY = 0.03


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of comments, and of all strings of a module but names and keys."""
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def page_text(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of a page without its code."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    else:
        text = path.read_text()
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield number, re.sub(r"`[^`]*`", "", line)


def words_out(lines: Iterator[tuple[int, str]]) -> list[str]:
    wrong = []
    for number, text in lines:
        for kept in EXCEPTIONS:
            text = text.replace(kept, "")
        wrong += [f"{number}: {match[0]!r} in {text[:90]!r}" for match in OUT.finditer(text)]
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_begin_with_the_thing_itself(path: Path) -> None:
    wrong = []
    for line, text in docstrings(ast.parse(path.read_text())):
        first = text.partition("\n\n")[0].replace("\n", " ")
        if first.split()[0].strip(",;:") in FIRST_WORDS_OUT or len(first.split()) > LONGEST_FIRST_LINE:
            wrong.append(f"{line}: {first}")
    attributes = [
        f"{node.lineno}: {node.value.value[:90]}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if node.value.value.split(" ")[0].strip(",;:") in FIRST_WORDS_OUT
    ]
    assert not wrong + attributes


@pytest.mark.parametrize("path", [*MODULES, *PAGES], ids=name_of)
def test_words_that_are_out_are_not_used(path: Path) -> None:
    assert not words_out(prose(path) if path.suffix == ".py" else page_text(path))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_names_are_those_of_the_field(path: Path) -> None:
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names = [node.name]
        elif isinstance(node, ast.arg):
            names = [node.arg]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names = [node.attr]
        wrong += [
            f"{getattr(node, 'lineno', 0)}: {name}"
            for name in names
            if name.lstrip("_") in NAMES_OUT and (name_of(path), name) not in NAMES_KEPT
        ]
    assert not wrong


def test_modules_are_nouns_or_the_verb_that_is_public_there() -> None:
    stems = {path.parent.name if path.stem == "__init__" else path.stem for path in MODULES}
    assert not {stem for stem in stems if re.search(r"(ing|ed|en)$", stem)} - PARTICIPLES_KEPT


@pytest.mark.parametrize("name", WHY)
def test_comments_give_the_why_where_a_mistake_loses_data(name: str) -> None:
    source = (PACKAGE / name).read_text()
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and "type: ignore" not in token.string and "noqa" not in token.string
    }
    assert len(comments) >= LEAST_WHY * len(source.splitlines())
