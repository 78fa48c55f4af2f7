"""Tasks on bits, -1 and 1: what is to be learned, from which items, and by a network of which widths.

The networks are layered, and every neuron reads all of the layer before it and a constant.

- `multiplier`: two numbers of two bits, from all 16 items. `autoencoder`: 16 one-hot words of 16 bits through a layer
  of four. Here nothing is unseen: learned is what is asked.
- `rule30`, `rule30-twice`: one and two steps of the cellular automaton on a ring of 16 cells.
- `and-or-D`, `majority-D`: random circuits of depth D on 32 wires. Each gate of the next layer copies a wire of its
  own, or with a probability of one half reads further ones too: one (and, or) or two (majority). Wires are negated at
  random.

`sigma` sets the margin: neurons of $m$ inputs have weights with $|w|^2 = m$ and the margin $\\sqrt{m/\\sigma}$. A gate
whose weights have squares that add up to $n$, and that sees sums of one at least, fits where $n \\le \\sigma$: 3 for
gates of two inputs and a constant, and for majorities. An "or" of three has weights 1, 1, 1 and 2, hence 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Bits = np.ndarray
UNSEEN = 2000


class Task(NamedTuple):
    """Inputs and outputs, to learn from and unseen, as -1 and 1; the widths of the network, and the figures of it."""

    widths: tuple[int, ...]
    learned: tuple[Bits, Bits]
    unseen: tuple[Bits, Bits]
    sigma: float = 3.0
    tol: float = 0.1


def _signs(bits: np.ndarray) -> Bits:
    return 2.0 * np.asarray(bits, np.float32) - 1.0


def _digits(number: int, count: int) -> list[int]:
    return [number >> place & 1 for place in reversed(range(count))]


def multiplier() -> Task:
    pairs = [(a, b) for a in range(4) for b in range(4)]
    x = _signs(np.array([_digits(a, 2) + _digits(b, 2) for a, b in pairs]))
    y = _signs(np.array([_digits(a * b, 4) for a, b in pairs]))
    return Task((4, 4, 4, 4), (x, y), (x, y), tol=0.01)


def autoencoder() -> Task:
    x = _signs(np.eye(16))
    return Task((16, 16, 4, 16, 16), (x, x), (x, x), sigma=7.0, tol=0.01)


def automaton(steps: int, items: int, widths: tuple[int, ...]) -> Task:
    """Rule 30: the left neighbour, exclusive or with the disjunction of the cell and its right neighbour."""
    cells = np.random.default_rng(0).integers(0, 2, (items + UNSEEN, widths[0]))
    after = cells
    for _ in range(steps):
        after = np.roll(after, 1, axis=1) ^ (after | np.roll(after, -1, axis=1))
    x, y = _signs(cells), _signs(after)
    return Task(widths, (x[:items], y[:items]), (x[items:], y[items:]))


def circuit(depth: int, inputs: int, items: int = 512, wires: int = 32) -> Task:
    """A random circuit, whose gates read one wire, or `inputs` of them: two by and or or, three by majority."""
    rng = np.random.default_rng(depth)
    x = rng.choice([-1.0, 1.0], (items + UNSEEN, wires)).astype(np.float32)
    y = x
    for _ in range(depth):
        y = _layer(y, inputs, rng)
    return Task((wires,) * (depth + 1), (x[:items], y[:items]), (x[items:], y[items:]))


def _layer(h: Bits, inputs: int, rng: np.random.Generator) -> Bits:
    own, columns = rng.permutation(h.shape[1]), []
    for wire in own:
        others = rng.choice(np.delete(np.arange(h.shape[1]), wire), inputs - 1, replace=False)
        read = h[:, [wire, *others]] * rng.choice([-1.0, 1.0], inputs)
        # The constant of -1 makes an "and" of two wires, that of 1 an "or". Majorities have none.
        total = read.sum(1) + (rng.choice([-1.0, 1.0]) if inputs == 2 else 0.0)
        columns.append(np.sign(total) if rng.random() < 0.5 else read[:, 0])
    return np.stack(columns, 1).astype(np.float32)


TASKS: dict[str, Callable[[], Task]] = {
    "multiplier": multiplier,
    "autoencoder": autoencoder,
    "rule30": lambda: automaton(1, 256, (16, 32, 32, 16)),
    "rule30-twice": lambda: automaton(2, 1024, (16, 48, 48, 48, 16)),
    "and-or-3": lambda: circuit(3, 2),
    "and-or-5": lambda: circuit(5, 2),
    "majority-3": lambda: circuit(3, 3),
    "majority-5": lambda: circuit(5, 3),
}
