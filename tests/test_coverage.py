"""Every row of the coverage table: it has rules, they follow the gradient, and the model learns."""

from __future__ import annotations

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import eqxproj
from tests.coverage import table
from tests.coverage._row import Case, Row, extra
from tests.coverage.all_rows import ROWS

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEEP = eqxproj.Metric(grade=1e6, parameter=1e6)
TAU = 1e-3
SMOOTH = [row for row in ROWS if row.kind == "smooth"]
DISCRETE = [row for row in ROWS if row.kind == "discrete"]


def names(row: Row) -> str:
    return f"{row.group}/{row.name}"


def some(rows, every: int):
    """Rows as parameters of a test: one in so many by default, the others with `-m slow`."""
    marks = [() if i % every == 0 else (pytest.mark.slow,) for i in range(len(rows))]
    return [pytest.param(row, id=names(row), marks=mark) for row, mark in zip(rows, marks)]


def arrays(tree):
    return {jax.tree_util.keystr(p): np.asarray(x, np.float64) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def cosines(moved, gradient, smooth: bool = True) -> dict[str, float]:
    """The cosine of each parameter's displacement with its gradient; 1 where both are next to zero, 0 where one is.

    Where not all is `smooth`, parameters without a gradient have an answer under noise, and are left out.
    """
    moved, gradient = arrays(moved), arrays(gradient)
    largest = max(np.linalg.norm(g) for g in gradient.values())
    assert largest > 0
    found = {}
    for name, g in gradient.items():
        d = moved[name]
        size, other = np.linalg.norm(g), np.linalg.norm(d)
        if size <= 1e-6 * largest:
            if smooth:
                found[name] = float(other <= 1e-4 * largest)
        else:
            found[name] = float((d * g).sum() / (size * other)) if other > 0 else 0.0
    return found


def learned(case: Case, row: Row, method: str, loss=None):
    """The first and the last loss over the whole training set."""
    loss = case.loss if loss is None else loss
    result = eqxproj.train(
        case.model,
        case.data,
        loss,
        steps=row.steps,
        method=method,  # pyright: ignore[reportArgumentType]
        optimizer=None if row.rate is None else optax.adam(row.rate),
        eval_data=case.data,
        eval_every=row.steps,
        has_aux=case.has_aux,
    )
    values = result.history["eval_loss"]
    return float(values[0]), float(values[-1])


@pytest.mark.parametrize("row", some(ROWS, 6))
def test_rules(row):
    """Every operation has a rule, and as the metric becomes steep they lead to the gradient, where there is one.

    So no displacement is silently zero: where a gradient is not, neither is the displacement.
    """
    case = row.make(jax.random.key(0))
    kwargs = extra(case)
    assert table.problem(case).explain().endswith("Operations without a rule: none.")
    displacement = eqxproj.filter_displacement(case.loss, metric=STEEP, tau=TAU, has_aux=case.has_aux)
    gradient = eqx.filter_jit(eqx.filter_grad(case.loss, has_aux=case.has_aux))
    moved, wanted = (f(case.model, *case.data, **kwargs) for f in (displacement, gradient))
    if case.has_aux:
        moved, wanted = moved[0], wanted[0]
    found = cosines(moved, wanted, row.kind == "smooth")
    worst = min(found, key=found.__getitem__)
    assert found[worst] >= row.cosine, (worst, found[worst])


@pytest.mark.slow
@pytest.mark.parametrize("row", some(SMOOTH, 16))
def test_learns(row):
    """By the defaults, down to a tenth of the first loss, or as low as with gradients."""
    case = row.make(jax.random.key(0))
    first, last = learned(case, row, "projection")
    if not (first > 0 and last <= first / 10):
        _, other = learned(case, row, "gradient")
        least = min(0.0, other)  # a loss may be negative: what counts is how far it is from its least value known
        assert last < first and last - least <= 1.2 * (other - least) + (0.2 * abs(least)), (first, last, other)


@pytest.mark.slow
@pytest.mark.parametrize("row", some(DISCRETE, 6))
def test_learns_through_steps(row):
    """At most half of the loss that is left where nothing passes through the step."""
    case = row.make(jax.random.key(0))
    assert case.frozen is not None
    _, frozen = learned(case, row, "gradient", case.frozen)
    first, last = learned(case, row, "projection")
    assert last <= frozen / 2, (first, last, frozen)


@pytest.mark.slow
def test_table():
    """The table that is written from the rows is up to date."""
    written = table.PATH.read_text()
    if table.VERSION in written:
        assert written == table.text(), "write it again: python -m tests.coverage.table"
    else:  # other versions of JAX write some functions in other primitives: the rows are the same
        assert all(f"\n| {row.name} | " in written for row in ROWS), "write it again: python -m tests.coverage.table"
