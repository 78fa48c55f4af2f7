"""Activations of `jax.nn`, a user's own elementwise functions, and functions of `jax.numpy` and `jax.lax`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jax.scipy import special, stats

from ._row import Row, around

ACTIVATIONS = {
    "relu": nn.relu,
    "relu6": lambda x: nn.relu6(4 * x),
    "gelu": nn.gelu,
    "gelu (exact)": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
    "softmax": nn.softmax,
    "log_softmax": nn.log_softmax,
    "sigmoid": nn.sigmoid,
    "log_sigmoid": nn.log_sigmoid,
    "soft_sign": nn.soft_sign,
    "softplus": nn.softplus,
    "sparse_plus": nn.sparse_plus,
    "sparse_sigmoid": nn.sparse_sigmoid,
    "squareplus": nn.squareplus,
    "tanh": nn.tanh,
    "elu": nn.elu,
    "selu": nn.selu,
    "celu": nn.celu,
    "leaky_relu": nn.leaky_relu,
    "hard_tanh": nn.hard_tanh,
    "hard_sigmoid": lambda x: nn.hard_sigmoid(3 * x),
    "hard_silu": lambda x: nn.hard_silu(3 * x),
    "glu": nn.glu,
    "mish": nn.mish,
    "identity": nn.identity,
    "logsumexp": lambda x: nn.logsumexp(x.reshape(2, 4), axis=1),
    "logmeanexp": lambda x: nn.logmeanexp(x.reshape(2, 4), axis=1),
    "log1mexp": lambda x: nn.log1mexp(0.1 + nn.softplus(x)),
    "standardize": nn.standardize,
    "dot_product_attention": lambda x: jnp.tanh(_attention(x)),
}


def _attention(x):
    x = x.reshape(1, 4, 1, 2)
    return nn.dot_product_attention(x, jnp.flip(x, 1), x)


OWN = {
    "where: leaky": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "where: shrinkage": lambda x: jnp.where(jnp.abs(x) > 0.3, x - 0.3 * jnp.sign(x), 0.0),
    "where: tanh or a line": lambda x: jnp.where(x < 0, jnp.tanh(x), 0.5 * x),
    "where: a safe square root": lambda x: jnp.where(x > 0.04, jnp.sqrt(jnp.maximum(x, 0.04)), 0.1 + 2.5 * x),
    "where: square below, line above": lambda x: jnp.where(x < 1, 0.5 * x**2, x - 0.5),
    "snake": lambda x: x + jnp.sin(x) ** 2,
    "gaussian": lambda x: jnp.exp(-(x**2)),
    "squared relu": lambda x: nn.relu(x) ** 2,
    "rational": lambda x: x / (1 + x**2),
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "swish with a slope": lambda x: x * nn.sigmoid(1.7 * x),
    "select of three": lambda x: jnp.select([x < -0.5, x > 0.5], [-0.5 + 0.1 * x, 0.5 + 0.2 * x], x),
    "piecewise": lambda x: jnp.piecewise(x, [x < 0, x >= 0], [lambda v: -0.2 * v, lambda v: v**2]),
}

KNOWN = np.linspace(-1.0, 1.0, 8, dtype=np.float32)
INDEX = np.array([3, 0, 0, 5, 7])
MATRIX = np.sin(np.arange(16.0, dtype=np.float32)).reshape(4, 4)

FUNCTIONS = {
    "sin": jnp.sin,
    "cos": jnp.cos,
    "arctan": jnp.arctan,
    "erf": lax.erf,
    "exp": lambda x: jnp.exp(0.5 * x),
    "log1p": lambda x: jnp.log1p(x**2),
    "sqrt": lambda x: jnp.sqrt(1 + x**2),
    "rsqrt": lambda x: lax.rsqrt(1 + x**2),
    "power": lambda x: (1 + nn.softplus(x)) ** 1.5,
    "power of unknowns": lambda x: (1 + nn.softplus(x[:4])) ** x[4:],
    "abs": jnp.abs,
    "arctan2": lambda x: jnp.arctan2(x[:4], 2 + jnp.abs(x[4:])),
    "hypot": lambda x: jnp.hypot(1 + nn.softplus(x[:4]), x[4:]),
    "maximum of unknowns": lambda x: jnp.maximum(x[:4], x[4:]),
    "minimum with a known array": lambda x: jnp.minimum(x, KNOWN),
    "product of unknowns": lambda x: x[:4] * x[4:],
    "quotient of unknowns": lambda x: x[:4] / (1 + nn.softplus(x[4:])),
    "reciprocal": lambda x: 1 / (1 + nn.softplus(x)),
    "sum": lambda x: jnp.tanh(x.reshape(2, 4).sum(0)),
    "mean": lambda x: jnp.tanh(jnp.mean(x.reshape(2, 4), 0)),
    "prod": lambda x: jnp.prod(x.reshape(2, 4), 0),
    "var": lambda x: jnp.var(x.reshape(4, 2), 0),
    "std": lambda x: jnp.std(x.reshape(2, 4), 1),
    "max": lambda x: jnp.max(x.reshape(4, 2), 1),
    "min": lambda x: jnp.min(x.reshape(4, 2), 1),
    "norm": lambda x: x / jnp.linalg.norm(x),
    "scipy logsumexp": lambda x: jax.scipy.special.logsumexp(x.reshape(2, 4), axis=0),
    "cumsum": lambda x: jnp.tanh(jnp.cumsum(x)),
    "cumprod": lambda x: jnp.cumprod(1 + 0.3 * jnp.tanh(x)),
    "cummax": lax.cummax,
    "cumlogsumexp": lax.cumlogsumexp,
    "associative_scan": lambda x: lax.associative_scan(jnp.add, jnp.tanh(x)),
    "sort": jnp.sort,
    "median": lambda x: jnp.tanh(jnp.median(x.reshape(2, 4), axis=1)),
    "top_k": lambda x: lax.top_k(x, 3)[0],
    "slice": lambda x: jnp.tanh(x[1:7:2]),
    "dynamic_slice": lambda x: jnp.tanh(lax.dynamic_slice(x, (2,), (4,))),
    "dynamic_update_slice": lambda x: jnp.tanh(lax.dynamic_update_slice(x, x[:3] * x[3:6], (4,))),
    "at set": lambda x: jnp.tanh(x.at[INDEX[1:3]].set(x[6:] ** 2)),
    "at set with a number": lambda x: jnp.tanh(x.at[np.array([1, 4])].set(0.5)),
    "at add": lambda x: jnp.tanh(x.at[INDEX].add(x[:5])),
    "at add to zeros": lambda x: jnp.tanh(jnp.zeros(4).at[np.array([0, 1, 2, 3, 0, 1, 2, 2])].add(x)),
    "at multiply": lambda x: x.at[np.array([0, 2])].multiply(2.0),
    "segment_sum": lambda x: jnp.tanh(jax.ops.segment_sum(x, np.array([0, 0, 1, 1, 1, 2, 2, 0]), 3)),
    "gather": lambda x: jnp.tanh(x[INDEX]),
    "take_along_axis": lambda x: jnp.tanh(jnp.take_along_axis(x.reshape(2, 4), np.array([[3, 0], [1, 1]]), 1)),
    "pad": lambda x: jnp.tanh(jnp.pad(x, 2)),
    "pad (edge)": lambda x: jnp.tanh(jnp.pad(x, 2, mode="edge")),
    "flip": lambda x: jnp.tanh(x) * jnp.flip(x),
    "tile": lambda x: jnp.tanh(jnp.tile(x, 2)),
    "repeat": lambda x: jnp.tanh(jnp.repeat(x, 2)),
    "split": lambda x: jnp.tanh(jnp.split(x, 2)[0]) + jnp.split(x, 2)[1],
    "concatenate": lambda x: jnp.tanh(jnp.concatenate([x[4:], x, x[:2]])),
    "stack": lambda x: jnp.tanh(jnp.stack([x, 2 * x, KNOWN])),
    "roll": lambda x: jnp.tanh(x) + jnp.roll(x, 3),
    "transpose": lambda x: jnp.tanh(x.reshape(2, 4).T),
    "diag and trace": lambda x: jnp.tanh(jnp.diagonal(x.reshape(2, 2, 2)) + jnp.trace(x.reshape(2, 2, 2))[:, None]),
    "tril": lambda x: jnp.tanh(jnp.tril(jnp.outer(x[:4], x[4:]))),
    "einsum": lambda x: jnp.tanh(jnp.einsum("ij,jk->ik", x.reshape(2, 4), MATRIX)),
    "einsum of unknowns": lambda x: jnp.einsum("ij,ik->jk", x.reshape(2, 4), x.reshape(2, 4)),
    "matmul of unknowns": lambda x: x.reshape(2, 4) @ x.reshape(4, 2),
    "outer": lambda x: jnp.outer(x[:4], x[4:]),
    "convolve": lambda x: jnp.tanh(jnp.convolve(x, KNOWN[:3])),
    "interp": lambda x: jnp.interp(jnp.tanh(x), np.linspace(-1, 1, 5), np.array([0.0, 1.0, -1.0, 0.5, 2.0])),
    "fft": lambda x: jnp.abs(jnp.fft.rfft(x)) ** 2,
    "vmap": lambda x: jax.vmap(lambda v: jnp.tanh(v) * v.sum())(x.reshape(2, 4)),
    "vmap of a matrix": lambda x: jax.vmap(jnp.dot, (1, 0))(x.reshape(4, 2), x.reshape(2, 4)),
    "jit": jax.jit(lambda x: jnp.tanh(x) + 1),
    "polyval": lambda x: jnp.polyval(np.array([0.5, -1.0, 0.3]), x),
    "cross": lambda x: jnp.cross(x[:3], x[3:6]),
    "scale by a known array": lambda x: jnp.tanh(x * KNOWN + KNOWN),
    "stop_gradient": lambda x: x * lax.stop_gradient(nn.sigmoid(x)),
    "where on data-free mask": lambda x: jnp.where(KNOWN > 0, x, jnp.sin(x)),
    "square": lambda x: jnp.square(x),
    "cube": lambda x: x**3,
    "expm1": lambda x: jnp.expm1(0.5 * x),
    "sinh and cosh": lambda x: jnp.sinh(x[:4]) + jnp.cosh(x[4:]),
    "logaddexp": lambda x: jnp.logaddexp(x[:4], x[4:]),
    "sinc": lambda x: jnp.sinc(x + 2.5),
    "softmax of rows": lambda x: nn.softmax(x.reshape(2, 4), axis=0),
}


def _unit(x):
    return 0.05 + 0.9 * nn.sigmoid(x)


def _positive(x):
    return 0.1 + nn.softplus(x)


SPECIAL = {
    "ndtri": lambda x: special.ndtri(_unit(x)),
    "ndtr": special.ndtr,
    "log_ndtr": special.log_ndtr,
    "erfinv": lambda x: special.erfinv(_unit(x)),
    "logit": lambda x: special.logit(_unit(x)),
    "entr": lambda x: special.entr(_positive(x)),
    "xlogy": lambda x: special.xlogy(_positive(x[:4]), _positive(x[4:])),
    "gamma": lambda x: special.gamma(1 + nn.softplus(x)),
    "gammaln": lambda x: special.gammaln(_positive(x)),
    "digamma": lambda x: special.digamma(1 + nn.softplus(x)),
    "gammainc": lambda x: special.gammainc(2.0, _positive(x)),
    "betaln": lambda x: special.betaln(_positive(x[:4]), _positive(x[4:])),
    "betainc": lambda x: special.betainc(2.0, 3.0, _unit(x)),
    "zeta": lambda x: special.zeta(2.0, _positive(x)),
    "exp1": lambda x: special.exp1(_positive(x)),
    "i0": special.i0,
    "i1e": special.i1e,
    "stats.norm": lambda x: stats.norm.logpdf(x[:4], 0.3, _positive(x[4:])),
    "stats.norm.ppf": lambda x: stats.norm.ppf(_unit(x)),
    "stats.t": lambda x: stats.t.logpdf(x, 3.0),
    "stats.gamma": lambda x: stats.gamma.logpdf(_positive(x[:4]), _positive(x[4:])),
    "stats.beta": lambda x: stats.beta.logpdf(0.3, _positive(x[:4]), _positive(x[4:])),
    "stats.betabinom": lambda x: stats.betabinom.logpmf(2, 5, 1 + nn.softplus(x), 2.0),
    "stats.truncnorm": lambda x: stats.truncnorm.logpdf(0.3, -1 - nn.softplus(x), 1.0),
    "stats.poisson": lambda x: stats.poisson.logpmf(2, _positive(x)),
    "stats.vonmises": lambda x: stats.vonmises.logpdf(x[:4], _positive(x[4:])),
    "a guarded quotient": lambda x: jnp.where(x == -6, 1.0, 1 / (6 + jnp.where(x == -6, 0.0, x))),
}


def rows(group, functions):
    return [Row(name, group, lambda key, f=f: around(key, f)) for name, f in functions.items()]


ROWS = [*rows("activations", ACTIVATIONS), *rows("own functions", OWN), *rows("functions", FUNCTIONS)]
ROWS += rows("special functions and densities", SPECIAL)
