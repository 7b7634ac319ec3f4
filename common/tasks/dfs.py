"""Recursive state: a depth-first search is told step by step; where does it stand at the end?

A document is a trace, then the state: ``AEK-EC-E-AQ?Q;AQ;ACEKQ``. A capital letter or a digit
pushes that node, ``-`` goes back one, to the node that follows it; the answer gives the current
node, the stack from the start on, and the visited nodes in order of their symbols.
"""

import random
from dataclasses import dataclass, field
from typing import ClassVar

from common.config import within
from common.errors import ConfigError
from common.tasks.base import Example, Task, written
from common.tasks.graphs import Graph, random_tree, small_world

SYMBOLS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BACK, ASK, NEXT = "-", "?", ";"
MIN_NODES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthFirst(Task):
    """State of a depth-first search after some steps, from its trace.

    Half of the graphs are random trees, half connected Watts-Strogatz graphs (4 neighbours,
    rewiring 0.1). From the top of the stack the smallest unvisited neighbour is pushed, else it is
    popped; graphs whose search is over by the asked step are drawn again, with another step.

    Attributes:
        nodes: Fewest and most nodes of a graph, 6 to 36.
        steps: Fewest and most steps (pushes and pops) that are told.
        named: Tell to which node a step goes back; without it the reader has to keep the stack.
        relabel: Name the nodes by random symbols, so that names say nothing about the graph.

    Source:
        The recursive state query of arXiv 2604.04921; deviations: a trace is given instead of the
        graph, and the answer is text instead of JSON, for models that are trained on this alone.
    """

    nodes: tuple[int, int] = (10, 20)
    steps: tuple[int, int] = (5, 19)
    named: bool = True
    relabel: bool = True
    name: ClassVar[str] = "dfs"

    def __post_init__(self) -> None:
        # The two-argument form: slots make a new class, which super() without them misses.
        super(DepthFirst, self).__post_init__()
        for name, low, high in (("nodes", MIN_NODES, len(SYMBOLS)), ("steps", 1, 1 << 20)):
            first, last = getattr(self, name)
            within(f"task.{name}[0]", first, low, high)
            within(f"task.{name}[1]", last, first, high)
        if self.steps[0] > 2 * self.nodes[1] - 2:
            raise ConfigError(
                f"task.steps={list(self.steps)}: a search of {self.nodes[1]} nodes has left its "
                f"start after {2 * self.nodes[1] - 1} steps; ask for fewer, or raise task.nodes"
            )

    def document(self, index: int) -> str:
        """Return a trace and its state."""
        told = self._draw(self.generator("document", index))
        return f"{told.trace}{ASK}{told.state}{self.end}"

    def example(self, index: int) -> Example:
        """Return a trace; needles are the pushes still on the stack.

        Facts: ``steps``, ``depth`` (length of the stack) and ``visited`` (number of nodes).
        """
        told = self._draw(self.generator("example", index))
        return Example(
            prompt=told.trace + ASK,
            answer=told.state,
            needles=tuple((start, start + 1) for start in told.places),
            facts={
                "steps": float(told.steps),
                "depth": float(len(told.stack)),
                "visited": float(len(told.visited)),
            },
        )

    def score(self, example: Example, output: str) -> dict[str, float]:
        """Return the figures of each part of the state, and ``exact`` for all three.

        ``current``, ``stack`` and ``visited`` are strict; ``depth`` and ``top`` compare length and
        last symbol of the stacks, ``overlap`` the share of equal places, ``visited_f1`` the sets.
        """
        text = written(output, self.end)
        current, stack, visited = _parts(example.answer)
        got_current, got_stack, got_visited = _parts(text)
        same = sum(a == b for a, b in zip(stack, got_stack, strict=False))
        return {
            "exact": float(text == example.answer),
            "current": float(got_current == current),
            "stack": float(got_stack == stack),
            "depth": float(len(got_stack) == len(stack)),
            "top": float(got_stack[-1:] == stack[-1:]),
            "overlap": same / max(len(stack), len(got_stack)),
            "visited": float(got_visited == visited),
            "visited_f1": _f1(set(visited), set(got_visited)),
        }

    def _draw(self, generator: random.Random) -> "Told":
        """Return the trace of a search that goes on after it."""
        while True:
            nodes, steps = generator.randint(*self.nodes), generator.randint(*self.steps)
            graph = (random_tree if generator.random() < 0.5 else small_world)(generator, nodes)
            events = search(graph, steps)
            if events is not None:
                break
        names = generator.sample(SYMBOLS, nodes) if self.relabel else list(SYMBOLS)
        told = Told()
        for node in events:
            told.tell(None if node is None else names[node], named=self.named)
        return told


@dataclass(slots=True)
class Told:
    """What has been told of a search, and where it stands.

    Attributes:
        trace: The text so far.
        stack: Path from the start to the current node.
        places: Where in the trace each node of the stack was pushed.
        visited: Nodes in order of their first visit.
        steps: Pushes and pops after the start.
    """

    trace: str = ""
    stack: str = ""
    places: list[int] = field(default_factory=list)
    visited: str = ""
    steps: int = -1

    def tell(self, symbol: str | None, *, named: bool) -> None:
        """Add a push of a node, or a pop for None; ``named`` writes where a pop leads."""
        self.steps += 1
        if symbol is None:
            self.stack = self.stack[:-1]
            self.places.pop()
            self.trace += BACK + (self.stack[-1] if named else "")
        else:
            self.stack += symbol
            self.visited += symbol
            self.places.append(len(self.trace))
            self.trace += symbol

    @property
    def state(self) -> str:
        """The answer: current node, stack, visited nodes."""
        return NEXT.join((self.stack[-1], self.stack, "".join(sorted(self.visited))))


def search(graph: Graph, steps: int) -> list[int | None] | None:
    """Return the first steps of a depth-first search from node 0.

    Args:
        graph: Neighbours of each node.
        steps: Pushes and pops after the start; popping the start is the last one.

    Returns:
        The pushed nodes, beginning with 0, None for a pop; None if the search is over by then.
    """
    stack, seen = [0], {0}
    told: list[int | None] = [0]
    for _ in range(steps):
        fresh = graph[stack[-1]] - seen
        if fresh:
            node = min(fresh)
            stack.append(node)
            seen.add(node)
            told.append(node)
        else:
            stack.pop()
            told.append(None)
        if not stack:
            return None
    return told


def _parts(text: str) -> tuple[str, str, str]:
    current, stack, visited, *_ = [*text.split(NEXT), "", "", ""]
    return current, stack, visited


def _f1(wanted: set[str], found: set[str]) -> float:
    return 2 * len(wanted & found) / (len(wanted) + len(found))
