"""Source code that a cell's numbers depend on: recorded when the cell is worked on, compared later.

    code_of("ft")                  # {"workers/methods/ft.py": "5a0c...", "workers/rng.py": ...}
    outdated(open_results(folder))  # {cell id: ("workers/methods/ft.py",)}: files that differ today

A file counts by the hash of its syntax tree without docstrings: comments, docstrings and layout may
change. The files are those that a method's module, the stream and the scores import within
``workers/``. Left out is what changes no number or is in the cell's definition already: kernels,
readers of data sets and of hyperparameter files, and the two registries.

Each cell of plan.json lists the codes that have worked on it, each with the number of groups that
held work before it came: ``[["<code>", 0], ["<other code>", 12]]``. The files of a code stand once,
beside the cells. No part of this enters an id. Imports neither torch nor any module of ``workers``
that does: source is read, not run.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import workers
from orchestrator.results.records import read_plan
from orchestrator.storage.base import Missing
from workers.timeline import timeline
from workers.types import JSON

if TYPE_CHECKING:
    from orchestrator.results.journal import Journal
    from orchestrator.results.manifest import ShardManifest
    from orchestrator.results.table import CentralTable
    from orchestrator.storage.base import Store
    from orchestrator.storage.paths import ResultsPaths
    from workers.job import StreamJob

_PACKAGE = "workers"
_REGISTRY = "workers.methods"
_ALWAYS = ("workers.stream",)
"""Modules that every method's numbers depend on."""

_LEFT_OUT = ("workers.kernels", "workers.data", "workers.methods.easyedit", "workers.inputs")
"""Neither recorded nor followed, with everything below them."""

_COUNTED = ("workers.data.scripts",)
"""What is not left out of these: how texts are joined and where subjects stand changes numbers."""

_LISTS = ("workers.methods", "workers.scoring.registry")
"""Registries: not recorded, because a method or a score more changes no number of the others."""

_NOT_FOLLOWED = ("workers.methods", "workers.session")
"""Modules that import all methods, or the builders of all artifacts. A method imports its own."""

_DIGITS = 16

Hashes = tuple[str, str]
"""Hashes of one file: of its syntax tree, and of its bytes. Equal bytes spare the parsing."""


class Folder(Protocol):
    """What is read of a results folder, :class:`orchestrator.results.query.Results` for instance."""

    store: Store
    paths: ResultsPaths
    journal: Journal
    central: CentralTable


def code_of(method: str, root: Path | None = None) -> dict[str, str]:
    """Return the hash of every source file that a method's numbers depend on, by its path.

    ``method`` is a name in the registry, or a method that is defined elsewhere: the import path of
    its module (``lab.methods.mine``) or the module's file. Then the files of its own package count
    as those of ``workers/`` do. ``root`` is the folder that holds ``workers/`` (default: the one
    that runs).
    """
    sources = _Sources(root)
    elsewhere = method.endswith(".py") or "." in method
    module = sources.adopt(method) if elsewhere else sources.module_of(method)
    return {path: tree for path, (tree, _) in sources.closure(module).items()}


@dataclass(frozen=True, slots=True)
class CellCode:
    """Comparison of the code that made a cell's groups with today's.

    ``groups``: all that hold work; ``other`` of them were made, at least in part, by code that
    differs from today's in ``files``; of ``unknown`` ones the code was not recorded.
    """

    groups: int = 0
    other: int = 0
    unknown: int = 0
    files: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """``none`` (no work yet), ``same``, ``other``, ``mixed`` (some groups by other code) or
        ``unknown`` (nothing differs as far as it was recorded)."""
        if not self.groups:
            return "none"
        if self.other:
            return "other" if self.other == self.groups else "mixed"
        return "unknown" if self.unknown else "same"


def outdated(results: Folder) -> dict[str, tuple[str, ...]]:
    """Return the cells whose numbers were made by other code than today's, wholly or in part, each
    with the files that differ."""
    return {cell: found.files for cell, found in cell_codes(results).items() if found.other}


def cell_codes(results: Folder) -> dict[str, CellCode]:
    """Compare the recorded code of every cell that this folder ever planned."""
    listed = results.central.shards()
    begun = []
    for shard_id, manifest in results.journal.begun().items():
        if shard_id in listed:
            continue
        try:
            committed = results.journal.progress(shard_id).committed
        except Missing:
            continue  # gathered meanwhile
        begun.append((manifest, committed))
    held = held_groups(results.central.done(listed), results.central.given_up(), begun)
    return CodeBook.read(results).compare(held)


def held_groups(
    done: Mapping[str, Collection[int]],
    given_up: Mapping[str, Collection[int]],
    begun: Iterable[tuple[ShardManifest, int]],
) -> dict[str, set[int]]:
    """Return the groups of each cell that hold work: in the table, failed for good, or begun in the
    committed ticks of a shard under way (``begun``: its manifest, and how many these are)."""
    held = {cell_id: set(groups) for cell_id, groups in done.items()}
    for cell_id, groups in given_up.items():
        held.setdefault(cell_id, set()).update(groups)
    for manifest, committed in begun:
        for cell_id, groups in _begun_groups(manifest.job, committed):
            held.setdefault(cell_id, set()).update(groups)
    return held


def _begun_groups(job: StreamJob, committed: int) -> Iterator[tuple[str, range]]:
    """Cell and groups of every share that the first ``committed`` ticks have touched."""
    if not committed:
        return
    last = timeline(job)[committed - 1]
    for w, wave in enumerate(job.waves[: last.wave + 1]):
        for share in (share for lane in wave for share in lane.shares):
            stop = share.stop_group
            if job.rollback == "never" and w == last.wave:
                stop = min(stop, -(-last.edits_applied // job.T_of(share)))
            yield job.cells[share.cell].cell_id, range(share.group, stop)


FILES_SHOWN = 5


def say_outdated(found: Mapping[str, CellCode], cells: Sequence[str]) -> str:
    """Say how many of ``cells`` were made by other code and which files differ; empty if none."""
    other = [found[cell] for cell in cells if cell in found and found[cell].other]
    if not other:
        return ""
    files = sorted({path for cell in other for path in cell.files})
    more = f" and {len(files) - FILES_SHOWN} more" if len(files) > FILES_SHOWN else ""
    part = sum(cell.state == "mixed" for cell in other)
    in_part = f" ({part} of them in part)" if part else ""
    return (
        f"{len(other)} of {len(cells)} cells were made by other code than today's{in_part}; "
        f"files that differ: {', '.join(files[:FILES_SHOWN])}{more}"
    )


def say_unknown(found: Mapping[str, CellCode], cells: Sequence[str]) -> str:
    """Say of how many of ``cells`` the code was not recorded; empty if of none."""
    count = sum(found[cell].unknown > 0 for cell in cells if cell in found)
    return f"{count} of {len(cells)} cells were made by code that was not recorded" if count else ""


class CodeBook:
    """The codes in plan.json: ``cells`` (cell id -> codes and the groups before each) and ``codes``
    (code -> its files)."""

    def __init__(self, value: Mapping[str, JSON], root: Path | None = None) -> None:
        self.codes: dict[str, dict[str, Sequence[str]]] = dict(value.get("codes", {}))
        self.cells: dict[str, list[tuple[str | None, int]]] = {
            cell_id: [(code, int(before)) for code, before in cell["code"]]
            for cell_id, cell in value.get("cells", {}).items()
            if cell.get("code")
        }
        self._sources = _Sources(root)

    @classmethod
    def read(cls, results: Folder) -> CodeBook:
        return cls(read_plan(results.store, results.paths) or {})

    def today(self, module: str) -> str:
        """Return the code of the method in ``module`` as it is now, and keep its files."""
        files = self._sources.closure(module)
        text = json.dumps({path: tree for path, (tree, _) in files.items()}, sort_keys=True)
        code = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
        self.codes[code] = dict(files)
        return code

    def work(self, cell_id: str, code: str, groups: int) -> None:
        """Record that ``code`` goes on with a cell of which ``groups`` groups hold work already.

        What an earlier code left half done counts as its own: a group of two codes is not of the
        later one.
        """
        recorded = self.cells.get(cell_id) or [(None, 0)]
        if not groups:
            self.cells[cell_id] = [(code, 0)]
        elif recorded[-1][0] != code:
            self.cells[cell_id] = [*recorded, (code, groups)]

    def to_json(self) -> dict[str, JSON]:
        """The files of the codes that a cell names."""
        named = {code for codes in self.cells.values() for code, _ in codes}
        return {code: files for code, files in self.codes.items() if code in named}

    def compare(self, held: Mapping[str, Collection[int]]) -> dict[str, CellCode]:
        """Compare with today's source files. ``held``: the groups of each cell that hold work."""
        files = {code: self._sources.differing(found) for code, found in self.codes.items()}
        return {
            cell_id: self._compare(self.cells.get(cell_id) or [(None, 0)], len(groups), files)
            for cell_id, groups in held.items()
            if groups
        }

    @staticmethod
    def _compare(
        codes: Sequence[tuple[str | None, int]], groups: int, differing: Mapping[str, tuple[str, ...]]
    ) -> CellCode:
        bounds = [min(before, groups) for _, before in codes] + [groups]
        other = unknown = 0
        found: dict[str, None] = {}
        for (code, _), start, stop in zip(codes, bounds, bounds[1:], strict=False):
            if stop <= start:
                continue  # it came and made nothing
            if code is None or code not in differing:
                unknown += stop - start
            elif differing[code]:
                other += stop - start
                found.update(dict.fromkeys(differing[code]))
        return CellCode(groups, other, unknown, tuple(sorted(found)))


@dataclass(frozen=True, slots=True)
class _File:
    """Facts about one source file. ``empty``: it holds nothing but docstrings."""

    hashes: Hashes
    imports: tuple[str, ...]
    empty: bool


class _Sources:
    """The source files below a folder, each parsed once."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(str(workers.__file__)).parent.parent
        self._adopted: dict[str, Path] = {}
        self._parsed: dict[str, _File] = {}
        self._paths: dict[str, str | None] = {}
        self._registry: dict[str, str] | None = None

    def closure(self, module: str) -> dict[str, Hashes]:
        """The files that the numbers of the method in ``module`` depend on, with their hashes."""
        todo, seen = [module, *_ALWAYS], set[str]()
        found: dict[str, Hashes] = {}
        followed = {_PACKAGE, *self._adopted}
        while todo:
            module = todo.pop()
            if module in seen:
                continue
            seen.add(module)
            left_out = _below(module, _LEFT_OUT) and not _below(module, _COUNTED)
            path = None if left_out else self._path(module)
            if path is None:
                continue
            file = self._file(path, module)
            if module not in _LISTS and not file.empty:
                found[path] = file.hashes
            if module not in _NOT_FOLLOWED:
                todo += (name for name in file.imports if name.partition(".")[0] in followed)
            if "." in module:
                todo.append(module.rpartition(".")[0])  # importing a module runs its packages first
        return dict(sorted(found.items()))

    def differing(self, recorded: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """The recorded files that are gone or have another tree.

        A file that is new needs no look: what imports it has changed as well.
        """
        return tuple(path for path, (tree, data) in recorded.items() if not self._equal(path, tree, data))

    def _equal(self, path: str, tree: str, data: str) -> bool:
        try:
            return _short(self._read(path)) == data or self._file(path, "").hashes[0] == tree
        except (OSError, SyntaxError):
            return False

    def adopt(self, method: str) -> str:
        """The module of a method that is defined outside ``workers/``, by import path or file. The
        files of its top-level package, or the one file, are read from where they lie; nothing of
        them runs."""
        if method.endswith(".py"):
            path = Path(method).resolve()
            names, folder = [path.stem], path.parent
            while (folder / "__init__.py").is_file():
                names.insert(0, folder.name)
                folder = folder.parent
            module = ".".join(names)
        else:
            module = method
            spec = find_spec(module.partition(".")[0])
            places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
            if not places or places[0] is None:
                raise ValueError(f"module {module!r} cannot be found; give its import path or its file")
            folder = Path(places[0]).parent
        self._adopted[module.partition(".")[0]] = folder
        if self._path(module) is None:
            raise ValueError(f"module {module!r} has no source file below {folder}")
        return module

    def module_of(self, method: str) -> str:
        """The module that the registry names for a method. The registry is data and is read as
        such: importing it brings torch."""
        if self._registry is None:
            path = self._path(_REGISTRY)
            tree = ast.parse(self._read(path)) if path else ast.Module([], [])
            self._registry = dict(_named_modules(tree))
        if method not in self._registry:
            raise ValueError(
                f"method {method!r} is not in the registry; choices: {', '.join(self._registry)}"
            )
        return self._registry[method]

    def _path(self, module: str) -> str | None:
        """The path of a module's file from the root; None if it has none there."""
        if module not in self._paths:
            stem = module.replace(".", "/")
            paths = (f"{stem}.py", f"{stem}/__init__.py")
            self._paths[module] = next((path for path in paths if self._place(path).is_file()), None)
        return self._paths[module]

    def _place(self, path: str) -> Path:
        return self._adopted.get(path.partition("/")[0].removesuffix(".py"), self.root) / path

    def _read(self, path: str) -> bytes:
        return self._place(path).read_bytes()

    def _file(self, path: str, module: str) -> _File:
        if path not in self._parsed:
            self._parsed[path] = _parse(self._read(path), path, module)
        return self._parsed[path]


@lru_cache(maxsize=256)  # a pure function: sweeps of one process parse each file once
def _parse(data: bytes, path: str, module: str) -> _File:
    tree = ast.parse(data, path)
    words: list[str] = []
    _write(tree, words)
    within = f"{module}.__init__" if path.endswith("/__init__.py") else module
    return _File(
        hashes=(_short("\0".join(words).encode()), _short(data)),
        imports=tuple(dict.fromkeys(_imports(tree, within))),
        empty=all(map(_is_text, tree.body)),
    )


def _named_modules(registry: ast.Module) -> Iterator[tuple[str, str]]:
    """Method and module of every entry ``"<method>": "<module>:<class>"``."""
    for node in ast.walk(registry):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and isinstance(value, ast.Constant)
                    and ":" in str(value.value)
                ):
                    yield str(key.value), str(value.value).partition(":")[0]


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _below(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _is_text(node: ast.AST) -> bool:
    """True for a text that stands alone: a docstring, of whatever it follows."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _write(node: ast.AST, words: list[str]) -> None:
    """A syntax tree as words, without positions and docstrings; the same in every version of
    Python, so that what a version adds and leaves empty is left out."""
    kind = type(node)
    words.append(kind.__name__)
    for name in _FIELDS.get(kind.__name__) or kind._fields:
        value = getattr(node, name, None)
        if type(value) is list:
            if value:
                words.append(name)
                for item in value:
                    if not isinstance(item, ast.AST):
                        words.append(repr(item))
                    elif not _is_text(item):
                        _write(item, words)
                words.append("]")
        elif isinstance(value, ast.AST):
            words.append(name)
            _write(value, words)
        elif value is not None or kind is ast.Constant:
            words.append(name)
            words.append(repr(value))
    words.append(")")


_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Name": ("id",),
        "Attribute": ("value", "attr"),
        "Subscript": ("value", "slice"),
        "Starred": ("value",),
        "List": ("elts",),
        "Tuple": ("elts",),
        "Constant": ("value",),
    }
)
"""Fields that are written of these nodes. Their contexts follow from where they stand, and the
prefix of a text changes nothing."""


def _imports(tree: ast.Module, module: str) -> Iterator[str]:
    """The modules that a module imports, in functions too, but not for type checking only. ``from a
    import b`` names ``a.b`` as well, which may be a module."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and _names_type_checking(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.stmt | ast.Module | ast.ExceptHandler | ast.match_case):
            todo += ast.iter_child_nodes(node)


def _names_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )
