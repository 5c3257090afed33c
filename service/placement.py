"""Which node a gang goes to: all its GPUs on one node, and large gaps kept for large gangs.

Best fit: the fullest node that still holds the gang. With gangs of 1, 2, 4 and 8 GPUs on nodes of
8 this leaves no two nodes half empty where one would do. Decides only; a runner places. Imports
nothing, so that it is tested, and simulated, alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """A machine with GPUs."""

    name: str
    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)
    """Such as {"gpu": "H200"}."""

    def has(self, labels: Mapping[str, str]) -> bool:
        """Whether the node carries all of these labels."""
        return all(self.labels.get(name) == value for name, value in labels.items())


class Placement:
    """Keeps the account of who sits where.

    Args:
        nodes: All nodes, whatever their state; names are unique.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self._free = {node.name: node.gpus for node in nodes}
        self._seats: dict[Hashable, tuple[str, int]] = {}

    def free_gpus(self, name: str) -> int:
        """GPUs of a node that no gang holds."""
        return self._free[name]

    def node_of(self, key: Hashable) -> str:
        """Where a gang sits. Raises KeyError when it sits nowhere."""
        return self._seats[key][0]

    def gpus_of(self, key: Hashable) -> int:
        """How many GPUs a gang holds. Raises KeyError when it sits nowhere."""
        return self._seats[key][1]

    def gangs_on(self, name: str) -> list[Hashable]:
        """Keys of the gangs on a node."""
        return [key for key, (node, _) in self._seats.items() if node == name]

    def num_fitting(
        self,
        gpus: int,
        labels: Mapping[str, str] | None = None,
        closed: frozenset[str] = frozenset(),
        empty: bool = False,
    ) -> int:
        """How many gangs of this size fit now, or would if nothing ran.

        Args:
            gpus: Of one gang.
            labels: That its node must carry.
            closed: Nodes that take no gang.
            empty: Count as if nothing ran.
        """
        return sum(
            (node.gpus if empty else self._free[node.name]) // gpus
            for node in self.nodes.values()
            if node.name not in closed and node.has(labels or {})
        )

    def place(
        self,
        key: Hashable,
        gpus: int,
        labels: Mapping[str, str] | None = None,
        closed: frozenset[str] = frozenset(),
    ) -> str | None:
        """Seat a gang on the fullest node that holds it, the first of equals.

        Returns:
            The node's name; None = it fits nowhere now.
        """
        fitting = [
            node.name
            for node in self.nodes.values()
            if self._free[node.name] >= gpus and node.name not in closed and node.has(labels or {})
        ]
        if not fitting:
            return None
        chosen = min(fitting, key=self._free.__getitem__)
        self._free[chosen] -= gpus
        self._seats[key] = (chosen, gpus)
        return chosen

    def release(self, key: Hashable) -> str:
        """Free a gang's GPUs and return its node's name."""
        name, gpus = self._seats.pop(key)
        self._free[name] += gpus
        return name
