"""A recurrent network that writes text, trained by projections and by gradients from the same weights.

    python examples/character_gru.py                             # on the help texts that come with Python
    python examples/character_gru.py --data-dir path/to/tiny_shakespeare   # from a folder in the layout of the hub

An `equinox.nn.GRUCell` in a `jax.lax.scan` predicts each next character. The scan has a projection rule as a whole,
which walks back through time without unrolling it. Prints the bits a character on held-out text and a sample of what
the network writes, and draws the bits over the steps. One seed each: small differences mean nothing.
"""

import pydoc_data.topics
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import side_by_side

import eqxproj

_LENGTH = 32  # characters in a sample


class CharacterGRU(eqx.Module):
    """Characters in, scores of the next character out."""

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear
    vocabulary: int = eqx.field(static=True)

    def __init__(self, vocabulary: int, size: int, key: jax.Array):
        keys = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(vocabulary, size, key=keys[0])
        self.head = eqx.nn.Linear(size, vocabulary, key=keys[1])
        self.vocabulary = vocabulary

    def step(self, state, character):
        state = self.cell(jax.nn.one_hot(character, self.vocabulary), state)
        return state, self.head(state)

    def __call__(self, characters):
        return jax.lax.scan(lambda *now: self.step(*now), jnp.zeros(self.cell.hidden_size), characters)[1]


def loss(model, x, y):
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def bits(model, x, y):
    return loss(model, x, y) / jnp.log(2.0)


@eqx.filter_jit
def write(model: CharacterGRU, first: jax.Array, count: int, key: jax.Array):
    """Continues a character: each next one is drawn from what the model expects."""

    def step(carry, key):
        state, character = carry
        state, logits = model.step(state, character)
        character = jax.random.categorical(key, logits / 0.7)
        return (state, character), character

    start = (jnp.zeros(model.cell.hidden_size), first)
    return jax.lax.scan(step, start, jax.random.split(key, count))[1]


def python_help() -> eqxproj.datasets.Dataset:
    """The help texts of Python (what `help("lambda")` shows) as a data set; the last tenth of them is for testing."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    characters = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
    kinds, tokens = np.unique(characters, return_inverse=True)
    rows = (len(tokens) - 1) // _LENGTH
    x, y = (tokens[i : i + rows * _LENGTH].reshape(rows, _LENGTH).astype(np.int32) for i in (0, 1))
    split = rows * 9 // 10
    return eqxproj.datasets.Dataset(
        "python_help", (x[:split], y[:split]), (x[split:], y[split:]), len(kinds), (_LENGTH,), kinds.tobytes().decode()
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    folder = "folder with Tiny Shakespeare; without it, the help texts of Python"
    options = side_by_side.parser(__doc__, "character_gru", 400, folder).parse_args(argv)

    if options.data_dir is None:
        data = python_help()
    else:
        data = eqxproj.datasets.load("tiny_shakespeare", options.data_dir, sequence_length=_LENGTH)
    assert data.vocabulary is not None
    model = CharacterGRU(data.n_classes, 128, jax.random.key(0))
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
            eval_data=tuple(part[:500] for part in data.test),
            eval_every=max(1, options.steps // 10),
            evaluate={"bits a character": bits},
        )
        for method in side_by_side.METHODS
    }
    reached = side_by_side.finals(results, "bits a character")
    written = write(results["projection"].model, jnp.asarray(data.test[0][0, 0]), 300, jax.random.key(2))
    print("--- written by the network trained by projections ---")
    print("".join(data.vocabulary[i] for i in written))
    print("---")
    side_by_side.draw(options.figure, f"GRU on the characters of {data.name}", "bits a character", results)
    return reached


if __name__ == "__main__":
    main()
