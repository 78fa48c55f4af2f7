"""A convolutional network of Equinox layers, trained by projections and by gradients from the same weights.

    python examples/cnn_mnist.py                            # on the digits of the package
    python examples/cnn_mnist.py --data-dir path/to/mnist   # on MNIST, from a folder in the layout of the hub

Convolutions and pooling have projection rules, so that nothing about the model is special: the loss is what
`equinox.filter_value_and_grad` would be given. Prints the accuracy on held-out images, and draws it over the steps.
One seed each: small differences mean nothing.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import side_by_side

import eqxproj


class CNN(eqx.Module):
    """Two convolutions with pooling, and a linear layer."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    pool: eqx.nn.MaxPool2d
    last: eqx.nn.Linear

    def __init__(self, shape: Sequence[int], n_classes: int, key: jax.Array):
        channels, height, width = shape
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(channels, 8, kernel_size=3, padding=1, key=keys[0])
        self.second = eqx.nn.Conv2d(8, 16, kernel_size=3, padding=1, key=keys[1])
        self.pool = eqx.nn.MaxPool2d(kernel_size=2, stride=2)
        self.last = eqx.nn.Linear(16 * (height // 4) * (width // 4), n_classes, key=keys[2])

    def __call__(self, x):
        x = self.pool(jax.nn.relu(self.first(x)))
        x = self.pool(jax.nn.relu(self.second(x)))
        return self.last(x.ravel())


def loss(model, x, y):
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=-1) == y)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = side_by_side.parser(__doc__, "cnn_mnist", 300, "folder with MNIST; without it, the digits of the package")
    options = parser.parse_args(argv)

    name = "digits" if options.data_dir is None else "mnist"
    data = eqxproj.datasets.load(name, options.data_dir)
    model = CNN(data.input_shape, data.n_classes, jax.random.key(0))
    results = {
        method: eqxproj.train(
            model,
            data.train,
            loss,
            steps=options.steps,
            batch_size=64,
            key=jax.random.key(1),
            optimizer=optax.adam(3e-3),
            method=method,
            eval_data=tuple(part[:2000] for part in data.test),
            eval_every=max(1, options.steps // 10),
            evaluate={"accuracy": accuracy},
        )
        for method in side_by_side.METHODS
    }
    reached = side_by_side.finals(results, "accuracy")
    side_by_side.draw(options.figure, f"CNN on {name}", "accuracy", results)
    return reached


if __name__ == "__main__":
    main()
