"""Convolutions inside of loops and branches are canonicalised, and compute what they did."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import eqxproj
from eqxproj._program._canonical import canonicalised, lowered
from eqxproj._program._trace import trace

_NORMAL = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""Positions of batch, channels and space; of output channels, input channels and space; and of the output's."""


def convolutions(jaxpr: Jaxpr, inside: bool = False) -> list[tuple[bool, Any]]:
    """For each convolution whether it stands in a loop or branch, and its layout."""
    found = []
    for e in jaxpr.eqns:
        if e.primitive.name == "conv_general_dilated":
            found.append((inside, tuple(map(tuple, e.params["dimension_numbers"]))))
        inner = inside or e.primitive.name in ("while", "scan", "cond")
        for value in e.params.values():
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, (ClosedJaxpr, Jaxpr)):
                    found += convolutions(x.jaxpr if isinstance(x, ClosedJaxpr) else x, inner)
    return found


def batch_groups(closed: ClosedJaxpr) -> set[int]:
    found = [e.params["batch_group_count"] for e in closed.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    return set(found)


def program_of(function, *args):
    return trace(lambda m: jnp.sum(function(*m)), args, (), {}).program


LAYOUTS = [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("HCNW", "WIHO", "CWNH"), ("CNHW", "IOHW", "HWNC")]
OPTIONS = {
    "plain": {"padding": "SAME"},
    "strides": {"padding": "VALID", "window_strides": (2, 1)},
    "dilations": {"padding": ((1, 2), (0, 1)), "lhs_dilation": (1, 2), "rhs_dilation": (2, 1)},
    "groups": {"padding": "SAME", "feature_group_count": 2},
    "small groups": {"padding": "SAME", "feature_group_count": 8},
}


def pair(layout, groups):
    sizes = dict(zip("NCHW", (2, 16, 7, 6), strict=True)), dict(zip("OIHW", (16, 16 // groups, 3, 2), strict=True))
    keys = jax.random.split(jax.random.key(0))
    return [
        jax.random.normal(k, tuple(size[c] for c in names)) for k, size, names in zip(keys, sizes, layout, strict=False)
    ]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS[1:])], ids="-".join
)
@pytest.mark.parametrize("transpose", ["forward", "to the input", "to the kernel"])
def test_any_layout_computes_the_same_in_a_loop(layout, name, transpose):
    options = {"window_strides": (1, 1), **OPTIONS[name]}
    x, w = pair(layout, options.get("feature_group_count", 1))

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)

    out, back = jax.vjp(conv, x, w)
    g = jax.random.normal(jax.random.key(1), out.shape)
    wanted = {"forward": out, "to the input": back(g)[0], "to the kernel": back(g)[1]}[transpose]

    def once(x, w):
        back = jax.vjp(conv, x, w)[1]
        return {"forward": conv(x, w), "to the input": back(g)[0], "to the kernel": back(g)[1]}[transpose]

    def looped(x, w):
        return jax.lax.fori_loop(0, 3, lambda i, s: s + once(x, w), jnp.zeros_like(wanted))

    program = program_of(conv, x, w)

    def changed(x, w):
        return canonicalised(lambda: looped(x, w), program)

    found = convolutions(jax.make_jaxpr(changed)(x, w).jaxpr)
    if name != "small groups" or transpose == "to the kernel":
        assert _NORMAL in {layout for inside, layout in found if inside}
    if name != "small groups":
        assert {layout for inside, layout in found if inside} == {_NORMAL}
    np.testing.assert_allclose(jax.jit(changed)(x, w), 3 * wanted, rtol=1e-5, atol=1e-5)


def nested(x, w):
    """In a branch of a loop of a function of its own; one in the outermost computation stays as it is."""

    def conv(x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))

    def step(x, _):
        return jax.lax.cond(x[0, 0, 0, 0] > 1e6, lambda x: x, jax.jit(jax.checkpoint(conv)), x), None

    return conv(jax.lax.scan(step, x, None, length=2)[0])


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_the_batch_become_groups_of_channels_anywhere(groups):
    x, w = pair(("NCHW", "OIHW", "NCHW"), groups)

    def back(x, w):
        out, back = jax.vjp(lambda w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=groups), w)
        return back(out)[0]

    program = program_of(back, x, w)
    assert groups in batch_groups(jax.make_jaxpr(back)(x, w))
    assert batch_groups(jax.make_jaxpr(lambda x, w: canonicalised(lambda: back(x, w), program))(x, w)) == {1}
    np.testing.assert_allclose(lowered(back, x, w).compile()(x, w), back(x, w), rtol=1e-4, atol=1e-4)


@pytest.fixture
def operands():
    return jax.random.normal(jax.random.key(0), (2, 4, 6, 6)), 0.2 * jax.random.normal(jax.random.key(1), (4, 4, 3, 3))


def test_only_what_stands_in_loops_and_branches_is_changed(operands):
    program = program_of(nested, *operands)
    found = convolutions(jax.make_jaxpr(lambda *a: canonicalised(lambda: nested(*a), program))(*operands).jaxpr)
    assert sorted(found) == [(False, ((0, 1, 2, 3),) * 3), (True, _NORMAL)]
    out = jax.jit(lambda *a: canonicalised(lambda: nested(*a), program))(*operands)
    np.testing.assert_allclose(out, nested(*operands), rtol=1e-5, atol=1e-5)


def test_a_lowered_function_computes_the_same(operands):
    program = lowered(lambda a, b: {"out": nested(*a), "other": b}, operands, np.int32(3)).compile()
    out = program(operands, np.int32(3))
    np.testing.assert_allclose(out["out"], nested(*operands), rtol=1e-5, atol=1e-5)
    assert int(out["other"]) == 3


def test_without_convolutions_nothing_is_traced_twice(operands):
    calls = []

    def function():
        calls.append(1)
        return operands[0] * 2

    program = program_of(lambda x, w: x * w[0, 0, 0, 0], *operands)
    np.testing.assert_array_equal(canonicalised(function, program), operands[0] * 2)
    assert calls == [1]


def test_what_is_no_array_is_passed_through(operands):
    program = program_of(nested, *operands)
    out = canonicalised(lambda: ("name", nested(*operands), None), program)
    assert out[0] == "name" and out[2] is None


class Network(eqx.Module):
    conv: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __call__(self, x):
        return self.last(jax.nn.relu(self.conv(x)).ravel())


@pytest.mark.slow
@pytest.mark.parametrize("solver", [eqxproj.AlternatingProjections(), eqxproj.DouglasRachford()])
def test_the_sweeps_of_a_solver_are_canonicalised(solver):
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    model = Network(eqx.nn.Conv2d(1, 2, 3, padding=1, key=k1), eqx.nn.Linear(32, 3, key=k2))
    x, y = jax.random.normal(k3, (5, 1, 4, 4)), jnp.array([0, 1, 2, 0, 1])

    def loss(model, x, y):
        return eqxproj.losses.cross_entropy(jax.vmap(model)(x), y).mean()

    copies = "none" if solver.store_copies else "neuron"
    options = {"solver": solver, "metric": eqxproj.Metric(), "tau": 1.0, "copies": copies}
    dynamic, static = eqx.partition(model, eqx.is_inexact_array)

    def displaced(steps):
        find = eqxproj.filter_displacement(loss, steps=steps, raw=True, **options)
        return lambda dynamic: find(eqx.combine(dynamic, static), x, y)

    found = convolutions(jax.make_jaxpr(displaced(6))(dynamic).jaxpr)
    assert any(inside for inside, _ in found)
    assert all(layout == _NORMAL for inside, layout in found if inside)
    # The same problem, solved by `solve`, which has no loop, from its own forward pass.
    problem = eqxproj.feasibility_problem(loss, model, x, y, metric=options["metric"], tau=1.0, copies=copies)
    solved = eqxproj.solve(problem, solver, steps=6).model
    moved = jax.tree_util.tree_map(lambda a, b: a - b, *(eqx.filter(m, eqx.is_array) for m in (model, solved)))
    for a, b in zip(jax.tree_util.tree_leaves(moved), jax.tree_util.tree_leaves(displaced(6)(dynamic)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(a))))
