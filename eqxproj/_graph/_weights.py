"""The weights of a graph's edges, as logarithms: the metric, applied from the objective back.

Transforms a graph and a metric into one logarithm for each edge. Limits: one weight for all elements of an operand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .._metric import Metric
from ._graph import Edge, Graph

_CYCLE_OFFSET = 80.0
"""Added to the logarithms of what lies as deep as a cycle in a steep metric: beyond both clamps."""


def edge_logs(graph: Graph, metric: Metric, offset: float = 0.0) -> tuple[float, ...]:
    """The logarithm of the weight of each edge; `offset` is the one of the objective's own edges.

    Around the cycles of an unrolled recurrence weights would have to grow from time step to time step, but an edge has
    one weight. In a steep metric all that lies as deep as a cycle therefore gets so large a further offset that nothing
    there moves. The ratios stay exact ([`reader_logs`][]).
    """
    log_weight = metric.log_weight
    cycle = graph.cyclic_depth if metric.in_gradient_regime else math.inf

    def log(edge: Edge) -> float:
        depth = graph.depth[edge.consumer]
        further = 0.0 if depth < cycle else _CYCLE_OFFSET
        return offset + further + log_weight(depth, edge.is_parameter)

    return tuple(map(log, graph.edges))


def reader_logs(graph: Graph, metric: Metric, logs: Sequence[float], value: int) -> list[float]:
    """The logarithms of the weights with which the readers of a value count in its output weight, in their order.

    One that reads it a time step later is nearer to the objective by that step: in a steep metric it counts for less
    than the operands that the value is computed from, whatever its depth within the time step.
    """
    found = []
    for edge in graph.readers[value]:
        log = logs[edge]
        if metric.in_gradient_regime and value in graph.edges[edge].delayed:
            own = graph.nodes[graph.producers[value]].edges
            log = min([log, *(logs[e] - math.log(metric.grade) for e in own)])
        found.append(log)
    return found
