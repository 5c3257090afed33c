"""Which nodes take no trial for now: those on which attempts keep failing, and those that are not
clean yet.

Keeps the account only; `service.policies.is_quarantined` decides. Used by the runner on Ray and by
the pretended cluster, so that what is simulated is what happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from service.policies import Policy, is_quarantined


class Quarantine:
    """The account of one runner.

    Args:
        policy: How many failures close a node, and for how long.
        clock: Seconds that only grow.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._failed_at: dict[str, list[float]] = {}
        """Since the last attempt on the node that ended well, oldest first."""
        self._unclean = Counter[str]()
        """Node -> ended attempts whose processes may still be there."""

    def failed(self, node: str) -> None:
        """An attempt on this node failed through nobody's choice."""
        self._failed_at.setdefault(node, []).append(self._clock())

    def ended_well(self, node: str) -> None:
        """An attempt on this node came to an end of its own: what failed before is forgotten."""
        self._failed_at.pop(node, None)

    def unclean(self, node: str) -> None:
        """Processes of an ended attempt may still hold the node's GPUs."""
        self._unclean[node] += 1

    def clean(self, node: str) -> None:
        """They are gone, or the node is."""
        self._unclean[node] -= 1
        self._unclean += Counter()  # drops what is not above zero

    def closed_until(self) -> dict[str, float]:
        """Nodes closed for their failures -> when they open again."""
        now = self._clock()
        return {
            node: times[-1] + self._policy.quarantine_s
            for node, times in list(self._failed_at.items())
            if is_quarantined(times, now, self._policy)
        }

    def unclean_nodes(self) -> frozenset[str]:
        """Nodes where processes of ended attempts may still be."""
        return frozenset(self._unclean)
