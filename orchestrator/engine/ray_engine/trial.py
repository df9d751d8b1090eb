"""One shard as a Tune trainable. Each step of the trainable is one committed step of the stream.

An actor runs many shards one after another (``reuse_actors``) and keeps the loaded model in its
:class:`~orchestrator.engine.worker.Worker`. Tune's checkpoints are not used: a restarted trial reads
its position from the journal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ray import tune

from orchestrator.engine.causes import Cause
from orchestrator.engine.ray_engine.causes import TaskFailed
from orchestrator.engine.worker import StepReport, Worker, passing
from orchestrator.planning.work import Work


class ShardTrial(tune.Trainable):
    """Runs the shard ``work.shards[config["shard"]]``. ``tune.with_parameters`` supplies work, root
    and run_id.

    Tune repeats every trial that raises. A trial with an error that is not temporary therefore
    ends normally, with the cause in its result.
    """

    def setup(
        self, config: dict[str, Any], work: Work | None = None, root: str = "", run_id: str = ""
    ) -> None:
        assert work is not None
        self._work = work
        self._worker = Worker(root, run_id, own_code=work.common.model.trust_remote_code)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._shard = self._work.shards[config["shard"]]
        self._steps: Iterator[StepReport] | None = None

    def step(self) -> dict[str, Any]:
        """Commit one step. The first call claims the shard and reports where it continues."""
        if self._steps is None:
            self._steps = self._worker.run(self._work.manifest(self._shard))
        try:
            report = next(self._steps, None)
        except Exception as error:
            cause = Cause.of(error)
            if passing(error):
                raise TaskFailed(cause) from error  # Tune launches the trial again
            return {"done": True, "report": None, "failed": dataclasses.asdict(cause)}
        if report is None:
            return {"done": True, "report": None}
        return {"done": report.tick == report.ticks, "report": dataclasses.asdict(report)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """No-op: progress is in the journal."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """No-op: progress is in the journal."""
