"""A Ray cluster of two nodes on this machine, for :mod:`tests.chaos.run`.

    python -m tests.chaos.stage

prints ``address HOST:PORT`` and then obeys one word a line on its standard input, each answered by ``done``: ``remove`` kills the
second node as if its machine had gone, ``pause`` stops the node and all its workers in their tracks, ``wake`` lets them go on,
``renew`` puts a fresh second node in the old one's place. Ends with its standard input.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
from ray.cluster_utils import Cluster, cluster_not_supported

_SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 4,
}
"""A silent node is dead after two seconds instead of half a minute."""


class Stage:
    """The cluster; the second node is the one that suffers."""

    def __init__(self) -> None:
        head = {**_SMALL, "include_dashboard": False, "_system_config": _HEALTH}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)  # type: ignore[no-untyped-call]
        self.node = self._add()
        self.asleep: list[psutil.Process] = []

    def _add(self) -> Any:
        return self.cluster.add_node(**_SMALL)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        self.cluster.remove_node(self.node, allow_graceful=False)  # type: ignore[no-untyped-call]

    def pause(self) -> None:
        (raylet,) = self.node.all_processes["raylet"]
        process = psutil.Process(raylet.process.pid)
        self.asleep = [process, *process.children(recursive=True)]
        for each in self.asleep:
            each.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        for each in self.asleep:
            if each.is_running():
                each.send_signal(signal.SIGCONT)

    def renew(self) -> None:
        if self.node in self.cluster.list_all_nodes():  # type: ignore[no-untyped-call]
            self.remove()
        self.node = self._add()


def main() -> None:
    assert not cluster_not_supported
    stage = Stage()
    say = sys.stdout
    say.write(f"address {stage.cluster.address}\n")
    say.flush()
    for line in sys.stdin:
        {"remove": stage.remove, "pause": stage.pause, "wake": stage.wake, "renew": stage.renew}[line.strip()]()
        say.write("done\n")
        say.flush()
    stage.cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
