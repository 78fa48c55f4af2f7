"""What a row of the coverage table is, and the few losses and data sets that rows share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr


@dataclass(frozen=True)
class Case:
    """A model, its whole training set (a tuple with the samples along the first axes), and the loss of both."""

    model: Any
    data: tuple[Any, ...]
    loss: Callable[..., Any]
    frozen: Callable[..., Any] | None = None
    """For discrete rows: the same loss with the inputs of the discrete step stopped by `jax.lax.stop_gradient`."""
    has_aux: bool = False


@dataclass(frozen=True)
class Row:
    """One model or function that is covered.

    - `name`, `group`: the row's and its table's name.
    - `make`: makes the case from a key; small, so that its problem compiles in seconds.
    - `kind`: `"smooth"` rows are compared with the gradient, `"discrete"` ones with freezing the step's inputs.
    - `cosine`: the least cosine with the gradient, for every parameter.
    - `steps`, `rate`: of training by Adam, when it is tested that the row learns; `None` takes the default of `train`.
    """

    name: str
    group: str
    make: Callable[[jax.Array], Case]
    kind: Literal["smooth", "discrete"] = "smooth"
    cosine: float = 0.999
    steps: int = 200
    rate: float | None = None


def regression(key: jax.Array, shape: tuple[int, ...], outputs: int = 3, samples: int = 32):
    """Inputs of a shape and targets that are a fixed nonlinear function of them."""
    k1, k2 = jr.split(key)
    x = jr.normal(k1, (samples, *shape))
    weight = jr.normal(k2, (x[0].size, outputs)) / x[0].size ** 0.5
    return x, jnp.tanh(x.reshape(samples, -1) @ weight)


def squared(model: Any, x: Any, y: Any) -> jax.Array:
    """The mean squared error of a model of one sample."""
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


class Around(eqx.Module):
    """A linear layer, the layer or function under test, and a linear layer after it."""

    first: eqx.Module | None
    middle: Any
    last: eqx.nn.Linear

    def __call__(self, x):
        h = x if self.first is None else self.first(x)  # pyright: ignore[reportCallIssue]
        return self.last(jnp.ravel(self.middle(h)))


def around(key: jax.Array, middle: Callable[..., Any], width: int = 8, outputs: int = 3, inputs: int = 5) -> Case:
    """A regression with `middle`, which maps a vector of `width` entries to an array, between two linear layers."""
    k1, k2, k3 = jr.split(key, 3)
    size = jax.eval_shape(middle, jax.ShapeDtypeStruct((width,), jnp.float32)).size
    model = Around(eqx.nn.Linear(inputs, width, key=k1), middle, eqx.nn.Linear(size, outputs, key=k2))
    return Case(model, regression(k3, (inputs,), outputs), squared)


def between(
    key: jax.Array, first: Any, middle: Any, shape: tuple[int, ...], outputs: int = 3, samples: int = 16
) -> Case:
    """A regression with `middle` after the layer `first`, which maps inputs of `shape`, and a linear layer after it."""
    k1, k2 = jr.split(key)
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    out = eqx.filter_eval_shape(lambda x: middle(x if first is None else first(x)), like)
    model = Around(first, middle, eqx.nn.Linear(out.size, outputs, key=k1))
    return Case(model, regression(k2, shape, outputs, samples), squared)


def extra(case: Case) -> dict[str, jax.Array]:
    """The keyword arguments of a case's loss: a PRNG key, where it takes one."""
    return {"key": jr.key(7)} if "key" in inspect.signature(case.loss).parameters else {}
