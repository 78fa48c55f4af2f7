r"""The parameter metric of layers: steps of weights are measured by how much they change the layers' outputs.

A step $\Delta W, \Delta b$ of a layer $z = W x + b$ changes its outputs by $\Delta W(x - \bar x) + (\Delta b + \Delta W
\bar x)$. Over a batch with mean $\bar x$ the two parts are orthogonal, so that with $\sigma^2$ the mean variance of the
inputs, and their covariance taken for $\sigma^2 I$, the mean square of the change is

$$\sigma^2 |\Delta W|^2 + |\Delta c|^2, \qquad c = b + W \bar x .$$

[`Preconditioner`][] changes to these coordinates: the displacement of $c$ is that of $b$, and the displacement of $W$
loses $\delta_b \bar x^T$. Then the optimizer acts. Its update of $W$ is divided by $\sigma$, and the update of $b$ is
$\Delta b = \Delta c - \Delta W \bar x$. So a step does not depend on the origin and unit of a layer's inputs. (Centered
units: Schraudolph, Centering neural network gradient factors, 1998; Raiko, Valpola and LeCun, AISTATS 2012.)

An optimizer like Adam gives all entries of an update about the same size. A row of n such entries changes an output
$\sqrt n$ times as much as one: the update of W is divided by $\sqrt{n / 128}$ too where n is above 128.

Layers in branches beside residual connections change one sum together. Their steps are made smaller like those of
other layers, but never larger. Where a layer's outputs are added, as they are, to a value that they are computed from,
a change of them counts relative to the deviation of this sum: where this is below one, it multiplies the update of W.

A weight in a set does not change by its update: $\Delta W$ is what the projection leaves or makes of it, in the model
that is run. So $\Delta b = \Delta c - \Delta W \bar x$ keeps the mean of the outputs where entries of $W$ are set
to zero, rounded or cut off.

Limits: it acts on the layers that [`layers`][] finds, also inside of a `scan`, where the inputs of all time steps
count. A weight without a bias is only scaled, by the deviation from zero. Layers whose bias is in a set,
and weights inside of a `cond`, keep their coordinates.
"""

from __future__ import annotations

import functools as ft
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._control_flow._scan import Scan
from .._graph._graph import Graph, Node
from .._numerics._promotion import with_own_promotion
from .._problem._problem import FeasibilityProblem
from .._problem._readers import context, shown, value_of
from .._program._recurrence import Recurrence
from ._layers import Layer, layers, only_reader

_LEAST = 0.1  # the least number that a step is divided by: an input that hardly varies is noise
_ROWS = 2048  # from how many rows of inputs, at most, the mean and the deviation are computed
_WIDTH = 128  # the default rate was chosen with layers of this width; those with more inputs take smaller steps


class Preconditioner(eqx.Module):
    """Displacements and updates in the coordinates of the layers' inputs.

    For each layer, `means` holds the mean of its inputs, shaped to multiply the weight, and `scales` the factor of its
    updates: one over the deviation of its inputs, and over the root of their number.
    """

    means: tuple[Array, ...]
    scales: tuple[Array, ...]
    layers: tuple[Layer, ...] = eqx.field(static=True)

    def centered(self, moved: PyTree) -> PyTree:
        """Displacements of the parameters, in the coordinates of the inputs."""
        leaves, treedef = jtu.tree_flatten(moved)
        for layer, mean in zip(self.layers, self.means, strict=True):
            if layer.bias is not None:
                leaves[layer.weight] = _each(_centered, layer)(leaves[layer.weight], leaves[layer.bias], mean)
        return jtu.tree_unflatten(treedef, leaves)

    def scaled(self, updates: PyTree) -> PyTree:
        """Updates of the weights, from those in the coordinates of the inputs; those of biases are left to `offset`."""
        leaves, treedef = jtu.tree_flatten(updates)
        for layer, scale in zip(self.layers, self.scales, strict=True):
            leaves[layer.weight] = _each(lambda _, w, s: w * s.astype(w.dtype), layer)(leaves[layer.weight], scale)
        return jtu.tree_unflatten(treedef, leaves)

    def offset(self, parameters: PyTree, changes: PyTree) -> PyTree:
        """Parameters, or updates of them, with biases that make up for the `changes` of the weights."""
        leaves, treedef = jtu.tree_flatten(parameters)
        weights = jtu.tree_leaves(changes)
        for layer, mean in zip(self.layers, self.means, strict=True):
            if layer.bias is not None:
                leaves[layer.bias] = _each(_offset, layer)(weights[layer.weight], leaves[layer.bias], mean)
        return jtu.tree_unflatten(treedef, leaves)


def _each(function: Callable[..., Any], layer: Layer) -> Callable[..., Any]:
    """A function of a layer and arrays as one of the arrays alone, mapped over their first axis for stacked layers."""
    bound = ft.partial(function, layer)
    return jax.vmap(bound) if layer.stacked else bound


def _centered(layer: Layer, weight: Array, bias: Array, mean: Array) -> Array:
    shape = [n if a == layer.out else 1 for a, n in enumerate(weight.shape)]
    return weight - (layer.factor * bias.reshape(shape) * mean).astype(weight.dtype)


def _offset(layer: Layer, weight: Array, bias: Array, mean: Array) -> Array:
    assert layer.out is not None
    full = jnp.broadcast_to(mean, [1 if a == layer.out else n for a, n in enumerate(weight.shape)])
    rows = jnp.moveaxis(weight, layer.out, 0).reshape(bias.size, -1)
    part = layer.factor * (rows @ full.reshape(-1).astype(weight.dtype))
    return bias - part.reshape(bias.shape).astype(bias.dtype)


@with_own_promotion
def preconditioner(problem: FeasibilityProblem, fixed: Collection[int] = ()) -> Preconditioner:
    """The preconditioner of a problem, from its forward pass, without the layers whose biases are among `fixed`."""
    owner = {value: i for i, value in enumerate(problem.graph.parameters) if value is not None}
    places = {None: None, **dict(enumerate(problem.trace.leaves))}
    found, means, scales = [], [], []
    for one in _with_inputs(problem, owner):
        shape = problem.trace.parameters[one.layer.weight].shape[int(one.layer.stacked) :]
        weight, bias = places[one.layer.weight], places[one.layer.bias]
        if weight is None or (bias is None and one.layer.bias is not None):
            continue  # a part of a complex parameter
        layer = replace(one.layer, weight=weight, bias=bias)
        has_entries = one.inputs.size and math.prod(shape)
        if has_entries and layer.bias not in fixed:
            mean, scale = _each(ft.partial(_statistics, shape), layer)(one.inputs)
            found.append(layer)
            means.append(mean)
            scales.append(scale if one.total is None else scale * _each(_unit, layer)(one.total))
    return Preconditioner(tuple(means), tuple(scales), tuple(found))


class LayerInputs(eqx.Module):
    """A layer, its inputs, and the sum that its outputs are a part of, if they are, along the sum's last axis."""

    layer: Layer = eqx.field(static=True)
    inputs: Array
    total: Array | None


def _with_inputs(
    problem: FeasibilityProblem, owner: Mapping[int, int], states: Collection[int] = ()
) -> list[LayerInputs]:
    """The layers of a problem, also those inside of its recurrences, on the forward pass."""
    graph, start = problem.graph, problem.start(False)
    found: list[LayerInputs] = []
    for layer in layers(graph, owner, states):
        node = graph.nodes[layer.node]
        assert node.equation is not None
        if node.unknown[layer.operand]:
            inputs = shown(problem, start, node.edges[sum(node.unknown[: layer.operand])])
        else:
            inputs = problem.known[node.equation.inputs[layer.operand].index]
        total = None
        if layer.stream is not None:
            total = jnp.moveaxis(value_of(problem, start, layer.stream[0]), layer.stream[1], -1)
        found.append(LayerInputs(layer, inputs, total))
    for number, node in enumerate(graph.nodes):
        if isinstance(node.rule, Scan):
            found += _inside(problem, number, owner)
    return found


def _inside(problem: FeasibilityProblem, number: int, owner: Mapping[int, int]) -> list[LayerInputs]:
    """The layers inside of a recurrence, with their inputs at all steps along a new axis.

    A recurrence that takes slices of parameters, one a step, goes through stacked layers. Any other goes through time.
    """
    node = problem.graph.nodes[number]
    read, sliced, carries = _read_alone(problem.graph, node, owner)
    if not read:
        return []

    def inputs_of(body: FeasibilityProblem) -> list[LayerInputs]:
        unknown = [(i, value) for i, value in enumerate(body.graph.parameters) if value is not None]
        states = [value for i, value in unknown if i in carries and not sliced]
        return _with_inputs(body, {value: read[i] for i, value in unknown if i in read}, states)

    operands = [shown(problem, problem.start(False), e) for e in node.edges]
    ctx = replace(context(problem, number, False), residuals_hold=True)  # as on the forward pass
    assert isinstance(node.rule, Scan)
    stacked = (_stacked(one, sliced) for one in node.rule.over_time(ctx, operands, inputs_of))
    return [one for one in stacked if one is not None]


def _stacked(one: LayerInputs, sliced: Collection[int]) -> LayerInputs | None:
    """A layer of a recurrence, whose inputs have the steps along their first axis.

    `None` where some parameters are the same at all steps and some `sliced`, or where stacked layers are sliced.
    """
    layer, inputs, total = one.layer, one.inputs, one.total
    varies = {position in sliced for position in (layer.weight, layer.bias) if position is not None}
    if varies == {False}:
        if layer.stacked:
            inputs, total = jnp.moveaxis(inputs, 0, 1), None if total is None else jnp.moveaxis(total, 0, 1)
        return LayerInputs(replace(layer, axes=tuple(a + 1 for a in layer.axes)), inputs, total)
    if varies == {True} and not layer.stacked:
        return LayerInputs(replace(layer, stacked=True), inputs, total)
    return None


def _read_alone(graph: Graph, node: Node, owner: Mapping[int, int]) -> tuple[dict[int, int], set[int], list[int]]:
    """The parameters that a recurrence alone reads, and as they are.

    **Returns:** Place among the unknown operands of the body to parameter; the parameters that are sliced; and the
    places of the carries.
    """
    assert node.equation is not None
    recurrence = Recurrence.of(node.equation)
    unknowns = recurrence.unknowns(node.unknown)
    operands = [i for i, is_unknown in enumerate(node.unknown) if is_unknown]
    _, carries, slices = recurrence.split(range(len(node.unknown)))
    reads = {only_reader(graph, value, owner): position for value, position in owner.items()}
    found = {
        operand: reads[edge]
        for operand, edge in zip(operands, (graph.edges[e] for e in node.edges), strict=True)
        if operand not in carries and edge in reads and edge.view.is_identity
    }
    places = {unknowns.place(operand): position for operand, position in found.items()}
    along = {position for operand, position in found.items() if operand in slices}
    carried = [unknowns.place(i) for i, is_unknown in zip(carries, unknowns.carries, strict=True) if is_unknown]
    return places, along, carried


def _statistics(shape: tuple[int, ...], layer: Layer, inputs: Array) -> tuple[Array, Array]:
    """The mean of a layer's inputs, shaped to multiply a weight of shape `shape`, and the factor of its updates."""
    rows = tuple(a for a in range(inputs.ndim) if a not in layer.axes)
    inputs = _thinned(inputs, rows)
    count = math.prod(inputs.shape[a] for a in rows)
    kind = jnp.promote_types(inputs.dtype, jnp.float32)
    mean = jnp.mean(inputs, rows, dtype=kind)
    square = jnp.mean(jnp.square(inputs.astype(kind)))
    variance = square if layer.bias is None else square - jnp.mean(jnp.square(mean))
    left = sorted(layer.axes)
    mean = jnp.transpose(mean, [left.index(a) for a in layer.axes])
    sizes = dict(zip(layer.along, mean.shape, strict=True))
    mean = mean.reshape([sizes.get(a, 1) for a in range(len(shape))])
    summed = math.prod(shape[a] for a in layer.along) if layer.out is None else math.prod(shape) / shape[layer.out]
    least = 1.0 if layer.in_branch else _LEAST
    size = jnp.sqrt(jnp.maximum(variance * max(1.0, summed / _WIDTH), least**2))
    return (1.0 - 1.0 / count) * mean, 1.0 / size  # with one row, weights would not move along the inputs otherwise


def _unit(layer: Layer, total: Array) -> Array:
    """The unit of steps of outputs that are added to a sum: the deviation of the sum, one at most."""
    rows = range(total.ndim - 1)
    total = _thinned(total, rows).astype(jnp.promote_types(total.dtype, jnp.float32))
    variance = jnp.mean(jnp.var(total, tuple(rows)))
    return jnp.clip(jnp.sqrt(variance) / layer.stream_factor, _LEAST, 1.0)


def _thinned(inputs: Array, rows: Sequence[int]) -> Array:
    """Evenly spaced rows: every second along the longest of the axes `rows`, again and again until they are few."""
    while math.prod(inputs.shape[a] for a in rows) > _ROWS:
        longest = max(rows, key=lambda a: inputs.shape[a])
        inputs = inputs[tuple(slice(None, None, 2) if a == longest else slice(None) for a in range(inputs.ndim))]
    return inputs
