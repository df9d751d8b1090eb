"""Where the paths and names of a spec are looked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.engine.local import run_local
from orchestrator.engine.sweep import run_sweep
from orchestrator.planning import places
from orchestrator.planning.inputs import read_inputs
from orchestrator.planning.plan import make_plan
from orchestrator.planning.spec import SweepSpec, load_spec, override_spec
from orchestrator.storage.local import LocalStore
from tests.engine import Watch
from tests.small import GOLDEN
from workers.data.tinyworld import assets_dir
from workers.types import DataError, ModelError, SpecError

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


# --- files and folders of hyperparameters ---------------------------------------------------

STATISTICS = {"method": "rome", "hparams": {"layer": 1, "samples": 90, "corpus": "texts/c.txt"}}
BLENDED = {"method": "simie", "hparams": {"base_method": "rome", "base": STATISTICS["hparams"]}}


def with_methods(folder: Path, *methods: object) -> SweepSpec:
    spec_in(folder, "embedded")
    raw = yaml.safe_load((folder / "s.yaml").read_text())
    (folder / "s.yaml").write_text(yaml.safe_dump({**raw, "methods": list(methods)}))
    return load_spec(folder / "s.yaml")


def corpus_at(*folders: Path) -> None:
    for folder in folders:
        (folder / "texts").mkdir()
        (folder / "texts" / "c.txt").write_text("Rain falls in autumn and in spring.\n" * 90)


@pytest.mark.parametrize("method", [STATISTICS, BLENDED], ids=["rome", "simie"])
def test_a_corpus_is_relative_to_the_spec(method: dict[str, Any], folders: tuple[Path, Path]) -> None:
    """And then to the working folder, where earlier versions looked. Its place is no part of an id."""
    there, here = folders
    with pytest.raises(SpecError) as caught:
        make_plan(with_methods(there, method))
    field = "corpus" if method is STATISTICS else "base.corpus"
    label = method["method"]
    assert str(caught.value) == (
        f"methods: {label}: {field}: 'texts/c.txt' does not exist; looked at: {there}/texts/c.txt (no such "
        f"file), {here}/texts/c.txt (no such file)"
    )
    corpus_at(here)
    plans = [make_plan(with_methods(there, method))]
    corpus_at(there)
    plans.append(make_plan(with_methods(there, method)))
    shutil.rmtree(here / "texts")
    plans.append(make_plan(with_methods(there, method)))
    places = [
        {spec.where["corpus"] for spec in plan.artifacts.values() if "corpus" in spec.where} for plan in plans
    ]
    assert places == [{str(here / "texts/c.txt")}, {str(there / "texts/c.txt")}, {str(there / "texts/c.txt")}]
    assert len({(tuple(plan.artifacts), plan.cells[0].cell_id) for plan in plans}) == 1
    chosen = (
        f"methods: {label}: {field}: 'texts/c.txt' is the file {there}/texts/c.txt beside the spec; the file "
        f"{here}/texts/c.txt in the working folder would fit, too"
    )
    said = [[text for text in plan.warnings if "would fit" in text] for plan in plans]
    assert said == [
        [],
        [chosen],
        [],
    ]


def test_a_network_is_relative_to_the_spec_and_found_by_an_actor_elsewhere(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = folders
    schedule = {"steps": 1, "batch_size": 2}
    cells = set()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_hub)
    for name in ("./nets/cls", "nets/cls"):
        serac = {"method": "serac", "hparams": {"classifier": name, "schedule": schedule}}
        with pytest.raises(
            ModelError, match=rf"classifier: .*; looked at: {there}/nets/cls \(no such folder"
        ):
            make_plan(with_methods(there, serac))
        shutil.copytree(GOLDEN / "pretrained" / "serac_llama_tiny-distilbert", there / "nets" / "cls")
        plan = make_plan(with_methods(there, serac))
        cells.add(plan.cells[0].cell_id)
        job = plan.manifest(plan.shards[0]).job
        assert (job.config["classifier"], job.places) == (name, {"classifier": str(there / "nets" / "cls")})
        shutil.rmtree(there / "nets")
    assert len(cells) == 2, "an id holds the name as it is written"
    shutil.copytree(GOLDEN / "pretrained" / "serac_llama_tiny-distilbert", there / "nets" / "cls")
    outcome = run_sweep(with_methods(there, serac), LocalStore(here / "r"), run_local, Watch())
    assert outcome.exit_code == 0 and not outcome.failed_groups


def no_hub(*_: object, **__: object) -> str:
    raise OSError("no network")
