"""Every entry point takes whatever it is given: exit code 0 or 2, never a traceback, "this is a
bug", or an endless wait.

The examples are Hypothesis's, drawn from a fixed seed: some dozens of each entry point here, 20,000
in the long form. What was found once is kept in ``found.json`` beside this file, and tried
first.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from orchestrator.cli.main import main
from tests.engine import run
from tests.test_data import RAW, write
from tests.test_fuzz import FULL, ODD
from workers.data import load_dataset
from workers.types import DataError

FOUND: dict[str, list[Any]] = json.loads((Path(__file__).parent / "found.json").read_text())
FEW, MANY = 25, 20_000

Check = Callable[[Any], None]


def many(count: int, strategy: st.SearchStrategy[Any], check: Check, name: str) -> None:
    """Check what was found before, and ``count`` examples."""
    for example in FOUND.get(name, []):
        check(example)

    @seed(20261128)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if count == FEW else [Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def examples(value: Any) -> None:
        check(value)

    examples()


def counts() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.long)])


def said_by(words: list[str]) -> tuple[int, str]:
    """The exit code of the command line, called in this process, and all that it said."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    before = sys.argv
    sys.argv = ["editsweep", *words]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(words)
    except SystemExit as ended:
        out.flush()
        text = out.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
        return (ended.code if isinstance(ended.code, int) else 0), text + err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command did not end")


def check_words(words: list[str], folder: Path, codes: tuple[int, ...] = (0, 2)) -> str:
    code, text = said_by([word.replace("{folder}", str(folder)) for word in words])
    context = f"editsweep {json.dumps(words)} ended with {code}:\n{text[-3000:]}"
    assert "this is a bug" not in text, context
    assert "Traceback" not in text, context
    assert code in codes, context
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the results of a small sweep, a spec, and files that are none."""
    root = tmp_path_factory.mktemp("fuzz")
    small = {
        "dataset": {"kind": "tinyworld", "edits": 2},
        "methods": [{"method": "ft", "hparams": {"num_steps": 1}}],
    }
    run(root / "r", **{**small, "grid": {"T": [1], "seeds": [0]}})
    (root / "s.yaml").write_text(yaml.safe_dump({**FULL, "methods": ["ft"]}))
    (root / "text.txt").write_text("root:$6$abc$secret:19000:0:99999:7:::\n")
    (root / "bytes").write_bytes(bytes(range(256)))
    (root / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, value in (("AWS_ENDPOINT_URL", "garbage"), ("AWS_EC2_METADATA_DISABLED", "true")):
            patch.setenv(name, value)
        yield root


# --- the command line

PLACES = (
    "{folder}/r",
    "{folder}/none",
    "{folder}/empty",
    "{folder}/text.txt",
    "{folder}/bytes",
    "{folder}/s.yaml",
    "/dev/zero",
    "/dev/null",
    "/proc/self/mem",
    "~",
    "~nobody-of-this-name",
    "",
    " ",
    ".",
    "..",
    "-",
    "a\0b",
    "a\nb",
    "\udce4",
    "\ud800",
    "x" * 300,
    "s3://",
    "s3://lab/x",
    "s3://lab",
    "s3://[/x",
    "gs://a/b",
    "://",
    "file:///tmp",
    "лейн",
)
PLACE = st.sampled_from(PLACES) | st.text(max_size=8).map(lambda text: text.replace("/", ""))
NUMBER = st.sampled_from(
    ["0", "1", "-1", "1e9", "nan", "inf", "-inf", "1_0", "", "x", "9" * 400, "0x1", "1.5", "٣"]
)
CELLS = st.sampled_from(
    [
        "T=1",
        "method=ft",
        "seed=0",
        "cell=",
        "T=",
        "=",
        ",",
        "T=1,",
        "x=1",
        "T=1=2",
        "T=9" * 50,
        "method=\0",
        "T=²",
    ]
)
SETTING = st.sampled_from(
    [
        "grid.T=[1]",
        "grid.T=59:59:59",
        "grid.seeds=[1:1]",
        "methods.0.hparams.lr=.inf",
        "methods.0.hparams.lr=-.inf",
        "methods.0.hparams.lr=.nan",
        "methods.0=",
        "methods.9=x",
        "methods.-1=x",
        "methods.²=x",
        "=",
        "a.b.c=1",
        "name=",
        "name=[",
        "name=!!python/object:os.system",
        "dataset.edits=2026-01-01",
        "grid.T=0o7",
        "model=*a",
        "dataset.path=/dev/zero",
        "dataset={kind: jsonl, path: /dev/zero}",
        "scoring.ability_text=/dev/zero",
        "methods.0.hparams_file=/dev/zero",
        "model.name=~nobody-of-this-name",
        "model.name=\0",
        "engine.gpu_memory_gb=1e400",
        "engine.threads=99999999999999999999",
        "training={kind: jsonl, path: '~nobody/x'}",
    ]
)
FORMATS = st.sampled_from(["table", "csv", "json", "parquet", "markdown", "x", ""])
QUERIES = st.sampled_from(
    [
        "select 1",
        "",
        ";",
        "select",
        "select 1; select 2",
        "from edits",
        "copy edits to 'x'",
        "select '\0'",
        "\ud800",
    ]
)


def _options(pairs: dict[str, st.SearchStrategy[str] | None]) -> st.SearchStrategy[list[str]]:
    one = st.one_of(
        *(
            st.just([name]) if values is None else values.map(lambda value, name=name: [name, value])  # type: ignore[misc]
            for name, values in pairs.items()
        )
    )
    return st.lists(one, max_size=3).map(lambda found: [word for words in found for word in words])


PLANNING = {"--results": PLACE, "--only": CELLS, "--set": SETTING, "--retry-failed": None}
COMMANDS: dict[str, st.SearchStrategy[list[str]]] = {
    "plan": st.tuples(st.just("{folder}/s.yaml") | PLACE, _options({**PLANNING, "--actors": NUMBER})).map(
        lambda found: [found[0], *found[1]]
    ),
    # of these only specs that are none: others would run
    "run": st.tuples(PLACE.filter(lambda place: "s.yaml" not in place), _options(PLANNING)).map(
        lambda found: [found[0], *found[1], "--engine", "local"]
    ),
    "artifacts": st.tuples(PLACE.filter(lambda place: "s.yaml" not in place), _options(PLANNING)).map(
        lambda found: [found[0], *found[1], "--engine", "local"]
    ),
    "status": st.tuples(PLACE, _options({"--json": None})).map(lambda found: [found[0], *found[1]]),
    "query": st.tuples(
        PLACE, QUERIES, _options({"--format": FORMATS, "--limit": NUMBER, "--time-limit": NUMBER})
    ).map(lambda found: [found[0], found[1], *found[2]]),
    "report": st.tuples(PLACE, _options({"--format": FORMATS})).map(lambda found: [found[0], *found[1]]),
    "diff": st.tuples(PLACE, PLACE, _options({"--ignore": CELLS, "--json": None})).map(
        lambda found: [found[0], found[1], *found[2]]
    ),
    "forget": st.tuples(PLACE, _options({"--cells": CELLS, "--superseded": None})).map(
        lambda found: [found[0], *found[1]]
    ),
    "methods": st.just([]),
    "x": st.lists(PLACE, max_size=2),
    "--version": st.just([]),
    "--help": st.just([]),
}
WORDS = st.sampled_from(sorted(COMMANDS)).flatmap(
    lambda name: COMMANDS[name].map(lambda words: [name, *words])
)


@counts()
def test_the_command_line(folder: Path, count: int) -> None:
    def check(words: list[str]) -> None:
        # `diff` and `forget` without an answer tell by 1 that folders differ, that nothing was done
        check_words(words, folder, (0, 1, 2) if words[:1] in (["diff"], ["forget"]) else (0, 2))

    many(count, WORDS, check, "command line")


# --- specs

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.dates(),
    st.binary(max_size=3),
    st.sampled_from([value for value in ODD if not isinstance(value, (dict, list))]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
RAW_YAML = st.sampled_from(
    [
        ".inf",
        "-.INF",
        ".nan",
        "59:59:59",
        "1" + ":59" * 200,
        "1:2.5",
        "0b11",
        "0o17",
        "0x1f",
        "1_000",
        "2026-11-28",
        "2026-11-28T10:00:00Z",
        "9999-99-99",
        "!!float x",
        "!!int ''",
        "!!timestamp x",
        "!!binary '*'",
        "!!set {a}",
        "!!omap [a]",
        "!!python/name:os.system",
        "1e999999999",
        "9" * 5000,
        "&a [*a]",
        "<<: 1",
        "? [a]\n: b",
        "'\\ud800'",
        '"\\ud800"',
        '"\\0"',
        "~",
        "yes",
    ]
)


def _fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield (*path, key)
        yield from _fields(child, (*path, key))


MARK = "@@@"


def _with(base: Any, path: tuple[Any, ...], value: Any) -> Any:
    made = json.loads(json.dumps(base))
    here = made
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return made


@st.composite
def specs(draw: Callable[[Any], Any]) -> str:
    """A spec as text, of which one field is something else."""
    path = draw(st.sampled_from(list(_fields(FULL))))
    if draw(st.booleans()):
        return yaml.safe_dump(_with(FULL, path, draw(VALUES)), allow_unicode=True)
    text = yaml.safe_dump(_with(FULL, path, MARK))
    return text.replace(f"'{MARK}'", draw(RAW_YAML)).replace(MARK, draw(RAW_YAML))


@counts()
def test_specs(folder: Path, count: int, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        check_words(["plan", str(path), "--results", str(tmp_path / "none")], folder)

    many(count, specs(), check, "specs")


@counts()
def test_hyperparameter_files(folder: Path, count: int, tmp_path: Path) -> None:
    path, spec = tmp_path / "h.yaml", tmp_path / "s.yaml"
    good = {"alg_name": "FT", "model_name": "x", "layers": [1], "num_steps": 2, "lr": 0.1, "device": 0}

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        check_words(["plan", str(spec), "--results", str(tmp_path / "none")], folder)

    spec.write_text(yaml.safe_dump({**FULL, "methods": [{"method": "ft", "hparams_file": str(path)}]}))
    key = st.sampled_from(
        [*good, "norm_constraint", "weight_decay", "batch_size", "objective_optimization", "x"]
    )
    one = st.tuples(key, VALUES | RAW_YAML.map(lambda text: (MARK, text)))

    def text_of(found: list[tuple[str, Any]]) -> str:
        made = yaml.safe_dump({**good, **{k: MARK if isinstance(v, tuple) else v for k, v in found}})
        for _, value in found:
            if isinstance(value, tuple):
                made = made.replace(f"'{MARK}'", value[1], 1)
        return made

    many(
        count,
        st.lists(one, min_size=1, max_size=2, unique_by=lambda pair: pair[0]).map(text_of),
        check,
        "hparams",
    )


# --- data


@counts()
@pytest.mark.parametrize("kind", sorted(RAW))
def test_data_files(kind: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / "records"
    good = RAW[kind][:3]
    texts = st.text(max_size=40) | st.binary(max_size=40) | VALUES.map(partial(json.dumps, default=str))

    def check(example: Any) -> None:
        if isinstance(example, dict):
            records = json.loads(json.dumps(good))
            try:
                records[0] = _with(records[0], tuple(example["path"]), example["value"])
                write(path, kind, records)
            except (TypeError, ValueError, UnicodeEncodeError):
                return
        else:
            data = example if isinstance(example, bytes) else example.encode("utf-8", "surrogatepass")
            path.write_bytes(data)
        try:
            load_dataset(kind, path)
        except DataError as error:
            assert str(path) in str(error)

    field = st.sampled_from(list(_fields(good[0])))
    inside = st.builds(lambda path, value: {"path": path, "value": value}, field, VALUES)
    many(count // 4 or 1, inside | texts, check, f"data {kind}")


# --- answers of queries

LITERALS = st.sampled_from(
    [
        "NULL",
        "true",
        "1::TINYINT",
        "255::UTINYINT",
        "170141183460469231731687303715884105727::HUGEINT",
        "340282366920938463463374607431768211455::UHUGEINT",
        "0.5",
        "'99999999999999999999.5'::DECIMAL(38,5)",
        "'nan'::FLOAT",
        "'-inf'::DOUBLE",
        "'x'",
        "'\u2028'",
        "chr(0)",
        "chr(1114111)",
        "'\\xFF\\x00'::BLOB",
        "'101'::BIT",
        "'infinity'::DATE",
        "'-infinity'::DATE",
        "'0001-01-01 (BC)'::DATE",
        "'5877642-06-25 (BC)'::DATE",
        "'infinity'::TIMESTAMP",
        "'-infinity'::TIMESTAMPTZ",
        "'290309-12-22 (BC) 00:00:00'::TIMESTAMP",
        "'2026-01-01'::TIMESTAMP_S",
        "'2026-01-01'::TIMESTAMP_MS",
        "'2026-01-01'::TIMESTAMP_NS",
        "'24:00:00'::TIME",
        "'00:00:00+15:59:59'::TIMETZ",
        "INTERVAL 1 MONTH",
        "INTERVAL '-999999999' YEAR",
        "INTERVAL 1 MICROSECOND",
        "uuid()",
        "union_value(a := 1)",
        "union_value(a := INTERVAL 1 DAY)",
        "'a'::ENUM('a', 'b')",
        "'{\"a\": [1]}'::JSON",
        "{'a': 1}",
        "{'a': INTERVAL 1 DAY}",
        "[]",
        "MAP {'infinity'::DATE: [1]}",
        "MAP {}",
        "row(1, 'x')",
        "array_value(1, 2)",
        "[union_value(a := 1)]",
        "{'a': 'infinity'::DATE}",
        "['infinity'::TIMESTAMP]",
        "lambda_is_none",
        "x -> x",
        "(SELECT avg(target_logprob) FROM edits)",
        "edits_all",
        "typeof(1)",
        "1 / 0",
        "error('no')",
        "'x'::VARIANT",
        "getenv('HOME')",
        "current_setting('memory_limit')",
    ]
)
EXPRESSIONS = st.recursive(
    LITERALS,
    lambda inner: st.one_of(
        inner.map("[{0}]".format),
        inner.map("{{'k': {0}}}".format),
        st.tuples(inner, inner).map(lambda pair: f"MAP {{{pair[0]}: {pair[1]}}}"),
        inner.map("union_value(u := {0})".format),
        inner.map("(SELECT {0} FROM range(2))".format),
    ),
    max_leaves=3,
)
NAMES = st.sampled_from(["a", "b", "a", "sweep", "", " ", '""', "ä", "x\ny"])
ANSWERS = st.lists(st.tuples(EXPRESSIONS, NAMES), min_size=1, max_size=3).map(
    lambda columns: "SELECT " + ", ".join(f'{e} AS "{n}"' if n.strip('"') else e for e, n in columns)
)


@counts()
def test_answers_of_any_type(folder: Path, count: int) -> None:
    forms = st.sampled_from(["table", "csv", "json", "parquet"])

    def check(example: Any) -> None:
        sql, form = example
        check_words(["query", "{folder}/r", sql, "--format", form], folder)

    many(count, st.tuples(ANSWERS, forms), check, "sql")
