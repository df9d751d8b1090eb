"""Data sets of edit requests, read from the public files. Does not import torch, because the
planner imports it.

    dataset = load_dataset("zsre", path=Path("zsre_mend_eval.json"), train_path=Path("zsre_mend_train.json"))
    first_1000 = [dataset.requests[i] for i in order_requests(dataset, "shuffle", seed=0)[:1000]]
    count_conflicts(first_1000)

Kinds: ``tinyworld`` (the embedded one, no file needed), ``zsre``, ``counterfact``,
``hallucination``, ``temporal``, ``wikibigedit``, ``knowedit``, ``mquake``, ``ultraeditbench`` and
``jsonl``. Every fault of a file raises :class:`~workers.types.DataError` with the file, the record
and the field; a file of another kind is recognised by its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from workers.data import (
    counterfact,
    hallucination,
    jsonl,
    knowedit,
    mquake,
    temporal,
    ultraeditbench,
    wikibigedit,
    zsre,
)
from workers.data.records import (
    OnBadRecord,
    TargetField,
    WrongKind,
    count_conflicts,
    count_cut_cases,
    count_duplicates,
    count_edited_locality,
    find_overlap,
    fingerprint,
    order_requests,
)
from workers.job import StreamJob
from workers.types import DataError, Dataset, EditRequest

__all__ = [
    "DATASETS",
    "TARGET_FIELDS",
    "OnBadRecord",
    "TargetField",
    "count_conflicts",
    "count_cut_cases",
    "count_duplicates",
    "count_edited_locality",
    "find_overlap",
    "fingerprint",
    "load_dataset",
    "load_training",
    "order_requests",
    "requests_of",
]

Loader = Callable[[Path | None, Path | None, OnBadRecord], Dataset]
FieldLoader = Callable[[Path | None, Path | None, OnBadRecord, TargetField | None], Dataset]


_FROM_OTHER_RECORDS = "its unrelated sentences come from other records of `path`"


def _needed(kind: str, path: Path | None) -> Path:
    if path is None:
        raise DataError(f"data set {kind!r} is read from a file: `path` is missing")
    return path


def _refuse(kind: str, field: str, path: Path | None, why: str) -> None:
    if path is not None:
        raise DataError(f"data set {kind!r} does not take `{field}` (got {str(path)!r}): {why}")


def _tinyworld(path: Path | None, train_path: Path | None, on_bad_record: OnBadRecord) -> Dataset:
    # start-up time: building the world is slow, and the other kinds do not need it
    from workers.data import tinyworld

    _refuse("tinyworld", "path", path, "it ships with the package")
    _refuse("tinyworld", "train_path", train_path, "it ships with the package")
    return tinyworld.load_dataset(split="edit")


def _zsre(
    path: Path | None,
    train_path: Path | None,
    on_bad_record: OnBadRecord,
    target_field: TargetField | None = None,
) -> Dataset:
    return zsre.load(_needed("zsre", path), train_path, on_bad_record, target_field)


def _counterfact(path: Path | None, train_path: Path | None, on_bad_record: OnBadRecord) -> Dataset:
    _refuse("counterfact", "train_path", train_path, _FROM_OTHER_RECORDS)
    return counterfact.load(_needed("counterfact", path), on_bad_record)


def _hallucination(path: Path | None, train_path: Path | None, on_bad_record: OnBadRecord) -> Dataset:
    return hallucination.load(_needed("hallucination", path), train_path, on_bad_record)


def _temporal(path: Path | None, train_path: Path | None, on_bad_record: OnBadRecord) -> Dataset:
    return temporal.load(_needed("temporal", path), train_path, on_bad_record)


def _wikibigedit(
    path: Path | None,
    train_path: Path | None,
    on_bad_record: OnBadRecord,
    target_field: TargetField | None = None,
) -> Dataset:
    _refuse("wikibigedit", "train_path", train_path, _FROM_OTHER_RECORDS)
    return wikibigedit.load(_needed("wikibigedit", path), on_bad_record, target_field)


def _ultraeditbench(
    path: Path | None,
    train_path: Path | None,
    on_bad_record: OnBadRecord,
    target_field: TargetField | None = None,
) -> Dataset:
    _refuse("ultraeditbench", "train_path", train_path, _FROM_OTHER_RECORDS)
    return ultraeditbench.load(_needed("ultraeditbench", path), on_bad_record, target_field)


def _knowedit(path: Path | None, train_path: Path | None, on_bad_record: OnBadRecord) -> Dataset:
    _refuse("knowedit", "train_path", train_path, _FROM_OTHER_RECORDS)
    return knowedit.load(_needed("knowedit", path), on_bad_record)


def _mquake(path: Path | None, train_path: Path | None, on_bad_record: OnBadRecord) -> Dataset:
    _refuse(
        "mquake",
        "train_path",
        train_path,
        "its unrelated sentences are single hops of `path` that no edit changes",
    )
    return mquake.load(_needed("mquake", path), on_bad_record)


def _jsonl(path: Path | None, train_path: Path | None, on_bad_record: OnBadRecord) -> Dataset:
    _refuse("jsonl", "train_path", train_path, "each line carries its own `unrelated` sentence")
    return jsonl.load(_needed("jsonl", path), on_bad_record)


DATASETS: Mapping[str, Loader] = MappingProxyType(
    {
        "tinyworld": _tinyworld,
        "zsre": _zsre,
        "counterfact": _counterfact,
        "hallucination": _hallucination,
        "temporal": _temporal,
        "wikibigedit": _wikibigedit,
        "knowedit": _knowedit,
        "mquake": _mquake,
        "ultraeditbench": _ultraeditbench,
        "jsonl": _jsonl,
    }
)
"""Every kind of data set a spec can name. A new kind is a module with a ``load``, and a line
here."""

TARGET_FIELDS: Mapping[str, FieldLoader] = MappingProxyType(
    {"zsre": _zsre, "wikibigedit": _wikibigedit, "ultraeditbench": _ultraeditbench}
)
"""The kinds whose records may name their target in two ways."""


def load_dataset(
    kind: str,
    path: Path | None = None,
    train_path: Path | None = None,
    on_bad_record: OnBadRecord = "error",
    joiner: str | None = None,
    target_field: TargetField | None = None,
) -> Dataset:
    """The requests of one data set, validated and in file order.

    ``train_path`` (zsRE, Hallucination and Temporal): the source of unrelated sentences. With
    ``on_bad_record="skip"``, records that cannot be used are left out; ``notes["skipped"]`` counts
    them and ``notes["skipped_records"]`` lists their numbers. ``joiner``: the text between every
    prompt and its answer; None: by the script of each prompt. ``target_field``: the field that holds
    the target, for kinds whose records may have two.
    """
    loader = DATASETS.get(kind)
    if loader is None:
        raise DataError(f"unknown data set {kind!r}; valid kinds: {', '.join(sorted(DATASETS))}")
    if on_bad_record not in ("error", "skip"):
        raise DataError(f"on_bad_record: {on_bad_record!r} is not valid; choose error or skip")
    paths = None if path is None else Path(path), None if train_path is None else Path(train_path)
    try:
        if target_field is None:
            dataset = loader(*paths, on_bad_record)
        elif kind in TARGET_FIELDS:
            dataset = TARGET_FIELDS[kind](*paths, on_bad_record, target_field)
        else:
            raise DataError(
                f"data set {kind!r} does not take `target_field` (got {target_field!r}): its records name their "
                f"target in one way; the kinds that take it: {', '.join(TARGET_FIELDS)}"
            )
    except WrongKind as wrong:
        raise DataError(f"{wrong}; {_right_kind(kind, paths[0], wrong.looks_like)}") from None
    return _joined(dataset, joiner)


def _right_kind(kind: str, path: Path | None, looks_like: Sequence[str]) -> str:
    """Advice for a file of which ``kind`` reads nothing. A kind is named only if it reads most of
    it."""
    readers = []
    for other, loader in DATASETS.items():
        if path is None or other in ("tinyworld", kind):
            continue
        try:
            found = loader(path, None, "skip")
        except DataError:
            continue
        if len(found.requests) > found.notes["skipped"]:
            readers.append(other)
    best = [reader for reader in readers if reader in looks_like] or readers
    if best:
        return f"set `dataset.kind: {' or '.join(best)}`"
    return (
        "no kind of data set reads this file; choose a kind and bring the records into its form "
        f"({', '.join(other for other in DATASETS if other != 'tinyworld')}), for example jsonl with prompt, "
        "subject and target_new"
    )


def _joined(dataset: Dataset, joiner: str | None) -> Dataset:
    if joiner is None:
        return dataset
    return replace(dataset, requests=tuple(replace(r, joiner=joiner) for r in dataset.requests))


def load_training(
    kind: str,
    path: Path | None = None,
    on_bad_record: OnBadRecord = "error",
    joiner: str | None = None,
    target_field: TargetField | None = None,
) -> Dataset:
    """The requests of a training set: the embedded world's ``train`` split, or a file of any kind
    of :data:`DATASETS`."""
    if kind == "tinyworld":
        from workers.data import tinyworld

        _refuse("tinyworld", "training.path", path, "it ships with the package")
        return _joined(tinyworld.load_dataset(split="train"), joiner)
    return load_dataset(kind, path, None, on_bad_record, joiner, target_field)


def requests_of(
    job: StreamJob, dataset: Dataset, order: Literal["file", "shuffle"]
) -> list[Sequence[EditRequest]]:
    """Per cell, the requests that the job edits, in the order of the cell's seed."""
    need = [0] * len(job.cells)
    for wave in job.waves:
        for lane in wave:
            last = max(share.stop_group * job.T_of(share) for share in lane.shares)
            for share in lane.shares:
                need[share.cell] = max(need[share.cell], last)
    return [
        [dataset.requests[i] for i in order_requests(dataset, order, cell.seed)[:n]]
        for cell, n in zip(job.cells, need, strict=True)
    ]
