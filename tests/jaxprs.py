"""What a program consists of."""

from __future__ import annotations

from collections.abc import Iterator

import jax.extend as jex
import jax.tree_util as jtu


def primitives(jaxpr: jex.core.Jaxpr) -> Iterator[str]:
    """The names of the operations of a program and of those inside of them, as often as they stand there."""
    kinds = (jex.core.Jaxpr, jex.core.ClosedJaxpr)
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jtu.tree_leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, kinds)):
            inner = value.jaxpr if isinstance(value, jex.core.ClosedJaxpr) else value
            if isinstance(inner, jex.core.Jaxpr):
                yield from primitives(inner)
