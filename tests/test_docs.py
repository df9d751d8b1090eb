"""The pages: links lead somewhere, and what they list is what there is."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from orchestrator import open_results
from orchestrator.cli.calls import app
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.results.journal import Journal
from orchestrator.results.requests import write_requests
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import seal_json
from tests.shards import finish, make_manifest
from workers.job import ScoreConfig
from workers.scoring.registry import SCORES
from workers.types import Dataset, EditRequest, Probe

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])
HISTORY = {"LOG.md", "CHANGELOG.md"}
"""Pages that tell of files as they were."""

LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
FENCE = re.compile(r"(?ms)^ *```(\w*)\n(.*?)^ *```$")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose_of(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", text_of(page))


def blocks(language: str, *pages: Path) -> Iterator[tuple[str, str]]:
    """Every block of code in a language, and the page it stands on."""
    for page in pages or PAGES:
        for found, code in FENCE.findall(text_of(page)):
            if found == language:
                yield name_of(page), code


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose_of(page))
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


# --- links and files ------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose_of(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths in backticks that begin with a folder of this repository."""
    folders = "|".join(
        re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != "results"
    )
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", prose_of(page))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "LOG.md"], ids=name_of)
def test_prose_breaks_at_a_hundred_characters(page: Path) -> None:
    """Tables, headings and pictures cannot be broken."""
    lines = prose_of(page).splitlines()
    assert [
        line for line in lines if len(line) > 100 and not line.lstrip().startswith(("|", "#", "!["))
    ] == []


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = ROOT / "README.md"
    assert len(text_of(readme).splitlines()) <= 180
    linked = {link.partition("#")[0] for link in LINK.findall(text_of(readme))}
    lacking = [name_of(page) for page in PAGES if page.parent in (ROOT, ROOT / "docs") and page != readme]
    assert [name for name in lacking if name not in linked] == []


def test_citation_and_changelog_know_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert (citation["title"], citation["version"], citation["license"]) == (
        PROJECT["name"],
        PROJECT["version"],
        PROJECT["license"],
    )
    assert f"\n## [{PROJECT['version']}] - " in text_of(ROOT / "CHANGELOG.md")


# --- docs/spec.md ---------------------------------------------------------------------------


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a spec with its default, as the page writes them."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if name == "methods":
            (inner, _) = inner.__args__  # type: ignore[union-attr]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            parts = [inner]
            if inner is ScoreConfig:
                parts += dict.fromkeys(score.settings for line in SCORES.lines for score in line)
            for part in parts:
                yield from keys_of(part, f"{prefix}{name}.")
            continue
        default: Any = field.get_default(call_default_factory=True, validated_data={})
        if default is PydanticUndefined:
            yield f"{prefix}{field.alias or name}", "required"
            continue
        shown = json.dumps(list(default) if isinstance(default, tuple) else default).strip('"') or '""'
        yield f"{prefix}{field.alias or name}", f"`{shown}`"


def test_the_spec_page_has_every_key_with_its_default() -> None:
    rows = re.findall(r"(?m)^\| `([\w.]+)` \| ([^|]+) \| \S", text_of(ROOT / "docs" / "spec.md"))
    assert len(rows) == len(dict(rows))
    assert dict(rows) == dict(keys_of(SweepSpec))


def test_the_spec_page_has_every_command_and_option() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    page = text_of(ROOT / "docs" / "spec.md")
    assert set(re.findall(r"(?m)^editsweep (\w+)", page)) == set(commands)
    written = {
        (option, command)
        for option, of in re.findall(r"(?m)^\| `(--?[\w-]+)[^|]*(?:\\\|[^|]*)?` \| ([^|]+) \|", page)
        for command in re.findall(r"`(\w+)`", of)
    }
    there = {
        (option, name)
        for name, command in commands.items()
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in parameter.opts
    }
    assert written == there - {("--help", name) for name in commands}


# --- examples -------------------------------------------------------------------------------


def test_specs_on_the_pages_are_valid(tmp_path: Path) -> None:
    specs = [(name, code) for name, code in blocks("yaml") if "\nmethods:" in code]
    assert {name for name, _ in specs} >= {"README.md", "docs/spec.md"}
    for name, code in specs:
        assert parse_spec(code, name, tmp_path).grid.T


def _request(number: int) -> EditRequest:
    probes = (Probe("Locality?", "as before"),)
    return EditRequest(f"case-{number}", "Prompt?", "Subject", "Target", locality=probes)


def test_queries_on_the_pages_can_be_asked(tmp_path: Path) -> None:
    data = Dataset("tinyworld", tuple(_request(number) for number in range(4)), "0" * 64)
    cell = {"groups": 4, "config": {"lr": 0.1}, "model": "embedded", "method": "ft"}
    planned = {cell_id: {**cell, "dataset_fingerprint": data.fingerprint} for cell_id in ("a-0", "a-1")}
    for name in ("one", "two"):
        store = LocalStore(tmp_path / name)
        store.publish_new("sweep.json", b"{}")
        store.publish_new("plan.json", seal_json({"cells": planned, "current": ["a-0"]}))
        finish(Journal(store), make_manifest("s0", cell="a", step_edits=50))
        write_requests(data, range(4), store, ResultsPaths())
    one, both = open_results(tmp_path / "one"), open_results(tmp_path / "one", tmp_path / "two")
    shell = re.compile(r'(?s)editsweep query \S+(?: results/\S+)? "(.*?)"')
    queries = [code for _, code in blocks("sql")]
    queries += [query for _, code in blocks("") for query in shell.findall(code) if query != "SQL"]
    queries += [query for _, code in blocks("python") for query in re.findall(r'\.sql\("(.*?)"\)', code)]
    assert len(queries) >= 6
    for query in queries:
        results = both if "SELECT results" in query else one
        assert results.sql(query).num_rows >= 1, query


def test_what_examples_import_is_there() -> None:
    imports = [
        found for _, code in blocks("python") for found in re.findall(r"(?m)^from (\w+) import (.+)$", code)
    ]
    assert ("editsweep", "open_results") in imports
    for module, names in imports:
        assert [name for name in names.split(", ") if not hasattr(import_module(module), name)] == []


# --- docs/map.md ----------------------------------------------------------------------------


def drawn() -> dict[str, set[str]]:
    """Per folder of the map, the names in it. A name ends where two spaces begin its
    description."""
    found: dict[str, set[str]] = {}
    folders: list[str] = []
    (_, code), *_ = blocks("", ROOT / "docs" / "map.md")
    for line in filter(None, code.splitlines()):
        names = re.split(r"  +", line.strip())[0].split()
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = []
        if names[0].endswith("/"):
            folders.append(names[0])
            found["".join(folders)] = set()
        else:
            found["".join(folders)] |= set(names)
    return found


def test_the_map_is_complete() -> None:
    shown = drawn()
    for package in ("editsweep", "workers", "orchestrator"):
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert {name for name in shown if name.startswith(f"{package}/")} == {
            f"{name_of(path)}/" for path in folders
        }
    for folder, names in shown.items():
        there = {path.name for path in (ROOT / folder).glob("*.py")}
        assert names - there <= {"*.py"}, f"{folder}: on the map, and not there"
        if "*.py" not in names:
            assert there - names <= {"__init__.py"}, f"{folder}: there, and not on the map"
