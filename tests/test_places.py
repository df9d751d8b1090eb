"""Where the paths and names of a spec are looked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from orchestrator.planning import places
from orchestrator.planning.inputs import read_inputs
from orchestrator.planning.plan import make_plan
from orchestrator.planning.spec import SweepSpec, load_spec, override_spec
from workers.data.tinyworld import assets_dir
from workers.types import DataError, ModelError

REQUEST = {"prompt": "Who taught A?", "subject": "A", "target_new": "B"}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The spec's folder and the working folder."""
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
        (folder / "data.jsonl").write_text(json.dumps({**REQUEST, "target_new": folder.name}))
    monkeypatch.chdir(here)
    return there, here


def model_at(*path: Path) -> None:
    for folder in path:
        shutil.copytree(assets_dir(), folder)


def spec_in(folder: Path, name: str) -> SweepSpec:
    raw = {
        "name": "p",
        "model": {"name": name, "device": "cpu"},
        "dataset": {"kind": "jsonl", "path": "data.jsonl", "edits": 1},
        "grid": {"T": [1]},
        "methods": ["none"],
    }
    (folder / "s.yaml").write_text(yaml.safe_dump(raw))
    return load_spec(folder / "s.yaml")


@pytest.mark.parametrize("name", ["./m", "../there/m", "~/m", "{there}/m"])
def test_a_path_is_relative_to_the_spec(
    name: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = folders
    monkeypatch.setenv("HOME", str(there))
    model_at(there / "m", here / "m")
    spec = spec_in(there, name.format(there=there))
    assert (spec.model.name, spec.remarks) == (str(there / "m"), ())


def test_a_path_without_a_model_is_looked_for_nowhere_else(folders: tuple[Path, Path]) -> None:
    there, here = folders
    model_at(here / "m")
    with pytest.raises(ModelError) as caught:
        read_inputs(spec_in(there, "./m"))
    assert str(caught.value) == f"model.name: {str(there / 'm')!r} does not exist"


@pytest.mark.parametrize("name", ["m", "models/m", "a/b/c"])
def test_a_bare_name_is_first_a_folder_beside_the_spec(name: str, folders: tuple[Path, Path]) -> None:
    there, here = folders
    model_at(here / name)
    assert spec_in(there, name).model.name == name  # the working folder's
    assert make_plan(spec_in(there, name)).warnings == ()
    model_at(there / name)
    spec = spec_in(there, name)
    assert spec.model.name == str(there / name)
    [said] = make_plan(spec).warnings
    assert said == (
        f"model.name: {name!r} is the folder {there / name} beside the spec; "
        f"the folder {here / name} in the working folder would fit, too"
    )
    shutil.rmtree(here / name)
    assert (spec_in(there, name).model.name, spec_in(there, name).remarks) == (str(there / name), ())


def test_a_folder_without_a_model_does_not_fit(folders: tuple[Path, Path]) -> None:
    there, here = folders
    model_at(here / "m")
    (there / "m").mkdir()
    spec = spec_in(there, "m")
    assert (spec.model.name, spec.remarks) == ("m", ())


def test_a_copy_from_the_hub_is_mentioned(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there, _ = folders
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--m" / "snapshots" / "abc"
    model_at(snapshot, there / "org" / "m")
    (cache / "models--org--m" / "refs").mkdir()
    (cache / "models--org--m" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    [said] = spec_in(there, "org/m").remarks
    assert said.endswith("; a copy from the hub would fit, too")
    assert not places._on_hub("a/b/c")


@pytest.mark.parametrize(("name", "hub"), [("org/m", True), ("a/b/c", False)])
def test_a_name_that_is_nowhere_names_all_places(
    name: str, hub: bool, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = folders

    def no_network(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    (there / name).mkdir(parents=True)
    with pytest.raises(ModelError) as caught:
        read_inputs(spec_in(there, name))
    looked = f"looked at: {there / name} (without config.json), {here / name} (no such folder)"
    assert str(caught.value).endswith(looked + ", the hub" * hub)


def test_a_spec_in_the_working_folder_has_one_place(folders: tuple[Path, Path]) -> None:
    _, here = folders
    model_at(here / "m")
    spec = spec_in(here, "m")
    assert (spec.model.name, spec.remarks) == ("m", ())


def test_an_override_keeps_the_place(folders: tuple[Path, Path]) -> None:
    there, here = folders
    model_at(there / "m", here / "m")
    again = override_spec(spec_in(there, "m"), ("grid.seeds=[1]",))
    assert again.model.name == str(there / "m")


def test_data_is_relative_to_the_spec(folders: tuple[Path, Path]) -> None:
    there, _ = folders
    spec = spec_in(there, "embedded")
    assert read_inputs(spec).dataset.requests[0].target_new == "there"
    (there / "data.jsonl").unlink()
    with pytest.raises(DataError, match=str(there / "data.jsonl")):
        read_inputs(spec)
