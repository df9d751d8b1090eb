"""Run drawn mutants against the tests that know their room, one after another, and say which were
noticed.

    python -m tests.mutation.run [numbers ...] [--tests FILE ...]

The table is ``drawn.md``; a mutant's line is found by its text, nearest to where it was drawn. Each
is planted in a copy of the checkout, and the tests run there in a child of this process, which has
imported the large libraries once. The first test that fails is told: a mutant is killed, or it has
survived every test named here. Nothing is written but the copy.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("drawn.md")
TESTS = {
    "journal": ("journal", "table"),
    "table": ("table", "journal"),
    "store": ("store", "journal"),
    "timeline": ("stream", "many_T", "plan"),
    "scoring": ("scoring", "more_scores", "stream"),
    "overlay": ("overlay", "products", "stream", "scoring"),
}
SECONDS = 240
_ROW = re.compile(r"\| (\d+) \| (\w+) \| (\S+):(\d+) \| \w+ \| (.+?) \| (.+?) \| ?(.*?) ?\|$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("numbers", type=int, nargs="*", help="all, if none is given")
    parser.add_argument("--tests", nargs="*", help="instead of those that know the room")
    parser.add_argument("--select", default="", help="pytest's -k")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        leave_out = shutil.ignore_patterns(
            ".git", ".venv", "results", "__pycache__", ".*_cache", "build", "shared"
        )
        shutil.copytree(
            ROOT, tree, ignore=lambda at, names: leave_out(at, names) if at == str(ROOT) else {"__pycache__"}
        )
        for number, room, path, line, before, after in read_table():
            if options.numbers and number not in options.numbers:
                continue
            tests = options.tests or [f"tests/test_{name}.py" for name in TESTS[room]]
            began, whole = time.monotonic(), (tree / path).read_text()
            mutated = planted(whole, line, before, after)
            if mutated is None:
                outcome = "the line is gone"
            else:
                (tree / path).write_text(mutated)
                outcome = noticed(tree, tests, options.select)
                (tree / path).write_text(whole)
            sys.stdout.write(f"{number}\t{room}\t{time.monotonic() - began:.0f} s\t{outcome}\n")
            sys.stdout.flush()


def read_table() -> list[tuple[int, str, str, int, str, str]]:
    """Number, room, path, line, text, text of the mutant."""
    found = []
    for row in TABLE.read_text().splitlines():
        if match := _ROW.match(row):
            texts = [_text(cell) for cell in match.group(5, 6)]
            found.append((int(match[1]), match[2], match[3], int(match[4]), texts[0], texts[1]))
    return found


def _text(cell: str) -> str:
    return "" if cell == "*(nothing)*" else cell.removeprefix("`` ").removesuffix(" ``").replace("\\|", "|")


def planted(code: str, line: int, before: str, after: str) -> str | None:
    """The code with the mutant in it; None if it has no such line any more."""
    lines = code.splitlines(keepends=True)
    places = [i for i, text in enumerate(lines) if text.strip() == before]
    if not places:
        return None
    at = min(places, key=lambda i: abs(i + 1 - line))
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    lines[at] = f"{indent}{after}\n"
    return "".join(lines)


def noticed(tree: Path, tests: Sequence[str], select: str = "") -> str:
    """Which test failed first, or that none did."""
    told = tree.parent / "told"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _test(tree, tests, select, told)
    ends = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > ends:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"killed: the tests did not end in {SECONDS} s"
        time.sleep(0.1)
    if failed := told.read_text() if told.exists() else "the process ended":
        return f"killed: {failed}"
    return "survived " + " ".join(tests)


def _test(tree: Path, tests: Sequence[str], select: str, told: Path) -> None:
    """In the child: never returns."""
    os.setpgid(0, 0)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
    for module in [
        m for m in sys.modules if m.split(".")[0] in ("tests", "workers", "orchestrator", "editsweep")
    ]:
        del sys.modules[module]
    os.environ["PYTHONPATH"] = str(tree)
    sink = os.open(told.with_name("output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    import pytest

    class First:
        nodeid = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not self.nodeid:
                self.nodeid = report.nodeid.removeprefix("tests/")

    first = First()
    words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not gpu", *tests]
    code = pytest.main([*words, "-k", select] if select else words, plugins=[first])
    told.write_text("" if code in (0, 5) else first.nodeid or f"pytest ended with {code!s}")
    os._exit(0)


if __name__ == "__main__":
    # what every child would import for itself
    for library in (
        "duckdb",
        "hypothesis",
        "pandas",
        "polars",
        "pyarrow.parquet",
        "pydantic",
        "pytest",
        "torch._dynamo",
        "transformers.models.auto.modeling_auto",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "yaml",
    ):
        importlib.import_module(library)
    main()
