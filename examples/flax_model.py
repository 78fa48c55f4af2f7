"""A Flax model, trained by projections and by gradients from the same parameters: a convolutional network of linen.

    python examples/flax_model.py                            # on the digits of the package
    python examples/flax_model.py --data-dir path/to/mnist   # on MNIST, from a folder in the layout of the hub

`from_linen` makes a model that `eqxproj.train` takes from a module and its variables, and the trained variables go back
into Flax. Prints the accuracy on held-out images, and draws it over the steps. One seed each: small differences mean
nothing. Needs `pip install 'eqxproj[flax]'`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
from flax import linen as nn

import eqxproj
from eqxproj.flax import from_linen


class CNN(nn.Module):
    """Two convolutions and two dense layers."""

    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def loss(model, x, y):
    return jnp.mean(eqxproj.losses.cross_entropy(model(x), y))


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(model(x), axis=-1) == y)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    folder = "folder with MNIST; without it, the digits of the package"
    options = side_by_side.parser(__doc__, "flax_model", 300, folder).parse_args(argv)

    name = "digits" if options.data_dir is None else "mnist"
    data = eqxproj.datasets.load(name, options.data_dir)
    # Flax has the channels last.
    (x, y), (x_test, y_test) = ((np.moveaxis(images, 1, -1), labels) for images, labels in (data.train, data.test))

    module = CNN()
    variables = module.init(jax.random.key(0), x[:1])
    results = {
        method: eqxproj.train(
            from_linen(module, variables),
            (x, y),
            loss,
            steps=options.steps,
            batch_size=64,
            key=jax.random.key(1),
            method=method,
            eval_data=(x_test[:2000], y_test[:2000]),
            eval_every=max(1, options.steps // 10),
            evaluate={"accuracy": accuracy},
        )
        for method in side_by_side.METHODS
    }
    reached = side_by_side.finals(results, "accuracy")
    variables = results["projection"].model.variables  # of the same structure as before: on with them in Flax
    logits: Any = module.apply(variables, x_test[:10])
    print(f"Flax reads the first held-out images as {np.argmax(logits, axis=-1)}; they are {y_test[:10]}")
    side_by_side.draw(options.figure, f"CNN of flax.linen on {name}", "accuracy", results)
    return reached


if __name__ == "__main__":
    main()
