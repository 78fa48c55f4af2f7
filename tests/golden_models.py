"""The models of the golden iterates, as plain functions of a dictionary of arrays."""

import jax
import jax.numpy as jnp

import eqxproj


def mlp(p, x):
    h = jax.nn.relu(x @ p["dense_0.weight"] + p["relu_0.bias"])
    h = jax.nn.relu(h @ p["dense_1.weight"] + p["relu_1.bias"])
    return h @ p["out.weight"]


def mlp_skip(p, x):
    h0 = jax.nn.relu(x @ p["dense_0.weight"] + p["relu_0.bias"])
    h1 = jax.nn.relu(h0 @ p["dense_1.weight"] + p["relu_1.bias"])
    return jnp.concatenate([h0, h1], axis=-1) @ p["out.weight"]


def _conv(x, weight):
    kernel = weight.reshape(x.shape[-1], 3, 3, -1).transpose(1, 2, 0, 3)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def cnn(p, x):
    h = jax.nn.relu(_conv(x, p["conv_0.linear.weight"]) + p["relu_0.bias"])
    h = jax.nn.relu(_conv(h, p["conv_1.linear.weight"]) + p["relu_1.bias"])
    return jnp.max(h, axis=(1, 2)) @ p["out.weight"]


def rnn(p, tokens):
    h = jnp.zeros((tokens.shape[0], 6))
    logits = []
    for t in range(tokens.shape[1]):
        z = jnp.concatenate([p["embedding.weight"][tokens[:, t]], h], axis=-1) @ p["cell.dense_0.weight"]
        out = jax.nn.relu(z + p["cell.relu_0.bias"]) @ p["cell.out.weight"]
        h = jax.nn.relu(out[:, :6])
        logits.append(out[:, 6:])
    return jnp.stack(logits, axis=1)


MODELS = {"mlp": mlp, "mlp_skip": mlp_skip, "cnn": cnn, "rnn": rnn}


def loss_of(name):
    def loss(p, x, y):
        return eqxproj.losses.margin(MODELS[name](p, x), y).mean()

    return loss


SOLVERS = {
    "ap": eqxproj.AlternatingProjections(),
    "ar": eqxproj.AlternatingReflections(),
    "dr": eqxproj.DouglasRachford(relaxation=0.5),
    "dr_relax03": eqxproj.DouglasRachford(relaxation=0.3),
    "dm": eqxproj.DifferenceMap(beta=1.0),
    "dm_beta05": eqxproj.DifferenceMap(beta=0.5),
    "cp": eqxproj.CyclicProjections(),
    "cdr": eqxproj.CyclicDouglasRachford(),
}
