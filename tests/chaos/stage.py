"""A Ray cluster of two nodes on this machine, for :mod:`tests.chaos.run`.

    python -m tests.chaos.stage

prints ``address HOST:PORT`` and then obeys one word a line on its standard input, each answered by
``done``: ``remove`` kills the second node as if its machine had gone, ``pause`` stops the node and
all its workers in their tracks, ``mourn`` waits until the first node has declared it dead, ``wake``
lets them go on, ``renew`` puts a fresh second node in the old one's place. Ends with its standard
input.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
from ray.cluster_utils import Cluster, cluster_not_supported

from tests.waiting import wait_for

_SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}
"""A silent node is dead after ten seconds instead of half a minute; one on a busy machine is not
silent for so long."""


class Stage:
    """The cluster; the second node is the one that suffers."""

    def __init__(self) -> None:
        head = {**_SMALL, "include_dashboard": False, "_system_config": _HEALTH, "wait": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)  # type: ignore[no-untyped-call]
        self._until_alive(1)
        self.node = self._add()
        self.asleep: list[psutil.Process] = []

    def _add(self) -> Any:
        node = self.cluster.add_node(wait=False, **_SMALL)  # type: ignore[no-untyped-call]
        self._until_alive(2)
        return node

    def _until_alive(self, nodes: int) -> None:
        """Wait until so many nodes count as alive (Ray's own waiting gives up after half a
        minute)."""
        wait_for(lambda: len(self.cluster.global_state._live_node_ids()) == nodes)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        self.cluster.remove_node(self.node, allow_graceful=False)  # type: ignore[no-untyped-call]

    def pause(self) -> None:
        (raylet,) = self.node.all_processes["raylet"]
        process = psutil.Process(raylet.process.pid)
        self.asleep = [process, *process.children(recursive=True)]
        for each in self.asleep:
            each.send_signal(signal.SIGSTOP)

    def mourn(self) -> None:
        self._until_alive(1)

    def wake(self) -> None:
        for each in self.asleep:
            if each.is_running():
                each.send_signal(signal.SIGCONT)

    def renew(self) -> None:
        if self.node in self.cluster.list_all_nodes():  # type: ignore[no-untyped-call]
            self.remove()
        self._until_alive(1)
        self.node = self._add()


def main() -> None:
    assert not cluster_not_supported
    stage = Stage()
    say = sys.stdout
    say.write(f"address {stage.cluster.address}\n")
    say.flush()
    orders = {name: getattr(stage, name) for name in ("remove", "pause", "mourn", "wake", "renew")}
    for line in sys.stdin:
        orders[line.strip()]()
        say.write("done\n")
        say.flush()
    stage.cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
