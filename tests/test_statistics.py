"""Second moments beyond the resolution of the precision they were summed in: noticed, said in
`plan`, `run` and `status`, and noted with the cell."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from orchestrator.engine.local import run_local
from orchestrator.engine.statistics import RESOLUTION, read_statistics, say_unresolved
from orchestrator.engine.sweep import plan_sweep, run_sweep
from orchestrator.results.artifact_store import ArtifactStore
from orchestrator.results.query import open_results
from orchestrator.results.status import read_status
from orchestrator.storage.local import LocalStore
from tests.engine import RAW, Watch, rows, run, spec_of
from workers.artifacts.base import ArtifactData
from workers.artifacts.stats import condition

FEW, MANY = 60, 1000
"""Lines of the embedded corpus whose second moment in layer 3 has a condition of 2e7, and of 8e5."""


def changes(method: str = "memit", **hparams: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"v_num_grad_steps": 2, "samples": FEW, **hparams}
    return {
        "methods": [{"method": method, "hparams": settings}],
        "dataset": {"kind": "tinyworld", "edits": 1},
        "grid": {"T": [1], "seeds": [0]},
    }


# --- the condition --------------------------------------------------------------------------


def test_condition_is_the_ratio_of_the_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    root_II = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    moment_II = root_II @ root_II.T
    expected = np.linalg.cond(moment_II.numpy())
    assert condition(moment_II) == float(f"{expected:.3g}")
    assert condition(torch.diag(torch.tensor([2.0, 8.0, 1e6]))) == 5e5
    for singular in (
        torch.zeros(3, 3),
        torch.diag(torch.tensor([1.0, -1e-9])),
        torch.diag(torch.tensor([1e300, 1e-300], dtype=torch.float64)),
    ):
        assert condition(singular) is None
    assert condition(torch.full((3, 3), math.nan)) is None


def test_meta_is_read_without_the_tensors() -> None:
    data = ArtifactData({"moment": torch.eye(300)}, {"tokens": 5, "condition": 1.0}, {"key": "k"})
    blob = data.to_bytes()
    file = io.BytesIO(blob)
    assert ArtifactData.read_meta(file) == data.meta
    assert file.tell() < 1000 < len(blob)
    with pytest.raises(ValueError, match="a header of"):
        ArtifactData.read_meta(io.BytesIO(b"\xff" * 100))


# --- what is said ---------------------------------------------------------------------------


def said(texts: list[str]) -> list[str]:
    return [text for text in texts if "condition of the second moment" in text]


@pytest.mark.parametrize(
    ("method", "hparams", "layers"),
    [
        ("memit", {}, ["layer 3"]),
        ("pmet", {}, ["layer 3"]),
        ("emmet", {"layers": [3, 4]}, ["layer 3"]),
        ("rome", {"layer": 3}, ["layer 3"]),
        ("rome", {"layer": 4}, []),
        ("memit", {"samples": MANY}, []),
        ("memit", {"precision": "float64"}, []),
        ("alphaedit", {}, []),  # it projects, and inverts nothing of the moment
        ("ft", None, []),
    ],
)
def test_a_run_says_it_as_soon_as_the_statistics_are_there(
    method: str, hparams: dict[str, Any] | None, layers: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    settings = changes(method, **(hparams or {}))
    if hparams is None:
        settings["methods"] = [{"method": method, "hparams": {"num_steps": 2}}]
    watch = Watch()
    run(folder, watch, **settings)
    texts = said(watch.warnings)
    assert len(texts) == len(layers), watch.warnings
    for text, layer in zip(texts, layers, strict=True):
        assert text.startswith(f"{method}: ") and f"{layer} (" in text and "layer 4" not in text
        assert "beyond what float32 resolves (8.4e+06)" in text and "set precision: float64" in text
        assert "more samples" in text
    run(folder, watch := Watch(), **settings)
    assert said(watch.warnings) == texts, "a run that finds them says it too"


def test_it_is_noted_with_the_cell(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    settings = changes()
    settings["methods"].append({"method": "ft", "hparams": {"num_steps": 2}})
    run(folder, **settings)
    noted = {c["method"]: c["statistics"] for c in open_results(folder).plan()[0].values()}
    assert noted["ft"] == []
    assert [(s["layer"], s["precision"], s["resolved"]) for s in noted["memit"]] == [
        (3, "float32", False),
        (4, "float32", True),
    ]
    for statistic in noted["memit"]:
        moment_II = load_file(folder / "artifacts" / "second_moment" / f"{statistic['key']}.safetensors")[
            "moment"
        ]
        values = np.linalg.eigvalsh(moment_II.astype(np.float64))
        assert statistic["condition"] == pytest.approx(values[-1] / values[0], rel=6e-3)
        assert statistic["resolved"] == (values[-1] / values[0] <= RESOLUTION["float32"])
    unresolved = {
        c["method"]: [s["layer"] for s in c["unresolved"]] for c in read_status(str(folder))["cells"]
    }
    assert unresolved == {"ft": [], "memit": [3]}


def test_moments_of_earlier_versions_are_measured(tmp_path: Path) -> None:
    """Theirs do not tell their condition, and neither does their plan.json."""
    folder, store = tmp_path / "r", LocalStore(tmp_path / "r")
    spec = spec_of(**changes())
    outcome = run(folder, **changes())
    before = read_statistics(outcome.plan, store)
    expected = list(say_unresolved(outcome.plan, before))
    assert len(expected) == 1
    artifacts = ArtifactStore(store)
    for needed in outcome.plan.artifacts.values():
        data = ArtifactData.from_bytes(
            (folder / artifacts.paths.artifact(needed.kind, needed.key)).read_bytes()
        )
        if needed.kind != "second_moment":
            continue
        older = ArtifactData(data.tensors, {"tokens": data.meta["tokens"]}, data.made_as).to_bytes()
        for path in (
            artifacts.paths.artifact(needed.kind, needed.key),
            artifacts.paths.artifact_info(needed.kind, needed.key),
        ):
            (folder / path).unlink()
        artifacts.put(needed, older)
    (folder / "plan.json").unlink()
    made = plan_sweep(spec, store)
    assert read_statistics(made, store) == before
    watch = Watch()
    run_sweep(spec, store, run_local, watch)
    assert said(watch.warnings) == expected
    assert read_status(str(folder))["cells"][0]["unresolved"]


def test_float32_stays_as_it_is(tmp_path: Path) -> None:
    """The warning changes no number: rows with and without statistics that exist are the same."""
    run(tmp_path / "a", **changes())
    first = rows(tmp_path / "a")
    run(tmp_path / "b", **changes())
    assert rows(tmp_path / "b") == first and first


# --- the command line -----------------------------------------------------------------------


def test_plan_run_and_status_say_it(call: Any, tmp_path: Path) -> None:
    spec, folder = tmp_path / "s.yaml", tmp_path / "r"
    spec.write_text(yaml.safe_dump({**RAW, **changes()}))
    text = "warning: memit: the condition of the second moment of layer 3 (2.02e+07)"
    code, _, err = call("plan", spec, "--results", folder)
    assert code == 0 and text not in err, "nothing is known before it is built"
    assert call("artifacts", spec, "--engine", "local", "--results", folder)[0] == 0
    assert text in call("plan", spec, "--results", folder)[2]
    code, _, err = call("run", spec, "--engine", "local", "--results", folder)
    assert code == 0 and err.count(text) == 1
    code, out, _ = call("status", folder)
    assert code == 0 and "1 of 1 cells (memit) use second moments beyond the resolution" in out
