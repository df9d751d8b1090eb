"""Draw mutants of six rooms with a seed, in equal numbers, and write them as a table.

    python -m tests.mutation.draw --seed 14 --each 10 > tests/mutation/drawn.md

The mutants are those of cosmic-ray (``pip install cosmic-ray==8.7.0``, in an environment of its
own: nothing else here needs it). A place in the text is drawn first and then one of the operators
that apply there, because a tool that knows eleven operators for a plus would draw little else. Not
drawn: annotations, messages of the log, what a ``repr`` shows, the imports for type checkers, and
comparisons by identity in the place of comparisons by value, whose outcome Python leaves open.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "journal": ["orchestrator/results/journal.py"],
    "table": [
        "orchestrator/results/table.py",
        "orchestrator/results/parquet.py",
        "orchestrator/results/contents.py",
    ],
    "store": [
        "orchestrator/storage/base.py",
        "orchestrator/storage/local.py",
        "orchestrator/storage/sealed.py",
    ],
    "timeline": ["workers/timeline.py"],
    "scoring": ["workers/scoring/"],
    "overlay": ["workers/model/overlay.py"],
}
_BINARY = re.compile(r"core/ReplaceBinaryOperator_\w+_(Add|Sub|Mul|FloorDiv|Mod|BitAnd|BitOr)$")
_BY_IDENTITY = re.compile(r"core/ReplaceComparisonOperator_(?!Is)\w+_(Is|IsNot)$")


@dataclass(frozen=True, order=True)
class Mutant:
    """One line of one file, and what it becomes."""

    path: str
    line: int
    operator: str
    before: str
    after: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=14)
    parser.add_argument("--each", type=int, default=10)
    options = parser.parse_args()
    random_of_all = random.Random(options.seed)
    out = sys.stdout.write
    out(
        "| | room | place | operator | line | becomes | outcome |\n| --- | --- | --- | --- | --- | --- | "
        "--- |\n"
    )
    drawn: list[tuple[str, Mutant]] = []
    for room, paths in ROOMS.items():
        found = [
            p
            for path in paths
            for p in (sorted((ROOT / path).glob("*.py")) if path[-1] == "/" else [ROOT / path])
        ]
        places = [place for path in found for place in places_of(path)]
        seen: set[Mutant] = set()
        while len(seen) < options.each:
            mutant = random_of_all.choice(random_of_all.choice(places))()
            if mutant is not None and mutant not in seen:
                seen.add(mutant)
                drawn.append((room, mutant))
    # run in this order, room by turns, so that any beginning of the list is spread evenly
    for number, i in enumerate(
        i for turn in range(options.each) for i in range(turn, len(drawn), options.each)
    ):
        room, m = drawn[i]
        cells = (f"`` {text.strip()} ``" if text.strip() else "*(nothing)*" for text in (m.before, m.after))
        before, after = (cell.replace("|", "\\|") for cell in cells)
        out(f"| {number + 1} | {room} | {m.path}:{m.line} | {m.operator} | {before} | {after} | |\n")


def places_of(path: Path) -> Iterator[list[Callable[[], Mutant | None]]]:
    """Per place of a file, the mutants there, each made when it is called."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    code = path.read_text()
    tree, left_out, lines = get_ast(code), unwanted(code), code.splitlines()
    places: dict[tuple[object, ...], list[Callable[[], Mutant | None]]] = {}
    for name in sorted(operator_names()):
        kind = get_operator(name)
        if (
            kind.arguments()
            or _BY_IDENTITY.match(name)
            or ("BinaryOperator" in name and not _BINARY.match(name))
        ):
            continue
        operator = kind()
        starts = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            text = lines[start[0] - 1]
            if any(word in text for word in ("log.", "repr=", "TYPE_CHECKING")) or any(
                a <= start < b for a, b in left_out
            ):
                continue
            family = name.split("_")[0]
            make = functools.partial(made, path, code, name, operator, occurrence)
            places.setdefault((start, family), []).append(make)
    yield from places.values()


def made(path: Path, code: str, name: str, operator: object, occurrence: int) -> Mutant | None:
    """The mutant, if it still is Python and changes one line."""
    from cosmic_ray.mutating import mutate_code

    mutated = mutate_code(code, operator, occurrence)
    if mutated is None:
        return None
    try:
        ast.parse(mutated)
    except SyntaxError:
        return None
    old, new = code.splitlines(), mutated.splitlines()
    changes = [
        c for c in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if c[0] != "equal"
    ]
    if len(changes) != 1 or changes[0][2] - changes[0][1] != 1 or changes[0][4] - changes[0][3] > 1:
        return None
    _, a, _, c, d = changes[0]
    return Mutant(
        path.relative_to(ROOT).as_posix(), a + 1, name.removeprefix("core/"), old[a], new[c] if d > c else ""
    )


def unwanted(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where annotations go."""
    found: list[ast.expr] = []
    for node in ast.walk(ast.parse(code)):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.expr):
                found.append(annotation)
    return [((a.lineno, a.col_offset), (a.end_lineno or 0, a.end_col_offset or 0)) for a in found]


if __name__ == "__main__":
    main()
