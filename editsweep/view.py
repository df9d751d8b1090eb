"""Progress of a run as log messages."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from workers.inputs import counted

if TYPE_CHECKING:
    from orchestrator.engine.worker import StepReport
    from orchestrator.planning.plan import Plan
    from orchestrator.planning.work import Shard

log = logging.getLogger("editsweep")


class LogView:
    """Notes at level INFO, warnings at level WARNING, every committed step at level DEBUG."""

    def begin(self, plan: Plan) -> None:
        log.info(
            "%s, %s, %s to make",
            counted(len(plan.cells), "cell"),
            counted(len(plan.shards), "shard"),
            counted(plan.edits_left, "edit"),
        )

    def note(self, text: str) -> None:
        log.info("%s", text)

    def warn(self, text: str) -> None:
        log.warning("%s", text)

    def artifact_step(self, title: str, done: int, total: int, what: str) -> None:
        log.debug("building %s: %d of %d (%s)", title, done, total, what)

    def artifact_ended(self, title: str) -> None:
        pass

    def shard_started(self, shard: Shard, title: str) -> None:
        log.info("%s: started", title)

    def shard_step(self, step: StepReport) -> None:
        log.debug("shard %s: tick %d of %d", step.shard_id, step.tick, step.ticks)

    def shard_ended(self, shard_id: str, ok: bool) -> None:
        log.info("shard %s: %s", shard_id, "finished" if ok else "failed")

    def end(self) -> None:
        pass
