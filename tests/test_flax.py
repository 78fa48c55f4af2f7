"""Flax models: there and back, what is trained and what is not, and the errors."""

import importlib.util
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

from flax import linen, nnx  # noqa: E402
from flax.core import freeze  # noqa: E402

import eqxproj  # noqa: E402
import eqxproj.flax  # noqa: E402
from eqxproj.flax import from_linen, from_nnx  # noqa: E402
from eqxproj.losses import cross_entropy  # noqa: E402

X = jax.random.normal(jax.random.key(0), (16, 5))
Y = jnp.tanh(X[:, :3])


class Net(linen.Module):
    """A linear layer, batch normalization, dropout, a linear layer."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(linen.relu(x)))

    def doubled(self, x):
        return 2 * self(x)


class NNXNet(nnx.Module):
    """The same, with a tied layer and a plain array."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 8, rngs=rngs)])
        self.tied = self.layers[0]
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)
        self.scale = nnx.data(jnp.full(8, 2.0))

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.scale * self.norm(self.tied(x)))))


NET = Net()
VARIABLES = NET.init(jax.random.key(1), X)


def squared(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def trained(tree):
    """The names of the arrays that are trained."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array))
    return [jax.tree_util.keystr(path) for path, _ in leaves]


def assert_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# linen


@pytest.mark.parametrize("container", [dict, freeze], ids=["dict", "FrozenDict"])
def test_linen_round_trip(container):
    """Also through `jit`, and with arrays of other types among those that are not trained."""
    variables = container(
        {**VARIABLES, "cache": {f"{t}": jnp.ones(3).astype(t) for t in ("bfloat16", "int32", "bool", "complex64")}}
    )
    model = from_linen(NET, variables)
    assert_equal(model.variables, variables)
    passed = eqx.filter_jit(lambda m: m)(model)
    assert_equal(passed.variables, variables)
    assert trained(passed) == trained(model)
    assert len(trained(model)) == len(jax.tree.leaves(VARIABLES["params"])) == 6
    assert jax.tree.structure(model) == jax.tree.structure(from_linen(Net(), variables))


def test_linen_calls():
    model = from_linen(NET, VARIABLES)
    np.testing.assert_allclose(model(X), NET.apply(VARIABLES, X), rtol=1e-6)
    np.testing.assert_allclose(model(X, method="doubled"), 2 * model(X), rtol=1e-6)
    np.testing.assert_allclose(from_linen(NET, VARIABLES, method=Net.doubled)(X), 2 * model(X), rtol=1e-6)
    options = {"train": True, "rngs": {"dropout": jax.random.key(2)}}
    out, updates = from_linen(NET, VARIABLES, mutable=["batch_stats"])(X, **options)
    wanted, wanted_updates = NET.apply(VARIABLES, X, mutable=["batch_stats"], **options)
    np.testing.assert_allclose(out, wanted, rtol=1e-6)
    assert_equal(updates, wanted_updates)
    new = model.with_updates(updates)
    assert_equal(new.variables, {**VARIABLES, **updates})
    assert trained(new) == trained(model)


def test_linen_parameters_of_numpy_are_trained():
    model = from_linen(NET, jax.tree.map(np.asarray, VARIABLES))
    assert len(trained(model)) == 6
    assert_equal(model.variables, VARIABLES)


def test_linen_vmap_over_an_ensemble():
    keys = jax.random.split(jax.random.key(0), 3)
    variables = jax.vmap(lambda key: NET.init(key, X))(keys)
    outs = eqx.filter_vmap(lambda model, x: model(x), in_axes=(eqx.if_array(0), None))(from_linen(NET, variables), X)
    for i in range(3):
        wanted = NET.apply(jax.tree.map(lambda v: v[i], variables), X)
        np.testing.assert_allclose(outs[i], wanted, rtol=1e-4, atol=1e-5)


def stochastic(model, x, y, key):
    out, updates = model(x, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    return jnp.mean((out - y) ** 2), updates


def test_linen_statistics_are_carried_and_not_trained():
    model = from_linen(NET, VARIABLES)
    key = jax.random.key(3)
    (value, updates), moved = eqxproj.filter_value_and_displacement(
        stochastic, has_aux=True, metric=eqxproj.Metric(1e6, 1e6), tau=1e-4
    )(model, X, Y, key=key)
    (wanted, wanted_updates), gradient = eqx.filter_value_and_grad(stochastic, has_aux=True)(model, X, Y, key=key)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted_updates)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    result = eqxproj.train(model, (X, Y), stochastic, steps=5, has_aux=True, optimizer=optimizer)
    assert_equal(result.model.variables["batch_stats"], VARIABLES["batch_stats"])
    before, after = (jax.tree.leaves(v["params"]) for v in (VARIABLES, result.model.variables))
    assert any(np.any(a != b) for a, b in zip(before, after))
    assert jax.tree.structure(result.model.variables) == jax.tree.structure(VARIABLES)


def test_linen_constraints_reach_the_parameters():
    model = from_linen(NET, VARIABLES)
    constraints = [(lambda m: m.params["Dense_0"]["kernel"], eqxproj.sets.NonNegative())]
    result = eqxproj.train(model, (X, Y), squared, steps=3, constraints=constraints)
    assert result.model.variables["params"]["Dense_0"]["kernel"].min() >= 0


class Classifier(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(10)(linen.relu(linen.Dense(64)(x)))


def nnx_classifier(module):
    rngs = nnx.Rngs(0)
    return from_nnx(nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs)))


def linen_classifier(module):
    return from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 64))))


@pytest.mark.parametrize("make", [linen_classifier, nnx_classifier])
def test_trains_on_digits(make):
    data = eqxproj.datasets.load("digits").flatten()
    result = eqxproj.train(
        make(Classifier()),
        data.train,
        lambda model, x, y: jnp.mean(cross_entropy(model(x), y)),
        steps=300,
        batch_size=128,
        eval_data=data.test,
        evaluate={"accuracy": lambda model, x, y: jnp.mean(jnp.argmax(model(x), -1) == y)},
    )
    assert result.history["eval_accuracy"][-1] >= 0.93


# nnx


def test_nnx_round_trip():
    module = NNXNet(nnx.Rngs(0))
    model = from_nnx(module)
    assert len(trained(model)) == 6  # the tied layer once, and neither statistics nor the plain array
    passed = eqx.filter_jit(lambda m: m)(model)
    assert trained(passed) == trained(model)
    back = passed.to_nnx()
    assert back.tied is back.layers[0]
    assert_equal(nnx.to_pure_dict(nnx.state(back, nnx.Param)), nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    assert type(back.norm.mean) is nnx.BatchStat
    module.eval(), back.eval()
    np.testing.assert_allclose(from_nnx(module)(X), module(X), rtol=1e-5)
    np.testing.assert_allclose(back(X), module(X), rtol=1e-5)


def test_nnx_calls_do_not_change_the_model():
    model = from_nnx(NNXNet(nnx.Rngs(0)))
    out, updates = eqx.filter_jit(lambda m, x: m(x, mutable=True))(model, X)
    np.testing.assert_allclose(out, model(X), rtol=1e-4, atol=1e-5)
    new = model.with_updates(updates)
    assert np.any(new.to_nnx().norm.mean[...] != model.to_nnx().norm.mean[...])
    assert np.any(new(X) != out)  # the next mask of dropout
    assert trained(new) == trained(model)


def reseeded(model, x, y, key):
    module = model.to_nnx()
    nnx.reseed(module, default=key)
    return jnp.mean((module(x) - y) ** 2)


def test_nnx_trains_parameters_alone_and_updates_in_place():
    module = NNXNet(nnx.Rngs(0))
    statistics = module.norm.var[...]
    model = from_nnx(module)
    result = eqxproj.train(model, (X, Y), reseeded, steps=5, optimizer=optax.adamw(1e-2, weight_decay=0.1))
    kernel, count = module.last.kernel, module.dropout.rngs.count[...]
    assert np.any(kernel[...] != result.model.params["last"]["kernel"])
    result.model.update(module)
    assert module.last.kernel is kernel
    np.testing.assert_array_equal(kernel[...], result.model.params["last"]["kernel"])
    np.testing.assert_array_equal(module.norm.var[...], statistics)
    np.testing.assert_array_equal(module.scale, jnp.full(8, 2.0))
    np.testing.assert_array_equal(module.dropout.rngs.count[...], count)


def test_nnx_statistics_as_auxiliary_output():
    def loss(model, x, y):
        out, updates = model(x, mutable=True)
        return jnp.mean((out - y) ** 2), updates

    model = from_nnx(NNXNet(nnx.Rngs(0)))
    (value, updates), _ = eqxproj.filter_value_and_displacement(loss, has_aux=True)(model, X, Y)
    np.testing.assert_allclose(value, loss(model, X, Y)[0], rtol=1e-5)
    assert np.any(model.with_updates(updates).to_nnx().norm.mean[...] != 0)
    result = eqxproj.train(model, (X, Y), loss, steps=3, has_aux=True)
    assert not np.any(result.model.to_nnx().norm.mean[...])


# an nnx module as it is


def nnx_loss(module, x, y):
    return jnp.mean((module(x) - y) ** 2)


def nnx_loss_with_mean(module, x, y):
    return nnx_loss(module, x, y), module.norm.mean[...] * 1


def assert_close(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("full_precision")
def test_displacement_of_a_module_is_that_of_nnx_grad():
    """Also what it does to running statistics and counts of random numbers, call after call, and in `nnx.jit`."""
    ours, theirs = NNXNet(nnx.Rngs(0)), NNXNet(nnx.Rngs(0))
    plain = eqxproj.filter_value_and_displacement(nnx_loss)
    step = nnx.jit(eqxproj.filter_value_and_displacement(nnx_loss_with_mean, has_aux=True))
    for module, grad, with_aux in (
        (ours, plain, step),
        (theirs, nnx.value_and_grad(nnx_loss), nnx.value_and_grad(nnx_loss_with_mean, has_aux=True)),
    ):
        for _ in range(2):
            value, moved = grad(module, X, Y)
            nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param).update(module, moved)
        (value, mean), moved = with_aux(module, X, Y)
        module.seen = nnx.data([value, mean, moved])
    assert ours.dropout.rngs.count[...] == 3
    assert_close(nnx.state(ours), nnx.state(theirs))
    only = eqxproj.filter_displacement(nnx_loss)(ours, X, Y)
    assert_close(only, nnx.grad(nnx_loss)(theirs, X, Y))
    assert type(only["last"]["kernel"]) is nnx.Param


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_train_a_module(method):
    module = NNXNet(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(module))

    def error(module, x, y):
        module.eval()
        return jnp.mean((module(x) - y) ** 2)

    options = {"optimizer": optax.adam(1e-2), "eval_data": (X, Y), "evaluate": {"error": error}, "method": method}
    result = eqxproj.train(module, (X, Y), nnx_loss, steps=40, batch_size=8, **options)
    assert type(result.model) is NNXNet and result.model.tied is result.model.layers[0]
    assert result.model.dropout.rngs.count[...] == 40
    assert np.any(result.model.norm.mean[...] != 0)
    assert result.history["eval_error"][-1] < 0.5 * result.history["eval_error"][0]
    np.testing.assert_allclose(error(result.model, X, Y), result.history["eval_error"][-1], rtol=1e-4)
    assert_close(nnx.state(module), before)


def test_train_a_module_with_constraints_and_a_key():
    def loss(module, x, y, key):
        nnx.reseed(module, default=key)
        return nnx_loss(module, x, y), "dropped"

    module, half = NNXNet(nnx.Rngs(0)), eqxproj.sets.Sparse(0.5)
    pairs = [(lambda m: m.last.kernel, half), (lambda m: [m.tied.kernel[...]], half)]
    result = eqxproj.train(module, (X, Y), loss, steps=3, has_aux=True, constraints=pairs)
    for kernel in (result.model.last.kernel, result.model.tied.kernel):
        assert np.mean(kernel[...] == 0) == 0.5


def test_errors_of_a_module():
    module = NNXNet(nnx.Rngs(0))
    with pytest.raises(TypeError, match="NNXNet, an nnx module.*from_nnx"):
        eqxproj.feasibility_problem(nnx_loss, module, X, Y)
    with pytest.raises(eqxproj.NonFiniteError) as error:
        eqxproj.train(module, (X, Y), nnx_loss, steps=3, optimizer=optax.sgd(1e30))
    assert type(error.value.model) is NNXNet


# errors


def bad(*parts):
    return pytest.raises((TypeError, ValueError), match=".*".join(parts))


def test_errors_of_linen():
    with bad("`module`", "the class Net: make an instance"):
        from_linen(Net, VARIABLES)
    with bad("`module`", "Linear, a `flax.nnx.Module`: use", "from_nnx"):
        from_linen(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), VARIABLES)
    with bad("`module`", "Linear, an Equinox module"):
        from_linen(eqx.nn.Linear(2, 3, key=jax.random.key(0)), VARIABLES)
    with bad("`variables` must be the dictionary", "got tuple"):
        from_linen(NET, (X, VARIABLES))
    with bad("`variables`", "'params'", "'Dense_0'", "pass `{'params': variables}`"):
        from_linen(NET, VARIABLES["params"])
    with bad("`method`", "got 3"):
        from_linen(NET, VARIABLES, method=3)
    model = from_linen(NET, VARIABLES)
    for mutable in (1, [1]):
        with bad("`mutable`", "got "):
            from_linen(NET, VARIABLES, mutable=mutable)
        with bad("`mutable`", "got "):
            model(X, mutable=mutable)
    with bad("`updates` must be a mapping", "got tuple"):
        model.with_updates((X, VARIABLES))
    with bad("`updates` must hold no parameters"):
        model.with_updates(VARIABLES)


def test_errors_of_nnx():
    with bad("`module`", "Net, a `flax.linen.Module`: use", "from_linen"):
        from_nnx(NET)
    with bad("`module`", "got dict"):
        from_nnx({})
    with bad("`module`", "`nnx.Param`", "Dropout has none"):
        from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    model = from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with bad("`module` must have the variables", r"float32\[4\]", r"float32\[3\]"):
        model.update(nnx.Linear(2, 4, rngs=nnx.Rngs(0)))
    with bad("`module`", "got dict"):
        model.update({})
    with bad("`mutable`", "got 'batch_stats'"):
        model(X[:, :2], mutable="batch_stats")
    with bad("`updates`", "got float", "where nothing is wanted"):
        model.with_updates({"mean": 1.0})
    with bad("`updates`", "got int"):
        model.with_updates(3)


def test_flax_is_imported_only_on_demand():
    code = "import sys, eqxproj; assert not any(name.split('.')[0] == 'flax' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_flax(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    spec = importlib.util.spec_from_file_location("eqxproj_flax_without_flax", eqxproj.flax.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"pip install 'eqxproj\[flax\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
