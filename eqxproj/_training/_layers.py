"""Layers of a graph: weights with what they are multiplied with, and their biases.

A layer is a product or a convolution of an input with a weight, a parameter that no other operation reads. Its bias is
a parameter that is added to the product, maybe among others, and to nothing else. Both may be converted to another type
on the way (mixed precision), and both may stand in penalties, such as weight decay. Limits: grouped and transposed
convolutions are no layers. It is also looked up whether a layer stands in a branch beside a residual connection.

`owner` maps the graph's values that are parameters to their positions among the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from .._graph._graph import Edge, Graph, Node
from .._program._equations import Equation, Variable
from .._program._fragment import View
from ..rules._scalar import Scalar


@dataclass(frozen=True)
class Layer:
    """A weight, what it is multiplied with, and its bias.

    - `weight`, `bias`: positions among the parameters. `node`: the product. `operand`: its operand with the inputs.
    - `axes`: the axes of the inputs that meet the axes `along` of the weight, in their order.
    - `out`: the one axis of the weight that the product does not sum over, `None` where there are none or several.
    - `factor`: the coefficient of the product over that of the bias, in their sum.
    - `stacked`: whether the parameters are those of many layers along a first axis, which the other axes do not count.
    - `in_branch`: whether the layer stands between a value and what is added to it: beside a residual connection.
    - `stream`: the sum that ends this branch, with its axis that is that of the outputs, where these are added as they
        stand, times `stream_factor`; `None` otherwise.
    """

    weight: int
    bias: int | None
    node: int
    operand: int
    axes: tuple[int, ...]
    along: tuple[int, ...]
    out: int | None
    factor: float = 1.0
    stacked: bool = False
    in_branch: bool = False
    stream: tuple[int, int] | None = None
    stream_factor: float = 1.0


def layers(graph: Graph, owner: Mapping[int, int], states: Collection[int] = ()) -> tuple[Layer, ...]:
    """The layers of a graph. A sum with a value of `states`, those of a recurrence over time, ends no branch."""
    found, branches = [], _branches(graph, {*owner, *states})
    for value, position in owner.items():
        edge = only_reader(graph, value, owner)
        if edge is None or (layer := _layer(graph, edge, position)) is None:
            continue
        bias, factor = _bias(graph, edge, owner, layer)
        layer = replace(layer, bias=bias, factor=factor)
        if branches >> layer.node & 1:
            stream, factor = _stream(graph, owner, layer)
            layer = replace(layer, in_branch=True, stream=stream, stream_factor=factor)
        found.append(layer)
    return tuple(found)


def only_reader(graph: Graph, value: int, owner: Mapping[int, int]) -> Edge | None:
    """The one edge that shows a value, maybe through identities and conversions, to a node; `None` for several.

    Penalties of parameters do not count.
    """
    found, stack = [], [value]
    while stack:
        for number in graph.readers[stack.pop()]:
            edge = graph.edges[number]
            node = graph.nodes[edge.consumer]
            if _repeats(graph, node):
                stack.extend(node.outputs)
            elif value not in owner or not _is_penalty(graph, node, owner):
                found.append(edge)
    plain = len(found) == 1 and len(found[0].sources) == 1 and not found[0].delayed
    return found[0] if plain else None


def _is_penalty(graph: Graph, node: Node, owner: Mapping[int, int]) -> bool:
    """Whether a node that reads a parameter is an objective, or computes a function of parameters alone.

    A product, and a recurrence, which may hold some, is none.
    """
    if node.kind == "objective":
        return True
    holds_layers = _product_of(node) is not None or (node.equation is not None and node.equation.name == "scan")
    shown = (value for e in node.edges for value in graph.edges[e].sources)
    return not holds_layers and all(_original(graph, value) in owner for value in shown)


def _original(graph: Graph, value: int) -> int:
    """The value that a value repeats, through identities and conversions."""
    while _repeats(graph, maker := graph.nodes[graph.producers[value]]):
        value = graph.edges[maker.edges[0]].sources[0]
    return value


def _repeats(graph: Graph, node: Node) -> bool:
    """Whether a node's output is its operand: an identity, or a conversion to another type (mixed precision)."""
    if node.kind == "identity":
        return True
    if not isinstance(node.rule, Scalar) or not node.rule.repeats:
        return False
    (edge,) = (graph.edges[e] for e in node.edges)
    return edge.view.is_identity and len(edge.sources) == 1 and not edge.delayed


def _product_of(node: Node) -> Equation | None:
    """The equation of a node that is a product or a convolution."""
    names = ("dot_general", "conv_general_dilated")
    return node.equation if node.equation is not None and node.equation.name in names else None


def _layer(graph: Graph, edge: Edge, position: int) -> Layer | None:
    """The layer whose weight an edge shows, without its bias; `None` where the node is no layer."""
    node = graph.nodes[edge.consumer]
    equation = _product_of(node)
    if equation is None or not edge.view.is_identity:
        return None
    operands = [i for i, is_unknown in enumerate(node.unknown) if is_unknown]
    place = operands[[graph.edges[e] is edge for e in node.edges].index(True)]
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


def _bias(graph: Graph, weight: Edge, owner: Mapping[int, int], layer: Layer) -> tuple[int | None, float]:
    """The parameter that is added to a product along the axis of the weight's outputs, and the factor of the layer."""
    node = graph.nodes[layer.node]
    product = only_reader(graph, node.outputs[0], owner)
    if layer.out is None or product is None:
        return None, 1.0
    assert node.equation is not None
    axis = _followed(product.view, _output_axis(node.equation, 1 - layer.operand))
    reader = graph.nodes[product.consumer]
    terms = {t.variable: t for t in getattr(reader.rule, "terms", ()) if not t.factors and not t.axes}
    for edge in (graph.edges[e] for e in reader.edges):
        value = _original(graph, edge.sources[0])
        summed = {edge.variable, product.variable} <= {*terms}
        if not summed or value not in owner or only_reader(graph, value, owner) is not edge:
            continue
        shape = graph.values[value].shape
        wide = [a for a, n in enumerate(shape) if n != 1]
        fits = len(wide) == 1 and shape[wide[0]] == weight.variable.shape[layer.out]
        if fits and axis is not None and _followed(edge.view, wide[0]) == axis:
            return owner[value], terms[product.variable].scale / terms[edge.variable].scale
    return None, 1.0


def _branches(graph: Graph, without: Collection[int]) -> int:
    """The nodes in branches: between a value and a sum of it with what is computed from it; as the bits of a number.

    Sums with values among `without` do not count.
    """
    found = 0
    for node in graph.nodes:
        if isinstance(node.rule, Scalar) and len(node.edges) > 1:
            shown = (_original(graph, v) for e in node.edges for v in graph.edges[e].sources)
            makers = {graph.producers[v] for v in shown if v not in without}
            for start in makers:
                for end in (m for m in makers if graph.behind[m] >> start & 1):
                    found |= graph.ahead[start] & (graph.behind[end] | 1 << end)
    return found


def _stream(graph: Graph, owner: Mapping[int, int], layer: Layer) -> tuple[tuple[int, int] | None, float]:
    """The sum of a layer's outputs with a value that they are computed from, past sums with parameters.

    **Returns:** `stream` and `stream_factor`, as in [`Layer`][].
    """
    node, stream_factor = graph.nodes[layer.node], 1.0
    assert node.equation is not None
    axis = None if layer.out is None else _output_axis(node.equation, 1 - layer.operand)
    edge = only_reader(graph, node.outputs[0], owner)
    while edge is not None and axis is not None:
        node, axis = graph.nodes[edge.consumer], _followed(edge.view, axis)
        if not isinstance(node.rule, Scalar) or not node.rule.is_sum or axis is None:
            break
        stream_factor *= abs(sum(t.scale for t in node.rule.terms if t.variable == edge.variable))
        others = (_original(graph, v) for e in node.edges for v in graph.edges[e].sources)
        if any(graph.behind[layer.node] >> graph.producers[v] & 1 for v in others if v not in owner):
            return (node.outputs[0], axis), stream_factor
        edge = only_reader(graph, node.outputs[0], owner)
    return None, 1.0


def _output_axis(equation: Equation, place: int) -> int:
    """The axis of a product's output that is the one free axis of its operand `place`."""
    if equation.name == "conv_general_dilated":
        return equation.params["dimension_numbers"].out_spec[1]
    contracted = equation.params["dimension_numbers"][0]
    return 0 if place == 0 else len(equation.inputs[0].shape) - len(contracted[0])


def _followed(view: View, axis: int) -> int | None:
    """The axis to which a view takes an axis of its one operand; `None` where it is not known."""
    variable: Variable = view.operands[0]
    for equation in view.equations:
        if len(equation.inputs) != 1 or equation.inputs[0] != variable:
            return None
        before, params = variable, equation.params
        variable = equation.outputs[0]
        moved = None
        if equation.name == "transpose":
            moved = tuple(params["permutation"]).index(axis)
        elif equation.name == "broadcast_in_dim":
            moved = params["broadcast_dimensions"][axis]
        elif equation.name in ("reshape", "squeeze", "expand_dims"):
            moved = _reshaped(before.shape, variable.shape, axis)
        if moved is None:
            return None
        axis = moved
    return axis


def _reshaped(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """The axis of a reshaped array with the entries of an axis before, `None` where there is none."""
    count = math.prod(before[:axis])
    found = [i for i, n in enumerate(after) if n == before[axis] and math.prod(after[:i]) == count]
    return found[0] if found else None
