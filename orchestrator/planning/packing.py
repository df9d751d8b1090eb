"""Pack groups into waves of lanes, and waves into shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from orchestrator.planning.makespan import wave_work
from orchestrator.planning.spec import SweepSpec
from orchestrator.planning.work import Cell, GroupRange, Variant, groups_per_wave
from orchestrator.results.manifest import ShardManifest

Member = TypeVar("Member")


UNKNOWN_ACTORS = 64
"""Assumed number of actors if the spec has no ``engine.max_actors``."""


Span = tuple[int, int, tuple[int, ...]]
"""Groups ``start .. stop`` (exclusive) of a cell, and the smaller T that have a group to run which
starts at the same request as each of these groups."""


@dataclass(frozen=True, slots=True)
class Chain:
    """All groups that are left of the cells ``cells``, which share waves, as ascending spans. A
    wave may contain groups of several spans. Without rollback there is one span.

    ``riders``: T -> cells whose groups are served by the same lanes, with the seeds in the same
    order. ``also``: see :class:`~orchestrator.planning.work.GroupRange`.
    """

    cells: tuple[int, ...]
    spans: tuple[Span, ...]
    also: tuple[GroupRange, ...] = ()
    riders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def runs(self) -> Iterator[GroupRange]:
        along = {sizes: tuple(self.riders[T] for T in sizes) for sizes in {sizes for *_, sizes in self.spans}}
        for start, stop, sizes in self.spans:
            yield GroupRange(self.cells, start, stop, self.also, along[sizes])


@dataclass(frozen=True, slots=True)
class Waves:
    """``count`` equal, consecutive waves of a chain. Each contains ``groups`` groups of every cell.
    ``lanes``, ``edits`` and ``work`` are those of one wave."""

    count: int
    groups: int
    lanes: int
    edits: int
    work: float


@dataclass(frozen=True)
class Effort:
    """Computes the work of waves (unit: see :mod:`orchestrator.planning.makespan`) from the spec
    and the methods alone."""

    spec: SweepSpec
    cells: Sequence[Cell]
    variants: Sequence[Variant]
    costs: Sequence[float]
    widths: Mapping[tuple[int, int], int]
    """(variant, T) -> largest number of lanes of a wave."""

    _known: dict[tuple[object, ...], tuple[Waves, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Cache: waves of the chains of equal shape, of which a sweep has few."""

    def waves(self, variant: int, T: int, chain: Chain) -> tuple[Waves, ...]:
        """A chain's waves in order: full waves, then a smaller one for the rest."""
        if self.spec.grid.rollback == "never":
            return tuple(self._continued(variant, run) for run in chain.runs())
        key = (variant, T, len(chain.cells), chain.spans)
        if key not in self._known:
            alike: list[Waves] = []
            for wave in self._filled(*key):
                if alike and replace(alike[-1], count=wave.count) == wave:
                    alike[-1] = replace(wave, count=alike[-1].count + wave.count)
                else:
                    alike.append(wave)
            self._known[key] = tuple(alike)
        return self._known[key]

    def _continued(self, variant: int, run: GroupRange) -> Waves:
        """The wave of a range without rollback: each lane starts at the first request."""
        Ts = [self.cells[share.cells[0]].T for share in run.shares]
        spans = [(share.stop * T, share.start * T) for share, T in zip(run.shares, Ts, strict=True)]
        end, lanes = max(end for end, _ in spans), len(run.cells)
        return Waves(
            1, len(run), lanes, lanes * end, self._work(variant, lanes, end, self._scored(variant, spans, Ts))
        )

    def _filled(self, variant: int, T: int, seeds: int, spans: Sequence[Span]) -> Iterator[Waves]:
        """Full waves and a last, smaller one, for ``seeds`` cells with the same spans."""
        step = groups_per_wave(self.widths[variant, T], seeds)
        parts: list[tuple[int, tuple[int, ...]]] = []
        room = step
        for start, stop, sizes in spans:
            left = stop - start
            while left:
                if not parts and left >= step:  # the waves that this span fills alone
                    yield self._wave(variant, T, seeds, [(step, sizes)], left // step)
                    left %= step
                    continue
                taken = min(left, room)
                parts.append((taken, sizes))
                left, room = left - taken, room - taken
                if not room:
                    yield self._wave(variant, T, seeds, parts, 1)
                    parts, room = [], step
        if parts:
            yield self._wave(variant, T, seeds, parts, 1)

    def _wave(
        self, variant: int, T: int, seeds: int, parts: Sequence[tuple[int, tuple[int, ...]]], count: int
    ) -> Waves:
        groups = sum(n for n, _ in parts)
        lanes = groups * seeds
        scored = sum(n * self._of_group(variant, (T, *sizes)) for n, sizes in parts) / groups
        return Waves(count, groups, lanes, lanes * T, self._work(variant, lanes, T, scored))

    def of_manifest(self, variant: int, manifest: ShardManifest) -> float:
        """Work of a whole shard that has begun. Its number of lanes may differ from the present
        spec's."""
        job, total = manifest.job, 0.0
        for wave in job.waves:
            if job.rollback == "group":
                end = job.T
                scored = sum(
                    self._of_group(variant, [job.T_of(s) for s in lane.shares]) for lane in wave
                ) / len(wave)
            else:
                Ts = [job.T_of(share) for share in wave[0].shares]
                spans = [(s.stop_group * T, s.group * T) for s, T in zip(wave[0].shares, Ts, strict=True)]
                end, scored = max(end for end, _ in spans), self._scored(variant, spans, Ts)
            total += self._work(variant, len(wave), end, scored)
        return total

    def of_edits(self, cells: Sequence[Cell], edits: int) -> float:
        """Estimated work of a finished shard, of which only its cells and its number of edits are
        known."""
        variant, Ts = cells[0].variant, sorted({cell.T for cell in cells})
        if self.spec.grid.rollback == "never":
            lanes = len({cell.seed for cell in cells})
            end = edits // lanes
            return self._work(variant, lanes, end, self._scored(variant, [(end, 0)] * len(Ts), Ts))
        T = Ts[-1]
        lanes = max(1, min(self.widths[variant, T], edits // T))
        return self._work(variant, lanes, T, self._of_group(variant, Ts)) * edits / (T * lanes)

    def _of_group(self, variant: int, Ts: Sequence[int]) -> int:
        """Number of requests that a lane scores if it makes the edits of one group of the largest
        T and serves one group of each of ``Ts``."""
        return self._scored(variant, [(T, 0) for T in Ts], Ts)

    def _scored(self, variant: int, spans: Sequence[tuple[int, int]], Ts: Sequence[int]) -> int:
        """Number of requests that a lane scores. ``spans``: (end, begin) in edits, one per T."""
        score, kind = self.spec.scoring, self.variants[variant]
        immediate = score.immediate and not kind.whole_group
        scored = max(end - begin for end, begin in spans) if immediate else 0  # once for all T
        for (end, begin), T in zip(spans, Ts, strict=True):
            # If a group is one batch, one forward gives the immediate and the final scores.
            if T > kind.batch_size(T, self.spec.grid.batch_size) or not immediate:
                scored += end - begin
            scored += sum(mark for mark in score.score_at if begin < mark <= end)
        return scored

    def _work(self, variant: int, lanes: int, edits: int, scored: float) -> float:
        return wave_work(self.costs[variant], edits, scored, lanes, self.spec.on_gpu)


Ranges = Sequence[tuple[int, int]]
"""Groups as ascending half-open ranges."""


def collect_chains(
    spec: SweepSpec, cells: Sequence[Cell], left: Sequence[Ranges], effort: Effort
) -> dict[tuple[int, int], list[Chain]]:
    """(variant, T) -> chains of the groups that are left. A chain has one cell, or (with
    ``lanes_across_seeds``) several seeds that have the same groups left."""
    if spec.grid.rollback == "never":
        return _chains_without_rollback(spec, cells, left, effort)
    at = {(cell.variant, cell.T, cell.seed): i for i, cell in enumerate(cells)}
    own = _spans_with_own_lanes(spec, cells, left, effort)
    alike: dict[tuple[int, int], dict[tuple[object, ...], list[int]]] = {}
    for i, (cell, spans) in enumerate(zip(cells, own, strict=True)):
        family = alike.setdefault((cell.variant, cell.T), {})
        if spans:
            family.setdefault((spans,) if spec.engine.lanes_across_seeds else (spans, i), []).append(i)

    def chain(variant: int, team: tuple[int, ...]) -> Chain:
        spans = own[team[0]]
        sizes = {T for *_, sizes in spans for T in sizes}
        return Chain(
            team, spans, riders={T: tuple(at[variant, T, cells[i].seed] for i in team) for T in sizes}
        )

    return {
        (variant, T): [
            chain(variant, team)
            for members in family.values()
            for team in _even(members, effort.widths[variant, T])
        ]
        for (variant, T), family in alike.items()
    }


def _spans_with_own_lanes(
    spec: SweepSpec, cells: Sequence[Cell], left: Sequence[Ranges], effort: Effort
) -> list[tuple[Span, ...]]:
    """Per cell, the groups that get their own lanes: of all groups left that start at the same
    request, the group of the largest T. Its lane also serves the groups of smaller T.

    The groups that a lane serves depend on what is left when the lane is planned, and they are
    finished together with it. So finishing whole waves does not change the other lanes. A variant
    that edits whole groups makes different edits at every T and shares no lanes.
    """
    streams: dict[tuple[int, int], list[int]] = {}
    for i, cell in enumerate(cells):
        streams.setdefault((cell.variant, cell.seed), []).append(i)
    own: list[tuple[Span, ...]] = [()] * len(cells)
    # Cache, because most variants and seeds have the same groups left.
    known: dict[tuple[object, ...], list[tuple[Span, ...]]] = {}
    for (variant, _), numbers in streams.items():
        share = spec.engine.share_prefixes and not effort.variants[variant].whole_group
        numbers.sort(key=lambda i: -cells[i].T)
        wanted = tuple((cells[i].T, tuple(left[i])) for i in numbers)
        if (share, wanted) not in known:
            known[share, wanted] = list(_largest_of_each_start(wanted, share))
        for i, spans in zip(numbers, known[share, wanted], strict=True):
            own[i] = spans
    return own


def _largest_of_each_start(wanted: Sequence[tuple[int, Ranges]], share: bool) -> Iterator[tuple[Span, ...]]:
    """For each T, the groups that get their own lanes. ``wanted``: (T, groups left), T
    descending."""
    if not share:
        yield from (tuple((start, stop, ()) for start, stop in ranges) for _, ranges in wanted)
        return
    # First request -> the T of the groups that start there, descending.
    sizes: dict[int, tuple[int, ...]] = {}
    for T, ranges in wanted:
        for group in (group for start, stop in ranges for group in range(start, stop)):
            sizes[group * T] = (*sizes.get(group * T, ()), T)
    for T, ranges in wanted:
        spans: list[Span] = []
        for group in (group for start, stop in ranges for group in range(start, stop)):
            lane, *riders = sizes[group * T]
            if lane != T:
                continue
            if spans and spans[-1][1:] == (group, tuple(riders)):
                spans[-1] = (spans[-1][0], group + 1, tuple(riders))
            else:
                spans.append((group, group + 1, tuple(riders)))
        yield tuple(spans)


def _chains_without_rollback(
    spec: SweepSpec, cells: Sequence[Cell], left: Sequence[Ranges], effort: Effort
) -> dict[tuple[int, int], list[Chain]]:
    """(variant, largest T) -> chains, for ``rollback: never``.

    Without rollback T determines only when to score. One lane per variant and seed makes the edits
    for all T that are left. A variant that edits whole groups makes different edits at every T and
    has one lane per T.
    """
    lanes: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for i, (cell, ranges) in enumerate(zip(cells, left, strict=True)):
        own = cell.T if effort.variants[cell.variant].whole_group else 0
        for start, stop in ranges:
            lanes.setdefault((cell.variant, own, cell.seed), []).append((i, start, stop))
    alike: dict[tuple[object, ...], list[list[tuple[int, int, int]]]] = {}
    for (variant, _, seed), shares in lanes.items():
        shares.sort(key=lambda share: (-cells[share[0]].T, share[1]))
        shape = tuple((cells[i].T, start, stop) for i, start, stop in shares)
        key = (variant, shape) if spec.engine.lanes_across_seeds else (variant, shape, seed)
        alike.setdefault(key, []).append(shares)
    chains: dict[tuple[int, int], list[Chain]] = {}
    for members in alike.values():
        first = cells[members[0][0][0]]
        for team in _even(members, effort.widths[first.variant, first.T]):
            # For each share: the cells of the lanes, and the groups, which are equal in all lanes.
            parts = [
                GroupRange(tuple(i for i, _, _ in part), *part[0][1:]) for part in zip(*team, strict=True)
            ]
            lane = parts[0]
            chain = Chain(lane.cells, ((lane.start, lane.stop, ()),), also=tuple(parts[1:]))
            chains.setdefault((first.variant, first.T), []).append(chain)
    return chains


def _even(members: Sequence[Member], most: int) -> Iterator[tuple[Member, ...]]:
    """Split into the smallest number of teams of at most ``most`` members, of sizes that differ by
    at most one. If whole teams are removed, the others stay the same."""
    teams = -(-len(members) // most)
    size, larger = divmod(len(members), teams)
    start = 0
    for team in range(teams):
        stop = start + size + (team < larger)
        yield tuple(members[start:stop])
        start = stop


def lower_bound(families: Mapping[tuple[int, int], Sequence[Chain]], effort: Effort) -> float:
    """Lower bound of the work between the start and the end of any schedule of the whole sweep:
    the longest wave, or the total divided by the number of actors, whichever is larger.

    A shard of several waves is at most this large. Without the limit a small sweep of one method
    has fewer shards than actors; on four actors it took up to four times as long (simulated;
    LOG.md).
    """
    longest = total = 0.0
    for (variant, T), chains in families.items():
        for chain in chains:
            for wave in effort.waves(variant, T, chain):
                longest = max(longest, wave.work)
                total += wave.work * wave.count
    return max(longest, total / (effort.spec.engine.max_actors or UNKNOWN_ACTORS))


@dataclass
class _ShardDraft:
    """A shard to which waves are being added. ``lanes``: those of its widest wave."""

    runs: list[GroupRange] = field(default_factory=list)
    edits: int = 0
    work: float = 0.0
    lanes: int = 0

    def add(self, runs: Iterable[GroupRange], edits: int, work: float, lanes: int) -> None:
        for run in runs:
            if self.runs and self.runs[-1].continued_by(run):
                self.runs[-1] = replace(self.runs[-1], stop=run.stop)
            else:
                self.runs.append(run)
        self.edits += edits
        self.work += work
        self.lanes = max(self.lanes, lanes)


def pack(
    variant: int, T: int, chains: Sequence[Chain], effort: Effort, most_work: float
) -> Iterator[_ShardDraft]:
    """Fill shards with whole waves, in order, up to ``shard_edits`` edits and ``most_work`` work.

    A shard with fewer than ``step_edits`` edits may exceed ``most_work``, because to launch a shard
    for less than the work between two commits does not pay.
    """
    engine = effort.spec.engine
    piece = _ShardDraft()
    for chain in chains:
        rest = deque(chain.runs())
        for wave in effort.waves(variant, T, chain):
            waves = wave.count
            while waves:
                by_work = max(
                    (most_work - piece.work) / wave.work, -(-(engine.step_edits - piece.edits) // wave.edits)
                )
                fit = min(waves, (engine.shard_edits - piece.edits) // wave.edits, int(by_work))
                if fit < 1 and piece.runs:
                    yield piece
                    piece = _ShardDraft()
                    continue
                fit = max(1, fit)  # a shard has at least one wave, of any size
                piece.add(_take(rest, fit * wave.groups), fit * wave.edits, fit * wave.work, wave.lanes)
                waves -= fit
    if piece.runs:
        yield piece


def _take(rest: deque[GroupRange], groups: int) -> Iterator[GroupRange]:
    """Remove and return the next ``groups`` groups of each cell of a chain."""
    while groups:
        run = rest.popleft()
        if len(run) > groups:
            middle = run.start + groups
            rest.appendleft(replace(run, start=middle))
            run = replace(run, stop=middle)
        groups -= len(run)
        yield run
