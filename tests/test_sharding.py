"""Training on several devices and in several processes gives what one device does, within rounding."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

import eqxproj

COMMON = """
import sys
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import eqxproj

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 8)).astype(np.float32)
y = (x[:, 0] > 0).astype(np.int32)
model = eqx.nn.MLP(8, 2, 16, 1, key=jax.random.key(0))


def loss(model, x, y):
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def same(a, b, atol=1e-5):
    pairs = zip(jax.tree.leaves(eqx.filter(a, eqx.is_array)), jax.tree.leaves(eqx.filter(b, eqx.is_array)), strict=True)
    for p, q in pairs:
        np.testing.assert_allclose(np.asarray(p), np.asarray(q), rtol=1e-4, atol=atol)


options = {"steps": 6, "eval_every": 3, "eval_data": (x, y)}
"""

JOIN = """
import sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
"""

DEVICES = """
for method in ("projection", "gradient"):
    wanted = eqxproj.train(model, (x, y), loss, batch_size=16, method=method, **options)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        sharding = NamedSharding(mesh, P("data"))
        found = eqxproj.train(model, (x, y), loss, batch_size=16, sharding=sharding, method=method, **options)
        same(found.model, wanted.model)
        np.testing.assert_allclose(found.history["eval_loss"], wanted.history["eval_loss"], rtol=1e-4)
        assert len(found.state.arrays.parameters.layers[0].weight.sharding.device_set) == 4

        # Parameters that the user divided stay so, with the moments of the optimizer.
        where = lambda m: m.layers[0].weight
        put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, P(*axes))) if eqx.is_array(a) else a
        divided = jax.tree.map(put, model)
        divided = eqx.tree_at(where, divided, put(where(divided), "data"))
        found = eqxproj.train(divided, (x, y), loss, batch_size=16, sharding=sharding, method=method, **options)
        same(found.model, wanted.model)
        assert where(found.model).sharding == where(divided).sharding
        moments = [s for s in jax.tree.leaves(found.state.optimizer_state) if s.shape == (16, 8)]
        assert moments and all(s.sharding.spec[0] == "data" for s in moments), [s.sharding for s in moments]

    half = eqxproj.train(
        model, (x, y), loss, batch_size=16, sharding=sharding, method=method, callbacks=[lambda s, r: s == 3],
        checkpoint=sys.argv[1] + method, **options,
    )
    again = eqxproj.train(
        model, (x, y), loss, batch_size=16, sharding=sharding, method=method, resume=sys.argv[1] + method, **options
    )
    same(again.model, wanted.model)

for bad in (jax.devices()[0], 4):
    try:
        eqxproj.train(model, (x, y), loss, sharding=bad, steps=1)
    except TypeError as error:
        assert "`sharding` must be a `jax.sharding.NamedSharding`" in str(error)
    else:
        raise AssertionError("it must be refused")
print("all")
"""

PROCESSES = """
number, folder = int(sys.argv[2]), sys.argv[3]
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P("data"))

# All samples in each batch: the order in which each process goes through its part makes no difference.
part = slice(32 * number, 32 * number + 32)
found = eqxproj.train(
    model, (x[part], y[part]), loss, batch_size=64, sharding=sharding, checkpoint=folder, checkpoint_every=2, **options
)
again = eqxproj.train(
    model, (x[part], y[part]), loss, batch_size=64, sharding=sharding, resume=folder, **options
)
same(again.model, found.model)
if number == 0:
    np.savez(folder + ".npz", *[np.asarray(a) for a in jax.tree.leaves(eqx.filter(found.model, eqx.is_array))])
print("all")
"""

WHOLE = """
found = eqxproj.train(model, (x, y), loss, batch_size=64, **options)
stored = np.load(sys.argv[1] + ".npz")
for a, name in zip(jax.tree.leaves(eqx.filter(found.model, eqx.is_array)), stored.files, strict=True):
    np.testing.assert_allclose(np.asarray(a), stored[name], rtol=1e-4, atol=1e-5)
print("all")
"""

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(eqxproj.__file__).parent.parent)}


def start(code, *args, devices=1):
    env = {**ENVIRONMENT, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def end(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0 and out.strip().endswith("all"), err[-3000:]


@pytest.mark.slow
def test_four_devices(tmp_path):
    end(start(COMMON + DEVICES, tmp_path / "run-", devices=4))


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [start(JOIN + COMMON + PROCESSES, port, number, tmp_path / "run") for number in (0, 1)]
    try:
        for process in both:
            end(process)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    end(start(COMMON + WHOLE, tmp_path / "run"))


GATHERED = """
import re
import eqxproj._training._step as module

where = lambda m: m.layers[1].weight
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P("data"))
model = eqx.nn.MLP(8, 4, 32, 2, key=jax.random.key(0))
put = lambda a: jax.device_put(a, sharding) if eqx.is_array(a) and a.ndim == 2 else a
divided = jax.tree.map(put, model)
weights = {tuple(layer.weight.shape) for layer in model.layers}
real, texts = module.lowered, []


def watched(*args, **kwargs):
    low = real(*args, **kwargs)
    texts.append(low.compile().as_text())
    return low


module.lowered = watched
for method in ("gradient", "projection"):
    eqxproj.train(divided, (x, y), loss, batch_size=16, sharding=sharding, method=method, steps=2)
    found = re.findall(r"= \\w+\\[([\\d,]+)\\][^ ]* all-gather\\(", texts[-1])
    shapes = {tuple(map(int, s.split(","))) for s in found}
    print(method, sorted(shapes))
    assert shapes and not any({s, s[::-1]} & weights for s in shapes), shapes
assert len(texts) == 2
print("all")
"""


@pytest.mark.slow
def test_no_weight_is_gathered():
    """Of parameters that are divided, no device gets the whole: only activations of the batch are exchanged."""
    end(start(COMMON + GATHERED, devices=4))


TENSOR_PARALLEL = """
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
sharding = NamedSharding(mesh, P("data"))
first, second = (lambda m, i=i: m.layers[i].weight for i in (0, 1))
put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, P(*axes)))
divided = eqx.tree_at(first, model, put(first(model), "model", None))
divided = eqx.tree_at(second, divided, put(second(divided), None, "model"))
for method in ("projection", "gradient"):
    wanted = eqxproj.train(model, (x, y), loss, batch_size=16, method=method, **options)
    found = eqxproj.train(divided, (x, y), loss, batch_size=16, method=method, sharding=sharding, **options)
    same(found.model, wanted.model)
    for where in (first, second):
        assert where(found.model).sharding == where(divided).sharding
print("all")
"""


@pytest.mark.slow
def test_data_and_tensor_parallel_together():
    end(start(COMMON + TENSOR_PARALLEL, devices=4))


DIVIDED = """
x, y = x[:16], y[:16]
gradient, trained = eqx.filter_grad(loss)(model, x, y), eqxproj.train(model, (x, y), loss, steps=2).model
for kind in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    on = lambda tree, *axes: jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, P(*axes))) if eqx.is_array(a) else a, tree
    )
    where = lambda m: m.layers[0].weight
    divided = eqx.tree_at(where, on(model), on(where(model), "d"))
    batch = on((x, y), "d")
    same(eqx.filter_jit(eqxproj.filter_displacement(loss))(on(model), *batch), gradient, 1e-6)
    moved = eqxproj.filter_displacement(loss)(divided, x, y)
    same(moved, gradient, 1e-6)
    assert where(moved).sharding.spec[0] == "d", where(moved).sharding
    result = eqxproj.train(divided, batch, loss, steps=2).model
    same(result, trained, 1e-6)
    assert where(result).sharding == where(divided).sharding
    problem = eqxproj.feasibility_problem(loss, divided, *batch)
    assert np.isfinite(eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=1).stats["change"]).all()
print("all")
"""


@pytest.mark.slow
def test_arrays_divided_among_devices():
    """Displacements, training and `solve`, without the argument `sharding`."""
    end(start(COMMON + DIVIDED, devices=4))
