"""Random graphs of the depth-first task: labelled trees and connected small-world graphs."""

import heapq
import random
from collections.abc import Sequence

from common.errors import ConfigError

Graph = Sequence[set[int]]
"""Neighbours of each node 0 ... n - 1."""


def random_tree(generator: random.Random, nodes: int) -> Graph:
    """Return a uniformly random labelled tree.

    Args:
        generator: Random numbers.
        nodes: At least 2.

    Source:
        Pruefer's bijection between trees and sequences of n - 2 labels.
    """
    if nodes < 2:
        raise ConfigError(f"nodes={nodes}: expected at least 2")
    code = [generator.randrange(nodes) for _ in range(nodes - 2)]
    missing = [1] * nodes
    for node in code:
        missing[node] += 1
    leaves = [node for node in range(nodes) if missing[node] == 1]
    graph: list[set[int]] = [set() for _ in range(nodes)]
    for node in code:
        _connect(graph, heapq.heappop(leaves), node)
        missing[node] -= 1
        if missing[node] == 1:
            heapq.heappush(leaves, node)
    _connect(graph, heapq.heappop(leaves), heapq.heappop(leaves))
    return graph


def small_world(
    generator: random.Random, nodes: int, *, neighbours: int = 4, rewiring: float = 0.1
) -> Graph:
    """Return a connected Watts-Strogatz graph; unconnected ones are drawn again.

    Args:
        generator: Random numbers.
        nodes: More than ``neighbours``.
        neighbours: Even number of nearest neighbours on the ring that a node starts with.
        rewiring: Probability that an edge gets a random other end.

    Source:
        Watts and Strogatz 1998; edges are visited by distance, then by node.
    """
    if neighbours % 2 or not 2 <= neighbours < nodes:
        raise ConfigError(
            f"neighbours={neighbours}: expected an even number, 2 to below nodes={nodes}"
        )
    while True:
        graph: list[set[int]] = [set() for _ in range(nodes)]
        ring = [
            (u, (u + step) % nodes) for step in range(1, neighbours // 2 + 1) for u in range(nodes)
        ]
        for u, v in ring:
            _connect(graph, u, v)
        for u, v in ring:
            free = [w for w in range(nodes) if w != u and w not in graph[u]]
            if generator.random() < rewiring and free:
                graph[u].remove(v)
                graph[v].remove(u)
                _connect(graph, u, generator.choice(free))
        if is_connected(graph):
            return graph


def is_connected(graph: Graph) -> bool:
    """Return whether every node can be reached from node 0."""
    seen, waiting = {0}, [0]
    while waiting:
        fresh = graph[waiting.pop()] - seen
        seen |= fresh
        waiting += fresh
    return len(seen) == len(graph)


def _connect(graph: list[set[int]], u: int, v: int) -> None:
    graph[u].add(v)
    graph[v].add(u)
