"""What the tests of custom and of registered projections share: arrays, a problem to learn, a measure."""

import jax
import jax.numpy as jnp
import numpy as np

import eqxproj

STEEP = eqxproj.Metric(grade=1e6, parameter=1e6)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, Y = random(0, 4, 3), random(1, 4, 3)


def cosine(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree_util.tree_leaves(t)]).astype(float) for t in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def classification():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 4)).astype(np.float32)
    y = ((x[:, :2] ** 2).sum(1) > 1.4).astype(np.int32)
    model = {"a": random(1, 4, 16), "b": jnp.zeros(16), "d": 0.3 * random(2, 16, 2), "e": jnp.zeros(2)}
    return model, x, y
