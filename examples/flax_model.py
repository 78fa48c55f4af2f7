"""A Flax model, trained by projections on handwritten digits: a convolutional network of `flax.linen`.

    python examples/flax_model.py                            # on the digits of the package
    python examples/flax_model.py --data-dir path/to/mnist   # on MNIST, from a folder in the layout of the hub

Prints the accuracy on held-out images, and draws it over the steps and the seconds of training.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def draw(path: pathlib.Path, title: str, history: dict) -> None:
    """The accuracy over the steps and over the seconds of training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, over, unit in zip(axes, ("step", "seconds"), ("steps", "seconds of training"), strict=True):
        axis.plot(history[over], history["eval_accuracy"], marker=".")
        axis.set_xlabel(unit)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy")
    figure.savefig(path, dpi=150)


def main(arguments=None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with MNIST; without it, the digits of the package")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("flax_model.png"), help="the picture")
    options = parser.parse_args(arguments)

    name = "digits" if options.data_dir is None else "mnist"
    data = eqxproj.datasets.load(name, options.data_dir)
    # Flax has the channels last.
    (x, y), (x_test, y_test) = ((np.moveaxis(images, 1, -1), labels) for images, labels in (data.train, data.test))

    module = CNN()
    variables = module.init(jax.random.key(0), x[:1])
    result = eqxproj.train(
        from_linen(module, variables),
        (x, y),
        loss,
        steps=options.steps,
        batch_size=64,
        key=jax.random.key(1),
        eval_data=(x_test, y_test),
        evaluate={"accuracy": accuracy},
    )
    variables = result.model.variables  # of the same structure as before: on with them in Flax
    logits: Any = module.apply(variables, x_test)
    final = float(np.mean(np.argmax(logits, axis=-1) == y_test))
    print(f"{name}: test accuracy {final:.3f} after {options.steps} steps, {result.history['seconds'][-1]:.1f} seconds")
    draw(options.output, f"flax.linen CNN on {name}, trained by projections", result.history)
    print(f"wrote {options.output}")
    return final


if __name__ == "__main__":
    main()
