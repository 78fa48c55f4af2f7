"""What type checkers infer of a result: this file is checked, not run."""

from typing import Any, assert_type

import equinox as eqx
import jax

import eqxproj


def loss(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    return eqxproj.losses.cross_entropy(jax.vmap(model)(x), y).mean()


def use(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> None:
    result = eqxproj.train(model, (x, y), loss, steps=3)
    assert_type(result, eqxproj.TrainResult[eqx.nn.MLP])
    assert_type(result.model, eqx.nn.MLP)
    assert_type(result.history, dict[str, Any])
    assert_type(result.state, eqxproj.TrainingState)
    again = eqxproj.train(result.model, (x, y), loss, steps=6, resume=result.state)
    assert_type(again.model.width_size, int)
