"""Writes `COVERAGE.md` from the rows: `python -m tests.coverage.table`; with `--check`, exits 1 where it is stale."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import equinox as eqx
import jax

import eqxproj
from eqxproj._program._equations import dependents
from eqxproj._program._primitives import ELEMENTWISE, VIEWS

from ._row import Case, Row, extra

PATH = Path(__file__).with_name("COVERAGE.md")
HEAD = """# What is covered

Every row is a small model or function that `tests/test_coverage.py` trains. Smooth rows: in the limit of a steep metric
the projections give the gradient, and by the defaults the model learns as with gradients. Discrete rows: the loss falls
to half, or less, of what is left where the inputs of the step are held fixed. This file is written by
`python -m tests.coverage.table` from the rows, and that it is up to date is a test. Other versions of JAX may write
some functions in other primitives.

"""
VERSION = f"Written with jax {jax.__version__}.\n"
KINDS = ("rule", "view", "elementwise", "local solver", "objective", "known", "none")
MEANING = {
    "rule": "has a rule of its own",
    "view": "moves elements about: part of an edge",
    "elementwise": "fused into scalar nodes",
    "local solver": "a few damped Gauss-Newton steps with derivatives of that operation alone",
    "objective": "met in the loss itself, after the last parameter",
    "known": "met on known values only, or behind `stop_gradient`",
    "none": "no rule",
}


def problem(case: Case) -> eqxproj.FeasibilityProblem:
    """The problem of a case, with shapes in the place of values: enough to explain it, and quick."""

    def make(model, data, kwargs):
        return eqxproj.feasibility_problem(case.loss, model, *data, has_aux=case.has_aux, kwargs=kwargs)

    return eqx.filter_eval_shape(make, case.model, case.data, extra(case))


def nodes(found: eqxproj.FeasibilityProblem):
    return [n for n in found.graph.nodes if n.kind in ("operation", "objective")]


def cell(found: eqxproj.FeasibilityProblem) -> str:
    """The distinct rules of a problem, from the data on."""
    rules = [n.describe_rule() for n in reversed(nodes(found))]
    return ", ".join(dict.fromkeys(rules)).replace("|", "\\|")


def primitives(found: eqxproj.FeasibilityProblem) -> dict[str, set[str]]:
    """For each primitive of the normal form, what becomes of it."""
    program, parameters = found.trace.program, len(found.trace.parameters)
    unknown = dependents(program.equations, program.inputs[:parameters])
    kinds: dict[str, set[str]] = defaultdict(set)
    inside: set[int] = set()
    for node in nodes(found):
        if node.kind == "objective" and node.function is not None:
            inside |= {v.index for e in node.function.equations for v in e.outputs}
        elif node.equation is not None and node.rule is not None:
            kinds[node.equation.name].add("local solver" if "local" in node.describe_rule() else "rule")
    for equation in program.equations:
        outputs = {v.index for v in equation.outputs}
        if not outputs & unknown:
            kinds[equation.name].add("known")
        elif outputs & inside:
            kinds[equation.name].add("objective")
        elif equation.name in VIEWS and not kinds[equation.name]:
            kinds[equation.name].add("view")
        elif (equation.name in ELEMENTWISE or equation.name == "reduce_sum") and not kinds[equation.name]:
            kinds[equation.name].add("elementwise")
    return kinds


def _entry(row: Row) -> tuple[str, dict[str, set[str]]]:
    try:
        found = problem(row.make(jax.random.key(0)))
    except eqxproj.UnsupportedPrimitiveError:
        return "not supported", {}
    return cell(found), primitives(found)


def text(rows: list[Row] | None = None) -> str:
    """The whole file."""
    from .all_rows import ROWS

    groups: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, set[str]] = defaultdict(set)
    for row in ROWS if rows is None else rows:
        found, seen = _entry(row)
        groups[row.group].append(f"| {row.name} | {found} |")
        for name, of_row in seen.items():
            kinds[name] |= of_row
    parts = [HEAD + VERSION]
    for group, lines in groups.items():
        parts.append(
            "\n".join([f"## {group[0].upper()}{group[1:]}", "", "| name | projected by |", "| --- | --- |", *lines, ""])
        )
    parts.append("## Primitives\n\nOf the normal forms of all rows, and what becomes of them:\n")
    parts.append("\n".join(f"- {kind}: {MEANING[kind]}." for kind in KINDS if kind != "none") + "\n")
    lines = ["| primitive | becomes |", "| --- | --- |"]
    lines += [f"| `{n}` | {', '.join(k for k in KINDS if k in (kinds[n] or {'none'}))} |" for n in sorted(kinds)]
    return "\n".join([*parts, *lines]) + "\n"


def main(arguments: list[str]) -> int:
    new = text()
    if "--check" not in arguments:
        PATH.write_text(new)
        return 0
    return int(not PATH.exists() or PATH.read_text() != new)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
