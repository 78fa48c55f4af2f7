r"""Steps of weights that are measured by what they change: the parameter metric of layers, from their inputs.

A step $\Delta W, \Delta b$ of a layer $z = W x + b$ changes its outputs by $\Delta W(x - \bar x) + (\Delta b + \Delta W
\bar x)$. Over a batch with mean $\bar x$ the two parts are orthogonal, so that with $\sigma^2$ the mean variance of the
inputs, and their covariance taken for $\sigma^2 I$, the mean square of the change is

$$\sigma^2 |\Delta W|^2 + |\Delta c|^2, \qquad c = b + W \bar x .$$

[`Preconditioner`][] goes over to these coordinates: the displacement of $c$ is that of $b$, the displacement of $W$
loses $\delta_b \bar x^T$, the optimizer acts, and its update of $W$ is divided by $\sigma$ and taken out of $b$ again,
$\Delta b = \Delta c - \Delta W \bar x$. So a step no longer depends on the origin and unit of a layer's inputs. The
price is the mean and the variance of each input; no matrix is kept or factored.

(Centered units: Schraudolph, Centering neural network gradient factors, 1998; Raiko, Valpola and LeCun, AISTATS 2012.)

Its limits: products and convolutions of an input with a parameter that stands in no other operation, and a bias that is
added to that product and to nothing else; a weight without such a bias is only scaled, by the deviation from zero.
Weights inside of a scan, those that constraints act on, grouped and transposed convolutions are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._graph import Edge, Graph, Node
from ._interpreter import View
from ._normal_form import Equation, Variable
from ._problem import FeasibilityProblem
from ._state import shown

_LEAST = 0.1
"""The least deviation of inputs that a step is divided by, in the units of the inputs: what hardly varies is noise."""


@dataclass(frozen=True)
class Layer:
    """A weight, what it is multiplied with, and its bias.

    - `weight`, `bias`: positions among the parameters of the trace; `bias` may be `None`.
    - `node`: the product. `operand`: the position of its operand that holds the inputs.
    - `axes`: the axes of the inputs that meet the axes `along` of the weight, in their order.
    - `out`: the one axis of the weight that the product does not sum over, `None` where there are none or several.
    - `factor`: the coefficient of the product over that of the bias, in their sum.
    """

    weight: int
    bias: int | None
    node: int
    operand: int
    axes: tuple[int, ...]
    along: tuple[int, ...]
    out: int | None
    factor: float = 1.0


def layers(graph: Graph, excluded: Collection[int] = ()) -> tuple[Layer, ...]:
    """The layers of a graph, but for those with a parameter among `excluded`."""
    owner = {value: i for i, value in enumerate(graph.parameters) if value is not None}
    found = []
    for value, position in owner.items():
        edge = _reader(graph, value)
        layer = None if edge is None or position in excluded else _layer(graph, edge, position)
        if edge is None or layer is None:
            continue
        bias, factor = _bias(graph, edge, owner, layer)
        if bias not in excluded:
            found.append(replace(layer, bias=bias, factor=factor))
    return tuple(found)


def _reader(graph: Graph, value: int) -> Edge | None:
    """The one edge that shows a value, maybe through identities, to a node; `None` where there are several.

    Penalties of parameters do not count: objectives, and nodes other than products that read nothing but parameters.
    """
    found, stack = [], [value]
    while stack:
        for number in graph.readers[stack.pop()]:
            edge = graph.edges[number]
            node = graph.nodes[edge.consumer]
            if node.kind == "identity":
                stack.extend(node.outputs)
            elif value not in graph.parameters or not _is_penalty(graph, node):
                found.append(edge)
    plain = len(found) == 1 and len(found[0].sources) == 1 and not found[0].delayed
    return found[0] if plain else None


def _is_penalty(graph: Graph, node: Node) -> bool:
    """Whether a node that reads a parameter is an objective, or computes a function of parameters alone."""
    if node.kind == "objective":
        return True
    return _product_of(node) is None and all(_shows_parameter(graph, graph.edges[e]) for e in node.edges)


def _shows_parameter(graph: Graph, edge: Edge) -> bool:
    return all(_original(graph, value) in graph.parameters for value in edge.sources)


def _original(graph: Graph, value: int) -> int:
    """The value that a value repeats, through identities."""
    while (maker := graph.nodes[graph.producers[value]]).kind == "identity":
        value = graph.edges[maker.edges[0]].sources[0]
    return value


def _product_of(node: Node) -> Equation | None:
    """The equation of a node that is a product or a convolution."""
    names = ("dot_general", "conv_general_dilated")
    return node.equation if node.equation is not None and node.equation.name in names else None


def _layer(graph: Graph, edge: Edge, position: int) -> Layer | None:
    """The layer, as yet without its bias, whose weight an edge shows; `None` for another node."""
    node = graph.nodes[edge.consumer]
    equation = _product_of(node)
    if equation is None or not edge.view.is_identity:
        return None
    place = _operand_of(node, graph, edge)
    if equation.name == "conv_general_dilated":
        numbers, params = equation.params["dimension_numbers"], equation.params
        whole = params["feature_group_count"] == params["batch_group_count"] == 1
        if place != 1 or not whole or any(d != 1 for d in params["lhs_dilation"]):
            return None
        axes, along, out = (numbers.lhs_spec[1],), (numbers.rhs_spec[1],), numbers.rhs_spec[0]
        return Layer(position, None, edge.consumer, 0, axes, along, out)
    contracted, batched = equation.params["dimension_numbers"]
    if batched[0] or not contracted[0]:
        return None
    along, axes = zip(*sorted(zip(contracted[place], contracted[1 - place], strict=True)), strict=True)
    free = [a for a in range(len(edge.variable.shape)) if a not in along]
    out = free[0] if len(free) == 1 else None
    return Layer(position, None, edge.consumer, 1 - place, tuple(axes), tuple(along), out)


def _operand_of(node: Node, graph: Graph, edge: Edge) -> int:
    """Which operand of a node's primitive an edge shows."""
    places = [i for i, is_unknown in enumerate(node.unknown) if is_unknown]
    return places[[graph.edges[e] is edge for e in node.edges].index(True)]


def _bias(graph: Graph, weight: Edge, owner: Mapping[int, int], layer: Layer) -> tuple[int | None, float]:
    """The parameter that is added to a product along the axis of the weight's outputs, and the factor of the layer."""
    node = graph.nodes[layer.node]
    product = _reader(graph, node.outputs[0])
    if layer.out is None or product is None:
        return None, 1.0
    assert node.equation is not None
    axis = _followed(product.view, _output_axis(node.equation, 1 - layer.operand))
    reader = graph.nodes[product.consumer]
    terms = {t.variable: t for t in getattr(reader.rule, "terms", ()) if not t.factors and not t.axes}
    for edge in (graph.edges[e] for e in reader.edges):
        value = _original(graph, edge.sources[0])
        if value not in owner or _reader(graph, value) is not edge or not {edge.variable, product.variable} <= {*terms}:
            continue
        shape = graph.values[value].shape
        wide = [a for a, n in enumerate(shape) if n != 1]
        fits = len(wide) == 1 and shape[wide[0]] == weight.variable.shape[layer.out]
        if fits and axis is not None and _followed(edge.view, wide[0]) == axis:
            return owner[value], terms[product.variable].scale / terms[edge.variable].scale
    return None, 1.0


def _output_axis(equation: Equation, place: int) -> int:
    """The axis of a product's output that is the one free axis of its operand `place`."""
    if equation.name == "conv_general_dilated":
        return equation.params["dimension_numbers"].out_spec[1]
    contracted = equation.params["dimension_numbers"][0]
    return 0 if place == 0 else len(equation.inputs[0].shape) - len(contracted[0])


def _followed(view: View, axis: int) -> int | None:
    """Where a view takes an axis of its one operand; `None` where that cannot be told."""
    variable: Variable = view.operands[0]
    for equation in view.equations:
        if len(equation.inputs) != 1 or equation.inputs[0] != variable:
            return None
        before, params = variable, equation.params
        variable = equation.outputs[0]
        if equation.name == "transpose":
            axis = tuple(params["permutation"]).index(axis)
        elif equation.name == "broadcast_in_dim":
            axis = params["broadcast_dimensions"][axis]
        elif equation.name in ("reshape", "squeeze", "expand_dims"):
            moved = _reshaped(before.shape, variable.shape, axis)
            if moved is None:
                return None
            axis = moved
        else:
            return None
    return axis


def _reshaped(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """The axis of a reshaped array with the entries of an axis before, `None` where there is none."""
    count = math.prod(before[:axis])
    found = [i for i, n in enumerate(after) if n == before[axis] and math.prod(after[:i]) == count]
    return found[0] if found else None


class Preconditioner(eqx.Module):
    """Displacements and updates in the coordinates of the layers' inputs.

    - `means`: for each layer the mean of its inputs, shaped to multiply the weight. `scales`: one over their deviation.
    """

    means: tuple[Array, ...]
    scales: tuple[Array, ...]
    layers: tuple[Layer, ...] = eqx.field(static=True)

    def centered(self, moved: PyTree) -> PyTree:
        """Displacements of the parameters, in the coordinates of the inputs."""
        leaves, treedef = jtu.tree_flatten(moved)
        for layer, mean in zip(self.layers, self.means, strict=True):
            if layer.bias is not None:
                weight = leaves[layer.weight]
                shape = [n if a == layer.out else 1 for a, n in enumerate(weight.shape)]
                part = layer.factor * leaves[layer.bias].reshape(shape) * mean
                leaves[layer.weight] = weight - part.astype(weight.dtype)
        return jtu.tree_unflatten(treedef, leaves)

    def applied(self, updates: PyTree) -> PyTree:
        """Updates of the parameters, from those in the coordinates of the inputs."""
        leaves, treedef = jtu.tree_flatten(updates)
        for layer, mean, scale in zip(self.layers, self.means, self.scales, strict=True):
            weight = leaves[layer.weight]
            leaves[layer.weight] = weight = weight * scale.astype(weight.dtype)
            if layer.bias is not None:
                bias = leaves[layer.bias]
                assert layer.out is not None
                full = jnp.broadcast_to(mean, [1 if a == layer.out else n for a, n in enumerate(weight.shape)])
                rows = jnp.moveaxis(weight, layer.out, 0).reshape(bias.size, -1)
                part = layer.factor * (rows @ full.reshape(-1).astype(weight.dtype))
                leaves[layer.bias] = bias - part.reshape(bias.shape).astype(bias.dtype)
        return jtu.tree_unflatten(treedef, leaves)


def preconditioner(problem: FeasibilityProblem, excluded: Collection[int] = ()) -> Preconditioner:
    """The preconditioner of a problem, from the inputs of its layers on the forward pass."""
    found, means, scales = layers(problem.graph, excluded), [], []
    start = problem.start(False)
    for layer in found:
        node = problem.graph.nodes[layer.node]
        assert node.equation is not None
        if node.unknown[layer.operand]:
            inputs = shown(problem, start, node.edges[sum(node.unknown[: layer.operand])])
        else:
            inputs = problem.known[node.equation.inputs[layer.operand].index]
        mean, scale = _statistics(inputs, layer, problem.trace.parameters[layer.weight].ndim)
        means.append(mean)
        scales.append(scale)
    return Preconditioner(tuple(means), tuple(scales), found)


def _statistics(inputs: Array, layer: Layer, rank: int) -> tuple[Array, Array]:
    """The mean of a layer's inputs, shaped to multiply a weight of that rank, and one over their deviation.

    Of n rows the mean is taken times 1 - 1/n, so that the weights still move along the inputs where there is one. For a
    weight without a bias the deviation is that from zero.
    """
    rows = tuple(a for a in range(inputs.ndim) if a not in layer.axes)
    count = math.prod(inputs.shape[a] for a in rows)
    kind = jnp.promote_types(inputs.dtype, jnp.float32)
    mean = jnp.mean(inputs, rows, dtype=kind)
    square = jnp.mean(jnp.square(inputs.astype(kind)))
    variance = square if layer.bias is None else square - jnp.mean(jnp.square(mean))
    left = sorted(layer.axes)
    mean = jnp.transpose(mean, [left.index(a) for a in layer.axes])
    sizes = dict(zip(layer.along, mean.shape, strict=True))
    shape = [sizes.get(a, 1) for a in range(rank)]
    return (1.0 - 1.0 / count) * mean.reshape(shape), 1.0 / jnp.sqrt(jnp.maximum(variance, _LEAST**2))
