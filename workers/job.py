"""A stream's work as frozen data. Does not import torch.

The planner writes a :class:`StreamJob` into a shard's manifest; a stream executes it tick by tick.
It holds everything that determines the bits of the result (lanes, batch composition, scoring
batches), so that a shard resumed on another machine repeats exactly the same arithmetic.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from workers.types import JSON, Frozen, Written

Rollback = Literal["group", "never"]


BATCHING = "batching"
"""Marks a setting that decides how scoring is split into batches. It changes the speed of scoring,
and its numbers only by rounding."""

KEEPING = "keeping"
"""Marks a setting that decides what is kept beside the scores. It changes no score, and enters no
identity: neither a cell's, nor a shard's, nor that of a sweep's scoring."""


class ScoreConfig(Written):
    """The moments that are scored, and the sizes of the frozen scoring batches.

    Further keys are settings of single scores. Each score declares its own
    (:mod:`workers.scoring.registry`) and checks them when a spec is read; here they are plain JSON
    values.
    """

    model_config = ConfigDict(extra="allow")

    immediate: bool = Field(True, description="score every edit right after it is made")
    generated: bool = Field(True, description="fill the *_generated columns by greedy generation")
    score_at: tuple[int, ...] = Field(
        (), description="edit counts at which everything edited so far is scored too"
    )
    rows_per_batch: Annotated[int, BATCHING] = Field(
        256, ge=1, description="sequences of one scoring forward, at most"
    )
    tokens_per_batch: Annotated[int, BATCHING] = Field(
        1024, ge=1, description="tokens of one scoring forward, padding included, at most"
    )
    requests_per_tick: Annotated[int, BATCHING] = Field(
        25, ge=1, description="requests a lane has scored between two possible commits"
    )
    extra_tokens: int = Field(
        4, ge=1, le=10_000, description="tokens greedy generation may run beyond the target before it is cut"
    )
    keep_outputs: Annotated[Literal["first", "none", "failures", "all"], KEEPING] = Field(
        "first",
        description="what the models wrote that is kept in the table outputs: first (all of the final state, "
        "for the first 100 requests of a cell), none, failures (wrong answers, at every moment) or all",
    )

    def core(self) -> dict[str, JSON]:
        """The settings that belong to no single score and enter a shard's id."""
        return self.model_dump(mode="json", include=self._unmarked(KEEPING))

    def identity(self) -> dict[str, JSON]:
        """The core settings that change the numbers in the table."""
        return self.model_dump(mode="json", include=self._unmarked(BATCHING, KEEPING))

    @classmethod
    def _unmarked(cls, *marks: str) -> set[str]:
        fields = cls.model_fields.items()
        return {name for name, field in fields if not any(mark in field.metadata for mark in marks)}


class StreamCell(Frozen):
    """The part of a cell that differs between the lanes of one stream."""

    cell_id: str
    seed: int
    T: int | None = Field(
        None, ge=1, description="where it is not the job's: several T of one continual stream"
    )
    artifacts: dict[str, str] = Field(
        default_factory=dict, description="what the method calls it -> artifact key"
    )


class Share(Frozen):
    """The groups that a lane reports: ``group .. stop_group`` (exclusive) of ``cells[cell]``."""

    cell: int = 0
    group: int
    stop_group: int


class Lane(Share):
    """One lane of one wave. The lane itself is its first share.

    With ``rollback: group`` a lane holds exactly one group. A group of a smaller T that starts at
    the same request has the same first edits (no random number depends on T), so the lane may
    report ``also`` to such groups, one per T. With ``rollback: never`` the lane edits from the
    first request to the end of the last group, and reports only the groups of its shares. There T
    decides only when to score, so the lane may report ``also`` to cells of any other T. In both
    cases each cell gets the same rows as from a lane of its own.
    """

    also: tuple[Share, ...] = ()

    @property
    def shares(self) -> tuple[Share, ...]:
        return (self, *self.also)


class StreamJob(Frozen):
    """One shard's work. Lanes of a wave run in lockstep; waves run one after another, each from the
    pristine model."""

    method: str
    config: dict[str, Any]
    places: dict[str, str] = Field(
        default_factory=dict, description="where the folders lie that the config names, if elsewhere"
    )
    cells: tuple[StreamCell, ...]
    T: int = Field(ge=1)
    batch_size: int = Field(1, ge=1)
    whole_group: bool = Field(
        False, description="the method edits a group in one call: there is no moment but the final one"
    )
    rollback: Rollback = "group"
    waves: tuple[tuple[Lane, ...], ...]
    score: ScoreConfig = ScoreConfig()
    chat_template: bool = False
    template: dict[str, Any] = Field(default_factory=dict, description="variables of the chat template")

    def T_of(self, share: Share) -> int:
        """Edits per group of the cell of ``share``."""
        return self.cells[share.cell].T or self.T

    def lane_edits(self, lane: Lane) -> int:
        """Number of edits a lane makes, counted from its pristine state."""
        return self.T if self.rollback == "group" else max(s.stop_group * self.T_of(s) for s in lane.shares)

    @model_validator(mode="after")
    def _lockstep(self) -> Self:
        for T in (self.T, *(cell.T for cell in self.cells if cell.T is not None)):
            if T % self.batch_size:
                raise ValueError(
                    f"batch_size {self.batch_size} does not divide T={T}: batches never cross a group border"
                )
        if self.whole_group and any((cell.T or self.T) != self.batch_size for cell in self.cells):
            raise ValueError(f"a method that edits whole groups has batch_size T, not {self.batch_size}")
        for wave in self.waves:
            if not wave:
                raise ValueError("a wave needs at least one lane")
            for lane in wave:
                for share in lane.shares:
                    if not 0 <= share.cell < len(self.cells):
                        raise ValueError(f"lane refers to cell {share.cell} of {len(self.cells)}")
                    if self.cells[share.cell].seed != self.cells[lane.cell].seed:
                        raise ValueError(
                            "a lane reports to cells of one seed: another has its requests in another order"
                        )
                if self.rollback == "group":
                    self._check_group(lane)
                elif self._spans(lane) != self._spans(wave[0]):
                    raise ValueError("with rollback 'never' the lanes of a wave cover the same groups")
        return self

    def _check_group(self, lane: Lane) -> None:
        if any(share.stop_group != share.group + 1 for share in lane.shares):
            raise ValueError("with rollback 'group' a lane holds exactly one group")
        if self.T_of(lane) != self.T:
            raise ValueError(
                f"with rollback 'group' a lane makes a group of the job's T={self.T}, not of another"
            )
        sizes = [self.T_of(share) for share in lane.also]
        if any(T >= self.T for T in sizes) or len(set(sizes)) < len(sizes):
            raise ValueError(
                f"with rollback 'group' a lane of T={self.T} reports also to smaller T, to each once"
            )
        if any(share.group * T != lane.group * self.T for share, T in zip(lane.also, sizes, strict=True)):
            raise ValueError("with rollback 'group' a lane reports to groups that start where its own does")

    def _spans(self, lane: Lane) -> list[tuple[int, int, int]]:
        return [(self.T_of(share), share.group, share.stop_group) for share in lane.shares]


def first_request(job: StreamJob, lane: Lane) -> int:
    """Index of the first request after the lane's pristine state, in the order of its seed."""
    return lane.group * job.T if job.rollback == "group" else 0
