"""A small vision transformer of Equinox layers, trained by projections and by gradients from the same weights.

    python examples/vision_transformer.py                              # on the digits of the package
    python examples/vision_transformer.py --data-dir path/to/cifar10   # on CIFAR-10, from a folder as on the hub

Patches, self-attention, layer normalization and residual connections: every operation gets its own rule. Softmax and
normalization have no projection in closed form, and get a local solver. On digits, both ways end within a few percent
of each other; on CIFAR-10, so few steps only show that it works there too. Prints the accuracy on held-out images, and
draws it over the steps. One seed each: small differences mean nothing.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import side_by_side

import eqxproj


class Block(eqx.Module):
    """Self-attention and an MLP, each behind a normalization and beside a residual connection."""

    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, size: int, key: jax.Array):
        keys = jax.random.split(key)
        self.norms = (eqx.nn.LayerNorm(size), eqx.nn.LayerNorm(size))
        self.attention = eqx.nn.MultiheadAttention(num_heads=4, query_size=size, key=keys[0])
        self.mlp = eqx.nn.MLP(size, size, width_size=2 * size, depth=1, activation=jax.nn.gelu, key=keys[1])

    def __call__(self, tokens):
        x = jax.vmap(self.norms[0])(tokens)
        tokens = tokens + self.attention(x, x, x)
        return tokens + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(tokens))


class VisionTransformer(eqx.Module):
    """Patches become tokens, with a learned vector for each place; the mean of the last tokens is classified.

    **Arguments:**

    - `shape`: channels, height and width of an image.
    - `n_classes`: number of scores.
    - `size`: length of a token.
    - `depth`: number of blocks.
    - `patch`: side of a patch in pixels; it divides height and width.
    - `key`: draws the initial parameters.
    """

    embed: eqx.nn.Conv2d
    places: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, shape: Sequence[int], n_classes: int, size: int, depth: int, patch: int, key: jax.Array):
        channels, height, width = shape
        keys = jax.random.split(key, depth + 3)
        self.embed = eqx.nn.Conv2d(channels, size, kernel_size=patch, stride=patch, key=keys[0])
        self.places = 0.1 * jax.random.normal(keys[1], ((height // patch) * (width // patch), size))
        self.blocks = [Block(size, k) for k in keys[3:]]
        self.norm = eqx.nn.LayerNorm(size)
        self.head = eqx.nn.Linear(size, n_classes, key=keys[2])

    def __call__(self, image):
        patches = self.embed(image)
        tokens = patches.reshape(len(patches), -1).T + self.places
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(jnp.mean(tokens, axis=0)))


def loss(model, x, y):
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=-1) == y)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    folder = "folder with CIFAR-10; without it, the digits of the package"
    parser = side_by_side.parser(__doc__, "vision_transformer", 300, folder)
    parser.add_argument("--depth", type=int, default=2, help="number of blocks (default: %(default)s)")
    options = parser.parse_args(argv)

    name, patch = ("digits", 2) if options.data_dir is None else ("cifar10", 4)
    data = eqxproj.datasets.load(name, options.data_dir)
    model = VisionTransformer(data.input_shape, data.n_classes, 32, options.depth, patch, jax.random.key(0))
    results = {
        method: eqxproj.train(
            model,
            data.train,
            loss,
            steps=options.steps,
            batch_size=32,
            key=jax.random.key(1),
            method=method,
            eval_data=tuple(part[:1000] for part in data.test),
            eval_every=max(1, options.steps // 10),
            evaluate={"accuracy": accuracy},
        )
        for method in side_by_side.METHODS
    }
    reached = side_by_side.finals(results, "accuracy")
    side_by_side.draw(options.figure, f"Vision transformer on {name}", "accuracy", results)
    return reached


if __name__ == "__main__":
    main()
