"""A mixture of experts whose gate picks exactly one expert, trained by projections and by gradients.

    python examples/hard_gate.py                            # on the digits of the package
    python examples/hard_gate.py --data-dir path/to/mnist   # on MNIST, from a folder in the layout of the hub

Each image comes from one of eight cameras. Each camera shuffles the pixels in its own way, and writes its number beside
them. A linear expert reads one camera well and several badly, so that it matters which samples the gate sends to which
expert. The gate picks by `argmax`, through which no gradient passes: trained by gradients, it stays as it was drawn.
Projections ask how much each expert would have helped, and move the gate, though not to one camera an expert.
Prints the accuracy on held-out images, and draws it over the steps. One seed each: small differences mean nothing.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import side_by_side

import eqxproj

_CAMERAS = 8


class HardMixture(eqx.Module):
    """Linear experts, one of which is picked for each sample."""

    gate: eqx.nn.Linear
    weights: jax.Array
    biases: jax.Array

    def __init__(self, features: int, n_classes: int, experts: int, key: jax.Array):
        keys = jax.random.split(key)
        self.gate = eqx.nn.Linear(features, experts, key=keys[0])
        self.weights = jax.random.normal(keys[1], (experts, n_classes, features)) / np.sqrt(features)
        self.biases = jnp.zeros((experts, n_classes))

    def __call__(self, x):
        picked = jnp.argmax(self.gate(x))
        return (self.weights @ x + self.biases)[picked]


def through_cameras(images: np.ndarray, seed: int) -> np.ndarray:
    """The images as their cameras hand them over: shuffled pixels, and the number of the camera as a one-hot vector."""
    features = images.shape[1]
    shuffles = np.stack([np.random.default_rng(camera).permutation(features) for camera in range(_CAMERAS)])
    cameras = np.random.default_rng(seed).integers(_CAMERAS, size=len(images))
    shuffled = np.take_along_axis(images, shuffles[cameras], axis=1)
    return np.concatenate([shuffled, np.eye(_CAMERAS, dtype=images.dtype)[cameras]], axis=1)


def loss(model, x, y):
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=-1) == y)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = side_by_side.parser(__doc__, "hard_gate", 1500, "folder with MNIST; without it, the digits of the package")
    parser.add_argument("--experts", type=int, default=8, help="number of experts (default: %(default)s)")
    options = parser.parse_args(argv)

    name = "digits" if options.data_dir is None else "mnist"
    data = eqxproj.datasets.load(name, options.data_dir).flatten()
    train, test = ((through_cameras(x, seed), y) for seed, (x, y) in enumerate((data.train, data.test)))
    model = HardMixture(train[0].shape[1], data.n_classes, options.experts, jax.random.key(0))
    results = {
        method: eqxproj.train(
            model,
            train,
            loss,
            steps=options.steps,
            batch_size=128,
            key=jax.random.key(1),
            optimizer=optax.adam(3e-3),
            method=method,
            eval_data=test,
            evaluate={"accuracy": accuracy},
        )
        for method in side_by_side.METHODS
    }
    reached = side_by_side.finals(results, "accuracy")
    title = f"{options.experts} experts behind a hard gate, on {name} through {_CAMERAS} cameras"
    side_by_side.draw(options.figure, title, "accuracy", results)
    return reached


if __name__ == "__main__":
    main()
