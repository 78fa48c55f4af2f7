"""The tasks of `accuracy.py`: data, model, loss, and the value that counts."""

from __future__ import annotations

import functools as ft
import os
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from shared import classification

import eqxproj

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
from vision_transformer import VisionTransformer  # noqa: E402

Arrays = tuple[Any, ...]


def _scaled(inputs: int, outputs: int, key: jax.Array) -> eqx.nn.Linear:
    """A linear layer that keeps the size of what relus leave, at any depth (He et al. 2015)."""
    layer = eqx.nn.Linear(inputs, outputs, key=key)
    weight = jax.random.normal(key, layer.weight.shape) * np.sqrt(2 / inputs)
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (weight, jnp.zeros(outputs)))


class Network(eqx.Module):
    """Hidden layers of one width; with `skip`, each but the first adds to what it reads."""

    layers: tuple[eqx.nn.Linear, ...]
    skip: bool = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, key: jax.Array, skip: bool = False):
        sizes = [inputs, *[width] * depth, outputs]
        keys = jax.random.split(key, depth + 1)
        self.layers = tuple(_scaled(a, b, k) for a, b, k in zip(sizes, sizes[1:], keys, strict=False))
        if skip:  # a residual layer adds little at first
            weights = [layer.weight / np.sqrt(depth) for layer in self.layers[1:-1]]
            self.layers = eqx.tree_at(lambda ls: [layer.weight for layer in ls[1:-1]], self.layers, weights)
        self.skip = skip

    def __call__(self, x):
        h = jax.nn.relu(self.layers[0](x))
        for layer in self.layers[1:-1]:
            new = jax.nn.relu(layer(h))
            h = h + new if self.skip else new
        return self.layers[-1](h)


class Cnn(eqx.Module):
    """Three 3x3 convolutions of 32 channels, each with a pooling of 2x2, and one hidden layer."""

    convolutions: tuple[eqx.nn.Conv2d, ...]
    hidden: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 5)
        channels = (3, 32, 32, 32)
        self.convolutions = tuple(
            eqx.nn.Conv2d(a, b, 3, padding=1, key=k) for a, b, k in zip(channels, channels[1:], keys, strict=False)
        )
        self.hidden = eqx.nn.Linear(32 * 4 * 4, 128, key=keys[3])
        self.last = eqx.nn.Linear(128, 10, key=keys[4])

    def __call__(self, x):
        pool = eqx.nn.MaxPool2d(2, 2)
        for convolution in self.convolutions:
            x = pool(jax.nn.relu(convolution(x)))
        return self.last(jax.nn.relu(self.hidden(x.ravel())))


class StridedCnn(eqx.Module):
    """Two 3x3 convolutions of stride 2 with 16 and 32 channels, and a linear layer, for images of 28x28."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        k1, k2, k3 = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 16, 3, stride=2, padding=1, key=k1)
        self.second = eqx.nn.Conv2d(16, 32, 3, stride=2, padding=1, key=k2)
        self.last = eqx.nn.Linear(32 * 7 * 7, 10, key=k3)

    def __call__(self, x):
        x = jax.nn.relu(self.first(x))
        return self.last(jax.nn.relu(self.second(x)).ravel())


class Characters(eqx.Module):
    """A GRU along characters, and the scores of the next one at each of them."""

    cell: eqx.nn.GRUCell
    last: eqx.nn.Linear
    vocabulary: int = eqx.field(static=True)

    def __init__(self, vocabulary: int, size: int, key: jax.Array):
        k1, k2 = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(vocabulary, size, key=k1)
        self.last = eqx.nn.Linear(size, vocabulary, key=k2)
        self.vocabulary = vocabulary

    def __call__(self, x):
        def step(h, character):
            h = self.cell(jax.nn.one_hot(character, self.vocabulary), h)
            return h, h

        states = jax.lax.scan(step, jnp.zeros(self.cell.hidden_size), x)[1]
        return jax.vmap(self.last)(states)


class Autoencoder(eqx.Module):
    """784-1000-500-250-30 and back, with logistic units; the code is linear."""

    layers: tuple[eqx.nn.Linear, ...]

    def __init__(self, key: jax.Array, sizes: tuple[int, ...] = (784, 1000, 500, 250, 30)):
        sizes = (*sizes, *sizes[-2::-1])
        keys = jax.random.split(key, len(sizes))
        self.layers = tuple(eqx.nn.Linear(a, b, key=k) for a, b, k in zip(sizes, sizes[1:], keys, strict=False))

    def __call__(self, x):
        middle = len(self.layers) // 2 - 1
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i != middle:
                x = jax.nn.sigmoid(x)
        return x


class Half(eqx.Module):
    """A model with parameters and states of bfloat16, its outputs as float32 again."""

    model: Any

    def __init__(self, model: Any):
        self.model = jax.tree_util.tree_map(_halved, model)

    def __call__(self, x):
        return self.model(_halved(x)).astype(jnp.float32)


def _halved(x):
    return x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), -1) == y)


def rebuilt(model, x, y):
    return jnp.mean(jnp.sum((jax.vmap(model)(x) - y) ** 2, -1))


@dataclass(frozen=True)
class Task:
    """What is trained.

    - `data`: function of the folder of the data sets to an `eqxproj.datasets.Dataset`.
    - `make`: makes the model from a key.
    - `value`: function `(model, *data)`, what counts; `sign` is 1 where more of it is better, else -1; `unit` its name.
    - `standardises`: whether features get mean zero and deviation one on the rows to train on.
    """

    data: Callable[[str | None], eqxproj.datasets.Dataset]
    make: Callable[[jax.Array], Any]
    steps: int = 1200
    batch_size: int = 256
    loss: Callable[..., Any] = classification
    value: Callable[..., Any] = accuracy
    sign: int = 1
    unit: str = "accuracy"
    autoencodes: bool = False
    standardises: bool = False

    def split(self, data_dir: str | None, seed: int | None = None) -> tuple[Arrays, Arrays, Arrays]:
        """Training, validation (the last tenth of what there is to train on, 2,000 at most) and test data.

        With a seed all rows, the test data too, are shuffled and divided anew.
        """
        found = self.data(data_dir)
        train, test = found.train, found.test
        if seed is not None:
            train, test = _divided(train, test, np.random.default_rng(seed))
        if self.standardises:
            mean, deviation = train[0].mean(0), train[0].std(0)
            train, test = (((x - mean) / deviation, y) for x, y in (train, test))
        if self.autoencodes:
            train, test = (train[0], train[0]), (test[0], test[0])
        count = min(2000, len(train[0]) // 10)
        return tuple(a[:-count] for a in train), tuple(a[-count:] for a in train), test

    def over(self, model: Any, data: Arrays, chunk: int = 1000) -> float:
        """The value over a whole data set, in parts."""
        value = eqx.filter_jit(self.value)
        starts = range(0, len(data[0]), chunk)
        parts = [tuple(jnp.asarray(a[s : s + chunk]) for a in data) for s in starts]
        sizes = [len(p[0]) for p in parts]
        return float(np.average([float(value(model, *p)) for p in parts], weights=sizes))


def _load(name: str, flat: bool, data_dir: str | None) -> eqxproj.datasets.Dataset:
    folder = None if data_dir is None or name == "digits" else os.path.join(data_dir, name)
    found = eqxproj.datasets.load(name, folder)
    return found.flatten() if flat else found


def _flat(name: str):
    return ft.partial(_load, name, True)


def _divided(train: Arrays, test: Arrays, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """All rows in a new order, cut into as many for training and testing as before."""
    rows = [np.concatenate(pair) for pair in zip(train, test, strict=True)]
    order = rng.permutation(len(rows[0]))
    count = len(train[0])
    return tuple(x[order[:count]] for x in rows), tuple(x[order[count:]] for x in rows)


def _chain(depth: int, skip: bool = False):
    return lambda key: Network(784, 10, 128, depth, key, skip)


TASKS: dict[str, Task] = {
    "digits": Task(_flat("digits"), lambda key: Network(64, 10, 128, 2, key), steps=600, batch_size=128),
    "digits-8": Task(_flat("digits"), lambda key: Network(64, 10, 128, 8, key), steps=600, batch_size=128),
    "digits-transformer": Task(
        ft.partial(_load, "digits", False),
        lambda key: VisionTransformer((1, 8, 8), 10, 32, 2, 2, key),
        steps=400,
        batch_size=32,
    ),
    "mnist": Task(_flat("mnist"), _chain(2, skip=True)),
    "mnist-2": Task(_flat("mnist"), _chain(2)),
    "mnist-8": Task(_flat("mnist"), _chain(8)),
    "mnist-20": Task(_flat("mnist"), _chain(20)),
    "mnist-residual-20": Task(_flat("mnist"), _chain(20, skip=True)),
    "mnist-cnn": Task(ft.partial(_load, "mnist", False), StridedCnn),
    "mnist-transformer": Task(
        ft.partial(_load, "mnist", False), lambda key: VisionTransformer((1, 28, 28), 10, 64, 2, 7, key)
    ),
    "cifar10-cnn": Task(ft.partial(_load, "cifar10", False), Cnn, steps=1000, batch_size=64),
    "cifar10-transformer": Task(
        ft.partial(_load, "cifar10", False),
        lambda key: VisionTransformer((3, 32, 32), 10, 64, 3, 4, key),
        steps=800,
        batch_size=64,
    ),
    "cifar10-mlp": Task(_flat("cifar10"), lambda key: Network(3072, 10, 512, 2, key), steps=1000),
    "higgs": Task(_flat("higgs_sample"), lambda key: Network(28, 2, 300, 2, key), steps=400),
    "higgs-standardised": Task(
        _flat("higgs_sample"), lambda key: Network(28, 2, 300, 2, key), steps=400, standardises=True
    ),
    "shakespeare": Task(
        ft.partial(_load, "tiny_shakespeare", False), lambda key: Characters(65, 128, key), steps=800, batch_size=64
    ),
    "autoencoder": Task(
        _flat("mnist"),
        Autoencoder,
        steps=800,
        loss=rebuilt,
        value=rebuilt,
        sign=-1,
        unit="squared error",
        autoencodes=True,
    ),
}
