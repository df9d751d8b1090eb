"""The requests that a folder's cells edit, as rows of the table ``requests``.

They are stored once per data set, beside the cells that use them, so that a folder which was handed
on explains itself without the data file. The driver writes them before the first shard that edits
them begins; a later run with more edits, seeds or another data set adds a file. Nothing depends on
them: the rows of all other tables are the same without. Knows nothing of torch or Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import pyarrow as pa

from orchestrator.results.beside import REQUESTS
from orchestrator.results.columns import no_rows, rows_to_table
from orchestrator.results.parquet import VERSION, decode, encode
from orchestrator.storage.base import Damaged, Missing, Store, put_aside
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import sha256_of
from workers.types import JSON, Dataset, EditRequest, Probe

log = logging.getLogger(__name__)


def write_requests(dataset: Dataset, chosen: Iterable[int], store: Store, paths: ResultsPaths) -> int:
    """Store those of a data set's requests (by index) that the folder does not have yet; return
    how many. Damaged files are put aside first. For the folder's owner."""
    known: set[tuple[str, str]] = set()
    for key, name in _files(store, paths):
        try:
            known |= _keys(decode(store.read(key), store.where(key), REQUESTS)[0])
        except Damaged as error:
            log.warning("%s; put aside", error)
            put_aside(store, key, paths.requests_aside(name))
    rows = [
        _row(dataset, dataset.requests[index])
        for index in sorted(set(chosen))
        if (dataset.fingerprint, dataset.requests[index].case_id) not in known
    ]
    if rows:
        table = rows_to_table(rows, REQUESTS.columns)
        meta = {"version": VERSION, "kind": "requests", "rows": len(rows)}
        data = encode(table, meta, whole=True)
        store.publish_new(paths.requests_file(dataset.fingerprint, sha256_of(data)), data)
    return len(rows)


def read_requests(store: Store, paths: ResultsPaths) -> pa.Table:
    """Every request once. A damaged file is left out with a warning; the next run of the sweep
    writes it again, as far as it asks for its requests."""
    pieces = [no_rows(REQUESTS)]
    known: set[tuple[str, str]] = set()
    for key, _ in _files(store, paths):
        try:
            found = decode(store.read(key), store.where(key), REQUESTS)[0]
        except Missing:
            continue
        except Damaged as error:
            log.warning("%s; its requests are left out until `editsweep run` writes them again", error)
            continue
        keys = list(zip(*(found[name].to_pylist() for name in REQUESTS.key), strict=True))
        new = [place for place, row in enumerate(keys) if row not in known]
        known.update(keys)
        pieces.append(found if len(new) == len(keys) else found.take(pa.array(new, pa.int64())))
    return pa.concat_tables(pieces)


def _files(store: Store, paths: ResultsPaths) -> Iterator[tuple[str, str]]:
    """Key and name of every file."""
    for entry in store.list(paths.requests):
        if not entry.folder and entry.name.endswith(".parquet"):
            yield entry.key, entry.name


def _keys(table: pa.Table) -> set[tuple[str, str]]:
    return set(zip(*(table[name].to_pylist() for name in REQUESTS.key), strict=True))


def _row(dataset: Dataset, request: EditRequest) -> dict[str, JSON]:
    asked: list[tuple[str, Probe]] = [("locality", probe) for probe in request.locality]
    asked += [("portability", probe) for probe in request.portability]
    asked += [("ood", Probe(text, "")) for text in request.ood]
    before: dict[str, int] = {}
    probes = []
    for kind, probe in asked:
        number = before[kind] = before.get(kind, -1) + 1
        probes.append(
            {
                "probe": kind,
                "number": number,
                "prompt": probe.prompt,
                "target": probe.target or None,
                "aliases": list(probe.aliases),
                "probe_group": probe.group or None,
            }
        )
    return {
        "dataset_fingerprint": dataset.fingerprint,
        "dataset": dataset.name,
        "case_id": request.case_id,
        "prompt": request.prompt,
        "subject": request.subject,
        "target": request.target_new,
        "ground_truth": request.ground_truth,
        "rephrases": list(request.rephrases),
        "probes": probes,
        "unrelated": request.unrelated,
        "passage": request.passage,
        "any_of": request.any_of,
        "needs": request.needs,
        "joiner": request.joiner,
    }
