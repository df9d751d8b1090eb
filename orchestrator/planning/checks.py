"""Find what a run would trip over before it begins. Pure functions of what was read.

    problems = long_texts(texts)            # these end a plan, all at once
    if problems:
        raise all_at_once(problems)
    found = find_shortfalls(spec, needs, seeds, dataset)
    raise_impossible(found)                 # cells of which no group can be edited
    warnings = shortfall_warnings(found)    # cells of which some groups fail

A problem that makes a whole cell impossible is an error. One that makes some groups fail is a
warning, because the other groups are results.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.planning.spec import SweepSpec
from workers.data import order_requests
from workers.data.needs import Need
from workers.types import DataError, Dataset, EditRequest, EditSweepError, SpecError

LINES = 20
"""An error message lists at most so many problems; the others are counted."""


# --- all problems in one message ------------------------------------------------------------


class Problems(list[EditSweepError]):
    """The problems of one spec, in the order in which they were found."""

    def collected(self, prefix: str = "") -> _Collected:
        """Add the problem that ends the block, and go on after it. ``prefix`` goes before the
        message of a :class:`SpecError`."""
        return _Collected(self, prefix)


@dataclass(frozen=True)
class _Collected:
    problems: Problems
    prefix: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, SpecError):
            self.problems.append(SpecError(f"{self.prefix}{error}"))
        elif isinstance(error, EditSweepError):
            self.problems.append(error)
        return isinstance(error, EditSweepError)


def all_at_once(problems: Sequence[EditSweepError]) -> EditSweepError:
    """One error for all problems: the only one as it is, or a list of them, each line once."""
    lines = list(dict.fromkeys(line for problem in problems for line in _lines(str(problem))))
    if len({str(problem) for problem in problems}) == 1:
        return problems[0]
    shown = lines[:LINES]
    if len(lines) > LINES:
        shown.append(f"and {len(lines) - LINES} more")
    return SpecError(f"{len(lines)} problems:\n  " + "\n  ".join(shown))


def _lines(text: str) -> Iterator[str]:
    """A message of several lines as messages of one line each. Where the first is a heading, it
    stands before each of the others."""
    first, *rest = (line.strip() for line in text.splitlines())
    heading = first.endswith(":") and bool(rest)
    if not heading:
        yield first
    for line in rest:
        yield f"{first} {line}" if heading else line


# --- batches --------------------------------------------------------------------------------


def batch_problems(spec: SweepSpec) -> list[SpecError]:
    """An error for each batch size that some methods do not support. It names these methods, and
    those that support it."""
    from workers.methods import get_method, method_names

    def able(name: str) -> bool:
        kind = get_method(name)
        return kind.batch_edits or kind.whole_group

    unable: dict[tuple[int, str], list[str]] = {}
    for i, method in enumerate(spec.methods):
        if method.method in method_names() and spec.batch_size(i)[0] > 1 and not able(method.method):
            same = method.label == method.method
            label = method.label if same else f"{method.label} ({method.method})"
            unable.setdefault(spec.batch_size(i), []).append(label)
    return [
        SpecError(
            f"{name}: {size}, but {', '.join(labels)} can edit only one request at a time; set it to 1, give "
            f"each variant its own `batch_size`, or keep to methods that edit several in one call: "
            f"{', '.join(filter(able, method_names()))}"
        )
        for (size, name), labels in unable.items()
    ]


# --- texts ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """One text that may not fit into the model: its place in the data set, and its tokens."""

    record: int
    """Index of the request in the data set."""
    case_id: str
    field: str
    tokens: int
    template: int = 0
    """Of the tokens, those of a context template before the text."""

    @property
    def place(self) -> str:
        return f"request {self.record + 1} (case {self.case_id!r}): {self.field}"


def long_texts(texts: Sequence[Measured], context: int | None, section: str = "dataset") -> list[DataError]:
    """An error for each text that is longer than the model's context. For a model with learned
    positions it would end in an index error, and for others in scores of positions that the model
    was never trained on."""
    return [
        DataError(
            f"{section}: {text.place}: {text.tokens} tokens with its answer"
            f"{f' and a context template of {text.template}' if text.template else ''}, but the model reads "
            f"at most {context}"
        )
        for text in texts
        if context is not None and text.tokens > context
    ]


def long_continuation(tokens: int, prompt: Measured, context: int) -> list[SpecError]:
    """An error if the continuation of the longest prompt passes the model's context."""
    if prompt.tokens + tokens <= context:
        return []
    return [
        SpecError(
            f"scoring.fluency_tokens: {tokens}: the model reads at most {context} tokens, and {prompt.place} "
            f"has {prompt.tokens}; the largest valid value is {max(0, context - prompt.tokens)}"
        )
    ]


def generation_warnings(texts: Sequence[Measured], context: int | None, extra: int) -> tuple[str, ...]:
    """A warning if texts fit, but greedy generation may pass the model's context. ``extra``: the
    tokens by which it may be longer than the answer."""
    tight = [
        text for text in texts if context is not None and context < text.tokens + extra <= context + extra
    ]
    if not tight:
        return ()
    warning = (
        f"{len(tight)} of the texts leave no room for the {extra} tokens by which generation may be longer "
        f"than the answer; the first is {tight[0].place}, {tight[0].tokens} of {context} tokens"
    )
    return (warning,)


# --- requests without what a method needs ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Requests of one cell that lack what its method needs, and what becomes of its groups."""

    variant: int
    label: str
    T: int
    seed: int
    need: Need
    requests: int
    edits: int
    first: str
    failing: int
    groups: int
    grows_with_T: bool = False
    """True if smaller groups would not lack it: cells of other T are fine."""


def find_shortfalls(
    spec: SweepSpec,
    needs: Mapping[int, tuple[Need, ...]],
    seeds: Mapping[int, Sequence[int]],
    data: Dataset,
    among: Collection[int],
) -> tuple[Shortfall, ...]:
    """Per cell, the requests that lack a need of its method. ``needs``, ``seeds``: by the method's
    number in the spec. ``among``: the requests that may be edited."""
    lacking = {
        need: frozenset(i for i in among if not need.met(data.requests[i]))
        for need in dict.fromkeys(need for some in needs.values() for need in some)
    }
    if not any(lacking.values()):
        return ()
    edits = min(spec.dataset.edits, len(data.requests))
    orders: dict[int, tuple[int, ...]] = {}
    found = []
    for variant, wanted in needs.items():
        for need in (need for need in wanted if lacking[need]):
            for seed in seeds[variant]:
                if seed not in orders:
                    orders[seed] = tuple(order_requests(data, spec.dataset.order, seed)[:edits])
                places = [at for at, index in enumerate(orders[seed]) if index in lacking[need]]
                for T in spec.sizes(variant):
                    found += _shortfall(spec, variant, T, seed, need, places, data, orders[seed])
    return tuple(found)


def _shortfall(
    spec: SweepSpec,
    variant: int,
    T: int,
    seed: int,
    need: Need,
    places: Sequence[int],
    data: Dataset,
    order: Sequence[int],
) -> list[Shortfall]:
    """The shortfall of one cell, whose requests at these ``places`` of its ``order`` lack ``need``;
    nothing if there are none."""
    groups = len(order) // T
    within = [at for at in places if at < groups * T]
    if not within:
        return []
    failing = (
        groups - within[0] // T  # the lane ends with its first failure
        if spec.grid.rollback == "never"
        else len({at // T for at in within})
    )
    index = min(order[at] for at in within)
    first = f"request {index + 1}, case {data.requests[index].case_id!r}"
    label = spec.methods[variant].label
    return [Shortfall(variant, label, T, seed, need, len(within), groups * T, first, failing, groups)]


def find_crowded(
    spec: SweepSpec,
    before: Mapping[int, Callable[[Sequence[EditRequest]], str]],
    seeds: Mapping[int, Sequence[int]],
    data: Dataset,
    context: int | None,
    count: Callable[[str], int],
    longest: Callable[[int], int],
) -> tuple[Shortfall, ...]:
    """Per cell of methods that put the facts of a group before every prompt (``before``, by the
    method's number in the spec), the requests with a text that does not fit behind them.

    ``count``: tokens of a text. ``longest``: tokens of the longest text of a request, by its index
    in the data set.
    """
    if not before or context is None:
        return ()
    need = Need(
        f"the facts of its group and one of its texts are longer than the {context} tokens that the "
        "model reads",
        lambda _: True,
    )
    edits = min(spec.dataset.edits, len(data.requests))
    found: list[Shortfall] = []
    for variant, text_before in before.items():
        for seed in seeds[variant]:
            order = tuple(order_requests(data, spec.dataset.order, seed)[:edits])
            for T in spec.sizes(variant):
                places: list[int] = []
                for stop in range(T, edits + 1, T):
                    start = 0 if spec.grid.rollback == "never" else stop - T
                    facts = count(text_before([data.requests[i] for i in order[start:stop]]))
                    crowded = [at for at in range(start, stop) if facts + longest(order[at]) > context]
                    if crowded and spec.grid.rollback == "never":
                        places = list(range(stop - T, edits))  # facts only become more
                        break
                    places += crowded
                found += [
                    replace(short, grows_with_T=True)
                    for short in _shortfall(spec, variant, T, seed, need, places, data, order)
                ]
    return tuple(found)


def impossible_cells(found: Sequence[Shortfall]) -> list[SpecError]:
    """An error for each method and T of which a cell has no group that can be edited. Where only
    the groups are too large, it is no error: a grid of several T is one sweep."""
    by_place: dict[tuple[str, int, Need], Shortfall] = {}
    for short in found:
        if short.failing == short.groups and not short.grows_with_T:
            by_place.setdefault((short.label, short.T, short.need), short)
    return [
        SpecError(
            f"methods: {label}: T={T}: no group can be edited: {short.requests} of {short.edits} requests "
            f"(first {short.first}): {need.lacking}; mend the data set, or leave this T or the method out"
        )
        for (label, T, need), short in by_place.items()
    ]


def shortfall_warnings(found: Sequence[Shortfall]) -> tuple[str, ...]:
    """A line per need: which methods, how many requests, which first, how many groups fail."""
    warnings = []
    for need in dict.fromkeys(short.need for short in found):
        some = [short for short in found if short.need is need]
        labels = ", ".join(dict.fromkeys(short.label for short in some))
        most = max(some, key=lambda short: short.requests)
        sizes = []
        for T in dict.fromkeys(short.T for short in some):
            of_T = [short for short in some if short.T == T]
            failing, groups = sum(s.failing for s in of_T), sum(s.groups for s in of_T)
            sizes.append(f"T={T}: {failing} of {groups}")
        warnings.append(
            f"{labels}: {most.requests} of {most.edits} requests (first {most.first}): {need.lacking}; groups "
            f"that will fail: {', '.join(sizes)}"
        )
    return tuple(warnings)


def training_shortfalls(
    needs: Mapping[str, tuple[Need, ...]], training: Sequence[EditRequest]
) -> tuple[list[DataError], list[str]]:
    """Errors and warnings for training requests that lack what a training needs (``needs``: by the
    method's label). If all lack it, the networks cannot be trained and no cell of the method can
    run; if some do, the training ends at the first of them that it draws."""
    by_need: dict[Need, list[str]] = {}
    for label, wanted in needs.items():
        for need in wanted:
            by_need.setdefault(need, []).append(label)
    errors, warnings = [], []
    for need, labels in by_need.items():
        lacking = [i for i, request in enumerate(training) if not need.met(request)]
        if not lacking:
            continue
        text = (
            f"training: {', '.join(labels)}: {len(lacking)} of {len(training)} requests (first request "
            f"{lacking[0] + 1}, case {training[lacking[0]].case_id!r}): {need.lacking}"
        )
        if len(lacking) == len(training):
            errors.append(DataError(text))
        else:
            warnings.append(f"{text}; the training fails when it draws one of them")
    return errors, warnings
