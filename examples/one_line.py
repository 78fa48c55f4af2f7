"""A script with an Equinox model, an optax loss and an optax optimizer, trained by projections: one line changes.

    python examples/one_line.py              # by projections
    python examples/one_line.py --gradient   # as it was

Both print the accuracy on held-out digits. One seed each: small differences mean nothing.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxproj


def loss(model, x, y):
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def main(arguments=None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient", action="store_true", help="train by gradients, as the script did before")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args(arguments)

    data = eqxproj.datasets.load("digits").flatten()
    (x, y), (x_test, y_test) = jax.tree.map(jnp.asarray, (data.train, data.test))
    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(0))
    optimizer = optax.adam(1e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    value_and_direction = eqxproj.filter_value_and_displacement(loss)  # the one line; it was the next
    if options.gradient:
        value_and_direction = eqx.filter_value_and_grad(loss)

    @eqx.filter_jit
    def step(model, state, x, y):
        value, direction = value_and_direction(model, x, y)
        updates, state = optimizer.update(direction, state)
        return eqx.apply_updates(model, updates), state, value

    for epoch in range(options.epochs):
        order = jax.random.permutation(jax.random.key(epoch), len(x))
        for rows in jnp.split(order[: len(x) // 128 * 128], len(x) // 128):
            model, state, _ = step(model, state, x[rows], y[rows])
    accuracy = float(jnp.mean(jnp.argmax(jax.vmap(model)(x_test), axis=-1) == y_test))
    print(f"{'gradient' if options.gradient else 'projection'}: test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
