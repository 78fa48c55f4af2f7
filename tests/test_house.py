"""The shape of the package: few files at its top, short files and functions, imports where they can be seen.

That imports run downward, without circles, is the contract in `pyproject.toml` (`lint-imports`).
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "eqxproj"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 16, 500, 60

# The parts of the package that import a heavy or optional package where they use it.
LATE = {
    "_compare": {"matplotlib"},
    "_problem": {"matplotlib", "networkx"},
    "_training": {"datasets", "matplotlib", "tqdm"},
    "datasets": {"PIL", "datasets", "pandas"},
    "flax": {"flax"},
    "solvers": {"matplotlib"},
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Import = ast.Import | ast.ImportFrom


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def packages(node: Import) -> list[str]:
    """The packages that a statement imports from; what it imports from this one has no name but dots."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return ["." * node.level] if node.level else [(node.module or "").partition(".")[0]]


def late_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the package of each import in a function."""
    for function in functions(tree):
        for node in ast.walk(function):
            if isinstance(node, Import):
                yield from ((node.lineno, name) for name in packages(node))


def lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def length(function: Function) -> int:
    """How many lines a function has, without its decorators and its docstring."""
    text = lines(function.body[0]) if ast.get_docstring(function) is not None else 0
    return lines(function) - text


def long_functions(tree: ast.AST) -> list[tuple[str, int]]:
    """The functions over the limit, and their lines."""
    found = [(function.name, length(function)) for function in functions(tree)]
    return [(name, count) for name, count in found if count > MOST_LINES_OF_A_FUNCTION]


def hidden_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line of each use of `jax._src` and of `TYPE_CHECKING`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            if name.startswith("jax._src") or name.rpartition(".")[2] == "TYPE_CHECKING":
                yield node.lineno, name


@pytest.fixture(params=SOURCES)
def source(request):
    """A file of the package: its name from the package's folder on, and its text."""
    return request.param, SOURCES[request.param].read_text(encoding="utf-8")


def test_few_files_stand_at_the_top_of_the_package():
    files = [path.name for path in PACKAGE.iterdir() if path.is_file() and not path.name.startswith(".")]
    assert len(files) <= MOST_FILES, files


def test_a_file_is_short_and_so_are_its_functions(source):
    name, text = source
    assert len(text.splitlines()) <= MOST_LINES, name
    assert long_functions(ast.parse(text)) == [], name


def test_imports_stand_at_the_top_of_a_file(source):
    name, text = source
    allowed = LATE.get(pathlib.PurePath(name).parts[0].removesuffix(".py"), set())
    assert [found for found in late_imports(ast.parse(text)) if found[1] not in allowed] == [], name


def test_nothing_is_imported_for_types_alone_or_from_inside_jax(source):
    name, text = source
    assert list(hidden_names(ast.parse(text))) == [], name


BAD = """
from typing import TYPE_CHECKING
import typing
import jax._src.core
from jax import _src
from jax._src import core

if typing.TYPE_CHECKING:
    from . import sets

def late():
    import matplotlib.figure
    from ..sets import Box
    return jax._src.core
"""


def test_the_checks_find_what_they_look_for():
    tree = ast.parse(BAD)
    assert sorted(late_imports(tree)) == [(12, "matplotlib"), (13, "..")]
    assert {line for line, _ in hidden_names(tree)} == {2, 4, 5, 6, 8, 14}
    text = '    """Two lines\n    of text."""'
    body = "\n".join([text, *["    x = 0"] * (MOST_LINES_OF_A_FUNCTION - 1)])
    assert long_functions(ast.parse(f"def short():\n{body}")) == []
    assert long_functions(ast.parse(f"def long():\n{body}\n    x = 1")) == [("long", MOST_LINES_OF_A_FUNCTION + 1)]
