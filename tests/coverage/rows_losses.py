"""Losses: those of optax, weighted sums of two, penalties, and auxiliary outputs."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

from ._row import Case, Row, regression

GROUP = "losses"


def mlp(loss, targets="real"):
    """A small MLP with `loss(outputs, targets)` of the whole batch, averaged."""

    def make(key):
        k1, k2 = jr.split(key)
        x, y = regression(k1, (5,))
        targets_ = {
            "real": y,
            "label": jnp.argmax(y, 1),
            "one hot": jax.nn.one_hot(jnp.argmax(y, 1), 3),
            "binary": (y > 0).astype(y.dtype),
            "sign": jnp.where(y > 0, 1.0, -1.0),
            "distribution": jax.nn.softmax(3 * y),
        }[targets]
        return Case(eqx.nn.MLP(5, 3, 8, 1, key=k2), (x, targets_), of_model)

    def of_model(model, x, y):
        return jnp.mean(loss(jax.vmap(model)(x), y))

    return make


def of_all(loss, targets="real", has_aux=False):
    """A small MLP with `loss(model, x, y)`."""

    def make(key):
        case = mlp(optax.l2_loss, targets)(key)
        return Case(case.model, case.data, loss, has_aux=has_aux)

    return make


def two_terms(model, x, y):
    out = jax.vmap(model)(x)
    labels = jnp.argmax(y, 1)
    ce = optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()
    return 0.7 * ce + 0.3 * optax.squared_error(out, y).mean()


def penalized(model, x, y):
    arrays = jax.tree_util.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    return optax.squared_error(jax.vmap(model)(x), y).mean() + 1e-2 * sum(jnp.sum(w**2) for w in arrays)


def lasso(model, x, y):
    return optax.squared_error(jax.vmap(model)(x), y).mean() + 1e-2 * jnp.sum(jnp.abs(model.layers[0].weight))


def with_aux(model, x, y):
    out = jax.vmap(model)(x)
    value = optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
    return value, {"logits": out, "accuracy": jnp.mean(jnp.argmax(out, 1) == y)}


def masked(model, x, y):
    keep = (x[:, 0] > -0.5).astype(x.dtype)
    ce = optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y)
    return jnp.sum(ce * keep) / jnp.sum(keep)


def log_likelihood(model, x, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(jax.vmap(model)(x)), y[:, None], axis=1))


def positive_l1(out, y):
    return jnp.abs(out - y).sum(-1)


MAKERS = {
    "softmax_cross_entropy_with_integer_labels": mlp(optax.softmax_cross_entropy_with_integer_labels, "label"),
    "softmax_cross_entropy": mlp(optax.softmax_cross_entropy, "one hot"),
    "safe_softmax_cross_entropy": mlp(optax.safe_softmax_cross_entropy, "one hot"),
    "sigmoid_binary_cross_entropy": mlp(optax.sigmoid_binary_cross_entropy, "binary"),
    "sigmoid_focal_loss": mlp(optax.losses.sigmoid_focal_loss, "binary"),
    "kl_divergence": mlp(lambda out, y: optax.kl_divergence(jax.nn.log_softmax(out), y), "distribution"),
    "l2_loss": mlp(optax.l2_loss),
    "squared_error": mlp(optax.squared_error),
    "huber_loss": mlp(lambda out, y: optax.huber_loss(out, y, delta=0.3)),
    "log_cosh": mlp(optax.log_cosh),
    "absolute error": mlp(positive_l1),
    "cosine_similarity": mlp(lambda out, y: -optax.cosine_similarity(out, y, epsilon=1e-6)),
    "cosine_distance": mlp(lambda out, y: optax.cosine_distance(out, y, epsilon=1e-6)),
    "hinge_loss": mlp(optax.hinge_loss, "sign"),
    "perceptron_loss": mlp(optax.losses.perceptron_loss, "sign"),
    "multiclass_hinge_loss": mlp(jax.vmap(optax.losses.multiclass_hinge_loss), "label"),
    "log-likelihood by take_along_axis": of_all(log_likelihood, "label"),
    "weighted sum of two losses": of_all(two_terms),
    "L2 penalty on all parameters": of_all(penalized),
    "L1 penalty on one parameter": of_all(lasso),
    "masked mean": of_all(masked, "label"),
    "auxiliary output": of_all(with_aux, "label", has_aux=True),
}

ROWS = [Row(name, GROUP, make) for name, make in MAKERS.items()]
