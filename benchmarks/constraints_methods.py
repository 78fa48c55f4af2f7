"""What `constraints.py` compares: the defaults of `eqxproj.train`, and what is done with gradients under constraints.

All run through `eqxproj.train`, so that they see the same initial parameters and batches. `defaults` has one rate;
`defaults, rate` is the same at the best of six, as the baselines have theirs. The baselines run with
`method="gradient"` and an optimizer of their own: Adam, whose rate rises to one of several peaks and falls with a
cosine. Some have a second setting beside the rate. They are

- `projected adam`: a projection onto the set after every step;
- `straight-through`: latent weights, the loss sees their projection, and the gradient is taken for that of the latent
  ones (Bengio, Leonard and Courville, 2013); projected at the end;
- `pruning`: magnitude pruning along a cubic schedule (Zhu and Gupta, *To prune, or not to prune*, 2017);
- `penalty`: $c |W W^T - I|^2$ beside the loss, and a projection at the end;
- `parametrised`: the constrained weights are a differentiable function of free ones, as in
  `torch.nn.utils.parametrize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxproj
from eqxproj import sets

Where = Callable[[Any], Sequence[jax.Array]]
Loss = Callable[..., Any]

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PENALTIES = (0.001, 0.01, 0.1, 1.0)


class Problem(NamedTuple):
    """What is trained: a loss, and the weights that are held in a set."""

    loss: Loss
    where: Where
    chosen: sets.AbstractSet


class Setting(NamedTuple):
    """One way to train: from a problem and the number of steps to a `Plan`."""

    name: str
    plan: Callable[[Problem, int], Plan]


def _same(model):
    return model


class Plan(NamedTuple):
    """A run: its loss and the further options of `train`; what it starts from and returns, as functions of a model."""

    loss: Loss
    options: Mapping[str, Any]
    first: Callable[[Any], Any] = _same
    last: Callable[[Any], Any] = _same


class Plain(sets.AbstractSet):
    """A set as it is, projected onto after every step whatever it is made of: projected Adam."""

    chosen: sets.AbstractSet

    def __call__(self, x):
        return self.chosen(x)


def replaced(where: Where, change: Callable[[jax.Array], jax.Array]) -> Callable[[Any], Any]:
    """A model to one whose picked weights are changed."""
    return lambda model: eqx.tree_at(where, model, [change(w) for w in where(model)])


def adam(peak: float, steps: int, *further: optax.GradientTransformation) -> dict[str, Any]:
    """Adam on gradients; its rate rises in the first twentieth of the steps, 100 at most, and falls with a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0.1 * peak, peak, min(100, steps // 20), steps, 0.01 * peak)
    return {"method": "gradient", "optimizer": optax.chain(optax.adam(rate), *further)}


def _defaults(rate: float) -> Setting:
    def plan(problem, steps):
        optimizer = eqxproj.default_optimizer(steps, rate)
        return Plan(problem.loss, {"constraints": [problem[1:]], "optimizer": optimizer, "precondition": True})

    return Setting(f"rate {rate:g}", plan)


def _projected_adam(rate: float) -> Setting:
    def plan(problem, steps):
        return Plan(problem.loss, {**adam(rate, steps), "constraints": [(problem.where, Plain(problem.chosen))]})

    return Setting(f"rate {rate:g}", plan)


def _straight_through(rate: float) -> Setting:
    def plan(problem, steps):
        shown = replaced(problem.where, lambda w: w + jax.lax.stop_gradient(problem.chosen(w) - w))

        def loss(model, *batch):
            return problem.loss(shown(model), *batch)

        return Plan(loss, adam(rate, steps), last=replaced(problem.where, problem.chosen))

    return Setting(f"rate {rate:g}", plan)


class Pruned(NamedTuple):
    """The state of `pruning`: the number of the step, and what is not pruned, `None` for other parameters."""

    count: jax.Array
    kept: Any


def pruning(problem: Problem, steps: int) -> optax.GradientTransformation:
    """Sets more and more weights to zero: those outside of the set's pattern, the smallest first.

    From a tenth of the steps to seven tenths, the fraction of them that is pruned rises as $1 - (1 - t)^3$; a pruned
    weight stays zero. The rest of the steps, at the falling rate, trains what is left.
    """
    begin, end, every = steps // 10, 7 * steps // 10, max(1, steps // 100)

    def picked(params):
        """The constrained arrays in their places, `None` elsewhere."""
        flags = jax.tree.map(lambda _: False, params)
        flags = eqx.tree_at(problem.where, flags, [True for _ in problem.where(flags)])
        return eqx.filter(params, flags)

    def init(params):
        return Pruned(jnp.asarray(0), jax.tree.map(lambda w: jnp.ones(w.shape, bool), picked(params)))

    def mask(w, kept, fraction):
        outside = problem.chosen(w) == 0
        ranks = jnp.argsort(jnp.argsort(jnp.where(outside, jnp.abs(w), jnp.inf).ravel())).reshape(w.shape)
        return kept & ~(outside & (ranks < jnp.ceil(fraction * jnp.sum(outside))))

    def update(updates, state, params=None):
        assert params is not None
        time = jnp.clip((state.count - begin) / (end - begin), 0, 1)
        due = (state.count % every == 0) & (state.count <= end + every)
        new = picked(optax.apply_updates(params, updates))
        kept = jax.lax.cond(
            due,
            lambda: jax.tree.map(lambda w, k: mask(w, k, 1 - (1 - time) ** 3), new, state.kept),
            lambda: state.kept,
        )
        pruned = jax.tree.map(lambda w, k, p: jnp.where(k, w - p, -p), new, kept, picked(params))
        return eqx.combine(pruned, updates), Pruned(state.count + 1, kept)

    return optax.GradientTransformation(init, update)


def _pruning(rate: float) -> Setting:
    def plan(problem, steps):
        return Plan(problem.loss, adam(rate, steps, pruning(problem, steps)))

    return Setting(f"rate {rate:g}", plan)


def _penalty(rate: float, factor: float) -> Setting:
    def plan(problem, steps):
        def loss(model, *batch):
            grams = [w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w for w in problem.where(model)]
            return problem.loss(model, *batch) + factor * sum(jnp.sum((g - jnp.eye(len(g))) ** 2) for g in grams)

        return Plan(loss, adam(rate, steps), last=replaced(problem.where, problem.chosen))

    return Setting(f"rate {rate:g}, factor {factor:g}", plan)


def _parametrised(name: str, forward: Callable, inverse: Callable, rate: float) -> Setting:
    def plan(problem, steps):
        shown = replaced(problem.where, forward)

        def loss(model, *batch):
            return problem.loss(shown(model), *batch)

        return Plan(loss, adam(rate, steps), first=replaced(problem.where, inverse), last=shown)

    return Setting(f"{name}, rate {rate:g}", plan)


def _orthonormal(w: jax.Array) -> jax.Array:
    """The orthonormal factor of the rows, or of the columns where these are fewer, with a positive diagonal."""
    q, r = jnp.linalg.qr(w.T if w.shape[0] <= w.shape[1] else w)
    q = q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)
    return q.T if w.shape[0] <= w.shape[1] else q


def _half(w: jax.Array) -> jax.Array:
    """Positive weights with the sums, on average, of what is left when the negative ones are set to zero."""
    return jnp.maximum(0.5 * jnp.abs(w), 1e-4)


POSITIVE = {
    "abs": (jnp.abs, _half),
    "square": (jnp.square, lambda w: jnp.sqrt(_half(w))),
    "softplus": (jax.nn.softplus, lambda w: jnp.log(jnp.expm1(_half(w)))),
}

DEFAULTS = [Setting("defaults", lambda problem, _: Plan(problem.loss, {"constraints": [problem[1:]]}))]
DEFAULTS_AT_RATES = [_defaults(rate) for rate in RATES]
PROJECTED_ADAM = [_projected_adam(rate) for rate in RATES]
STRAIGHT_THROUGH = [_straight_through(rate) for rate in RATES]
PRUNING = [_pruning(rate) for rate in RATES]
PENALTY = [_penalty(rate, factor) for factor in PENALTIES for rate in RATES]
QR = [_parametrised("QR", _orthonormal, lambda w: w, rate) for rate in RATES]
POSITIVE_FUNCTION = [
    _parametrised(name, forward, inverse, rate) for name, (forward, inverse) in POSITIVE.items() for rate in RATES
]
FREE = [Setting("defaults, no constraint", lambda problem, _: Plan(problem.loss, {}))]


def run(setting: Setting, problem: Problem, model: Any, data: Any, steps: int, batch_size: int, key: jax.Array):
    """The trained model, and the seconds of its training without compilation."""
    plan = setting.plan(problem, steps)
    start = plan.first(model)
    result = eqxproj.train(
        start, data, plan.loss, steps=steps, batch_size=batch_size, key=key, eval_every=steps, **plan.options
    )
    return plan.last(result.model), float(result.history["seconds"][-1])
