"""Primitives with a projection of the user's own."""

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from custom_models import STEEP, X, classification, cosine, random
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

import eqxproj
from eqxproj.losses import cross_entropy, squared_error
from eqxproj.rules import RULES, registry_version

pytestmark = pytest.mark.usefixtures("registry")


def new_primitive(name):
    """A primitive without a derivative: the sign of x times the square root of its size."""
    primitive = Primitive(name)

    def implementation(x):
        return jnp.sign(x) * jnp.sqrt(jnp.abs(x))

    primitive.def_impl(implementation)
    primitive.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(implementation, multiple_results=False))
    batching.primitive_batchers[primitive] = lambda args, dims: (primitive.bind(*args), dims[0])
    return primitive


def root_model(primitive):
    def loss(p, x, y):
        return cross_entropy(jax.vmap(lambda x: primitive.bind(x @ p["a"] + p["b"]) @ p["d"] + p["e"])(x), y).mean()

    return loss


def test_new_primitive_without_a_rule():
    primitive = new_primitive("signed_root_lonely")
    model, x, y = classification()
    with pytest.raises(eqxproj.UnsupportedPrimitiveError, match="signed_root_lonely"):
        eqxproj.feasibility_problem(root_model(primitive), model, x, y)


def slope(x):
    return 0.5 / jnp.sqrt(jnp.abs(x) + 0.1)


@pytest.mark.parametrize("form", ["points", "duals"])
@pytest.mark.parametrize("by_name", [False, True], ids=["object", "name"])
def test_new_primitive_trains(form, by_name):
    primitive = new_primitive(f"signed_root_{form}_{by_name}")

    @eqxproj.register_projection(primitive.name if by_name else primitive, form=form)
    def rule(ctx, inputs, target):
        (x,) = inputs
        assert ctx.unknown == (True,) and target.shape == x.shape
        return slope(x) * target if form == "duals" else x + slope(x) * (target - primitive.bind(x))

    model, x, y = classification()
    loss = root_model(primitive)
    text = eqxproj.feasibility_problem(loss, model, x, y).explain()
    assert "registered (rule)" in text
    result = eqxproj.train(model, (x, y), loss, steps=200, optimizer=optax.adam(1e-2), eval_data=(x, y))
    assert result.history["eval_loss"][-1] < 0.7 * result.history["eval_loss"][0]


def tanh_loss(p, x, y):
    return cross_entropy(jnp.tanh(x @ p["a"] + p["b"]) @ p["d"] + p["e"], y).mean()


def test_built_in_rule_is_overridden():
    model, x, y = classification()
    before = eqxproj.feasibility_problem(tanh_loss, model, x, y).explain()
    assert "registered" not in before and "add+tanh" in before

    @eqxproj.register_projection("tanh", form="duals")
    def frozen(ctx, inputs, dual):
        return (0 * inputs[0],)

    problem = eqxproj.feasibility_problem(tanh_loss, model, x, y)
    (line,) = [line for line in problem.explain().split("\n") if line.split()[1:2] == ["tanh"]]
    assert "registered (frozen)" in line
    moved = eqxproj.filter_displacement(tanh_loss)(model, x, y)
    assert float(jnp.abs(moved["a"]).max()) == 0.0 and float(jnp.abs(moved["d"]).max()) > 0


def test_second_registration_replaces_the_first():
    for scale in (0.0, 1.0):

        @eqxproj.register_projection("tanh", form="duals")
        def rule(ctx, inputs, dual, scale=scale):
            return scale * (1 - jnp.tanh(inputs[0]) ** 2) * dual

    model, x, y = classification()
    moved = eqxproj.filter_displacement(tanh_loss, metric=STEEP)(model, x, y)
    gradient = eqx.filter_grad(tanh_loss)(model, x, y)
    assert cosine(moved, gradient) > 0.999


@pytest.mark.parametrize("of_all", [False, True])
def test_known_operands_of_a_primitive(of_all):
    """The rule gets all operands; what it returns for known ones is ignored, and they may be left out."""
    kinds = []

    @eqxproj.register_projection("atan2", form="duals")
    def rule(ctx, inputs, dual):
        kinds.append(ctx.unknown)
        y, x = inputs
        nu = dual * x / (x**2 + y**2)
        return (nu, dual) if of_all else (nu,)

    def loss(p, x, y):
        return squared_error(jnp.arctan2(x @ p, 1.0 + x[:, :2] ** 2), y).mean()

    p, y = random(0, 3, 2), jnp.ones((4, 2))
    moved = eqxproj.filter_displacement(loss, metric=STEEP)(p, X, y)
    assert cosine(moved, jax.grad(loss)(p, X, y)) > 0.999
    assert kinds == [(True, False)]


def test_primitive_with_several_outputs():
    @eqxproj.register_projection("top_k", form="duals")
    def rule(ctx, inputs, duals):
        (x,) = inputs
        values, _ = duals
        indices = jax.lax.top_k(x, ctx.params["k"])[1]
        return jnp.zeros_like(x).at[jnp.arange(len(x))[:, None], indices].add(values)

    def loss(p, x, y):
        return squared_error(jax.lax.top_k(x @ p, 2)[0], y).mean()

    p, y = random(0, 3, 5), jnp.ones((4, 2))
    moved = eqxproj.filter_displacement(loss, metric=STEEP)(p, X, y)
    assert cosine(moved, jax.grad(loss)(p, X, y)) > 0.999


def test_registration_returns_the_rule():
    def rule(ctx, inputs, target):
        return inputs

    assert eqxproj.register_projection("cumsum")(rule) is rule
    assert "cumsum" in RULES


@pytest.mark.parametrize("primitive", [3, "", None, jnp.tanh])
def test_bad_primitives(primitive):
    with pytest.raises(TypeError, match="primitive"):
        eqxproj.register_projection(primitive)


def test_unknown_names():
    with pytest.raises(ValueError, match="'tanhh', and no primitive has that name. Did you mean 'tanh'"):
        eqxproj.register_projection("tanhh")
    primitive = Primitive("known_to_nobody")
    with pytest.raises(ValueError, match="Give a primitive of your own as itself"):
        eqxproj.register_projection(primitive.name)
    for known in ("erf_inv", "scan", "jit", "dot_general", primitive):
        eqxproj.register_projection(known)


@pytest.mark.parametrize("wrong", [3, None, "rule"])
def test_rules_that_are_no_functions(wrong):
    with pytest.raises(TypeError, match="'tanh' must be a function"):
        eqxproj.register_projection("tanh")(wrong)


@pytest.mark.parametrize("form", ["points", "duals"])
def test_jumps_of_a_registered_rule(form):
    """Found out where the primitive rounds; for another one the user says so."""

    def jumps(name, function, **options):
        eqxproj.register_projection(name, form=form, **options)(lambda ctx, inputs, wanted: wanted)
        problem = eqxproj.feasibility_problem(lambda p: jnp.mean((function(3 * p) - 1) ** 2), jnp.ones(3))
        return [
            n.rule.is_discontinuous
            for n in problem.graph.nodes
            if n.rule is not None and "registered" in n.rule.describe(None)
        ]

    assert jumps("floor", jnp.floor) == [True]
    assert jumps("tanh", jnp.tanh) == [False]
    assert jumps("tanh", jnp.tanh, is_discontinuous=True) == [True]
    assert jumps("floor", jnp.floor, is_discontinuous=False) == [False]
    with pytest.raises(TypeError, match="is_discontinuous"):
        eqxproj.register_projection("tanh", is_discontinuous="yes")  # pyright: ignore[reportArgumentType]


def test_bad_form():
    with pytest.raises((ValueError, TypeError), match="form"):
        eqxproj.register_projection("tanh", form="vectors")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "returned, part",
    [
        (lambda x: (x, x, x), "'tanh' returned 3 inputs, but the primitive has 1"),
        (lambda x: x[:1], r"'tanh' returned shape \(1, 16\) for input 0, which has shape \(256, 16\)"),
    ],
)
def test_what_a_registered_rule_returns_is_checked(returned, part):
    @eqxproj.register_projection("tanh")
    def rule(ctx, inputs, target):
        return returned(inputs[0])

    with pytest.raises(ValueError, match=part):
        eqxproj.filter_displacement(tanh_loss)(*classification())


def test_registry_is_restored():
    assert "tanh" not in RULES and "signed_root_points_True" not in RULES


def scaled(scale):
    """Registers a rule of tanh: a multiple of the dual."""

    @eqxproj.register_projection("tanh", form="duals")
    def rule(ctx, inputs, dual):
        return (scale * dual,)


def scanned_loss(p, x, y):
    """The product before tanh stands in the body of a recurrence."""

    def body(h, _):
        return jnp.tanh(h @ p["c"]), None

    h, _ = jax.lax.scan(body, x @ p["a"] + p["b"], None, length=2)
    return cross_entropy(h @ p["d"] + p["e"], y).mean()


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "in a recurrence"])
def test_registration_reaches_a_compiled_displacement(inside):
    model, x, y = classification()
    model = {**model, "c": jnp.eye(len(model["b"]))}
    displacement = eqxproj.filter_displacement(scanned_loss if inside else tanh_loss, metric=STEEP)
    own = displacement(model, x, y)
    found = []
    for scale in (0.0, 1.0, 3.0):
        scaled(scale)
        found.append(displacement(model, x, y)["a"])
    assert float(jnp.abs(found[0]).max()) == 0.0 < float(jnp.abs(found[1]).max())
    np.testing.assert_allclose(found[2], 3.0 ** (2 if inside else 1) * found[1], rtol=1e-4, atol=1e-7)
    eqxproj.unregister_projection("tanh")
    assert eqx.tree_equal(displacement(model, x, y), own)


def test_registration_reaches_a_compiled_projection():
    x = jnp.linspace(-1.0, 1.0, 5)
    _, project = eqxproj.projection(jnp.tanh, x, steps=5)
    (own,) = project(0.1 * x)
    assert float(jnp.abs(own - x).max()) > 0.1
    scaled(0.0)
    np.testing.assert_array_equal(project(0.1 * x)[0], x)
    eqxproj.unregister_projection("tanh")
    np.testing.assert_array_equal(project(0.1 * x)[0], own)


@pytest.mark.slow
def test_registration_reaches_the_branches_of_a_problem():
    """The rule of a branch looks its operations' rules up when a step is traced."""

    def loss(p, x, y):
        h = jax.lax.cond(jnp.all(x < jnp.inf), jnp.tanh, jnp.sin, x @ p["a"] + p["b"])
        return cross_entropy(h @ p["d"] + p["e"], y).mean()

    model, x, y = classification()
    problem = eqxproj.feasibility_problem(loss, model, x, y)

    def moved():
        new = eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=3).model
        return float(jnp.abs(new["b"] - model["b"]).max())

    own = moved()
    scaled(0.0)
    assert moved() == 0.0 < own
    eqxproj.unregister_projection("tanh")
    assert moved() == own


def test_unregistering_brings_back_what_stood_there():
    own = RULES["max"]
    version = registry_version()
    versions = set()
    for _ in range(2):
        eqxproj.register_projection("max")(lambda ctx, inputs, target: inputs)
        versions.add(registry_version())
    assert len({version, *versions}) == 3
    eqxproj.unregister_projection("max")
    assert RULES["max"] is own
    eqxproj.register_projection("tanh")(lambda ctx, inputs, target: inputs)
    eqxproj.unregister_projection("tanh")
    assert "tanh" not in RULES
    assert registry_version() == version


@pytest.mark.parametrize("primitive", ["max", "tanh", "no_such_primitive"])
def test_unregistering_what_was_not_registered(primitive):
    eqxproj.register_projection("cumsum")(lambda ctx, inputs, target: inputs)
    with pytest.raises(ValueError, match=f"'{primitive}'.*rules for: cumsum"):
        eqxproj.unregister_projection(primitive)


@pytest.mark.parametrize("name", ["exp", "div", "sub"])
def test_a_registered_rule_is_not_hidden_in_a_softmax(name):
    def loss(p, x, y):
        return squared_error(jax.nn.softmax(x @ p["a"]) @ p["d"], y).mean()

    model, x, _ = classification()
    args = {k: model[k] for k in "ad"}, x, jnp.ones((len(x), model["d"].shape[1]))
    before = eqxproj.feasibility_problem(loss, *args).explain()
    assert "softmax" in before and "registered" not in before

    @eqxproj.register_projection(name, form="duals")
    def rule(ctx, inputs, dual):
        return jax.vjp(ctx.function, *inputs)[1](dual)[0]

    after = eqxproj.feasibility_problem(loss, *args).explain()
    assert any(line.split()[1:2] == [name] and "registered" in line for line in after.splitlines())
