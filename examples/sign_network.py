"""A network whose hidden layers are signs, trained by projections as it is, and by gradients with an estimator.

    python examples/sign_network.py                            # on the digits of the package
    python examples/sign_network.py --data-dir path/to/mnist   # on MNIST, from a folder in the layout of the hub

The derivative of `jnp.sign` is zero, so that gradients reach the last layer alone. The usual remedy is a
straight-through estimator, which puts the derivative of another function in its place by hand. `eqxproj` has a rule for
functions with jumps and trains the model as it is written. Prints the accuracy on held-out images, and draws it over
the steps. One seed each: small differences mean nothing.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import side_by_side

import eqxproj


class SignNetwork(eqx.Module):
    """A multilayer perceptron with `activation` behind each layer but the last."""

    layers: list[eqx.nn.Linear]
    activation: Callable = eqx.field(static=True)

    def __init__(self, sizes: Sequence[int], activation: Callable, key: jax.Array):
        pairs = zip(sizes[:-1], sizes[1:], jax.random.split(key, len(sizes) - 1), strict=True)
        self.layers = [eqx.nn.Linear(before, after, key=k) for before, after, k in pairs]
        self.activation = activation

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


@jax.custom_vjp
def straight_through(x):
    """The sign, with the derivative of `x` clipped to [-1, 1]."""
    return jnp.sign(x)


straight_through.defvjp(lambda x: (jnp.sign(x), x), lambda x, cotangent: (jnp.where(jnp.abs(x) <= 1, cotangent, 0.0),))


def loss(model, x, y):
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=-1) == y)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = side_by_side.parser(
        __doc__, "sign_network", 600, "folder with MNIST; without it, the digits of the package"
    )
    options = parser.parse_args(argv)

    name = "digits" if options.data_dir is None else "mnist"
    data = eqxproj.datasets.load(name, options.data_dir).flatten()
    sizes = [*data.input_shape, 128, 128, data.n_classes]
    runs = {
        "projection": ("projection", jnp.sign),
        "straight-through gradient": ("gradient", straight_through),
        "gradient": ("gradient", jnp.sign),
    }
    results = {
        run: eqxproj.train(
            SignNetwork(sizes, activation, jax.random.key(0)),
            data.train,
            loss,
            steps=options.steps,
            batch_size=128,
            key=jax.random.key(1),
            method=method,
            eval_data=data.test,
            evaluate={"accuracy": accuracy},
        )
        for run, (method, activation) in runs.items()
    }
    reached = side_by_side.finals(results, "accuracy")
    side_by_side.draw(options.figure, f"Network of signs on {name}", "accuracy", results)
    return reached


if __name__ == "__main__":
    main()
