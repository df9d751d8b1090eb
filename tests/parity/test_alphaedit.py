"""AlphaEdit against the recorded numbers, its projection, and the keys of earlier edits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.common import (
    ELSEWHERE,
    MEMIT_RECORDED,
    MEMIT_YAML,
    check_record,
    core,
    first_ten,
    lane_edits,
    model,
    moment,
    record,
    relative_error,
    run_groups,
    templates,
)
from workers.artifacts.base import ArtifactData, Workbench
from workers.artifacts.stats import build_null_space
from workers.methods import load_config
from workers.methods.alphaedit import AlphaEdit, AlphaEditConfig, AlphaEditOverlay, alphaedit_keys
from workers.methods.base import ArtifactContext
from workers.model.config import ModelFingerprint
from workers.model.overlay import LaneState, Overlay
from workers.types import DataError

pytestmark = pytest.mark.numeric

CONFIG = AlphaEditConfig.model_validate(
    {
        **{k: v for k, v in MEMIT_RECORDED.items() if k != "mom2_update_weight"},
        "nullspace_threshold": 0.1,
        "L2": 1.0,
    }
)


def built(i: int, copy: int = 0) -> ArtifactData:
    """The null space of the recorded second moment, or of a rounded copy's own."""
    used = ArtifactData({"moment": core("llama", "alphaedit_first10_batch")[f"C_L{i}"]})
    if copy:
        used = moment("llama", i, copy)
    return build_null_space(model("llama"), {"threshold": 0.1, "layer": i}, Workbench({"moment": used}))


def prepared(recorded_texts: Any, copy: int = 0) -> tuple[AlphaEdit, dict[str, ArtifactData]]:
    """With the recorded templates and projections; a rounded copy of the model has its own."""
    recorded = core("llama", "alphaedit_first10_batch")
    projections = {f"null_space.{i}": ArtifactData({"projection": recorded[f"P_L{i}"]}) for i in (0, 1)}
    if copy:
        projections = {f"null_space.{i}": built(i, copy) for i in (0, 1)}
    inputs = {**templates(recorded_texts), **projections}
    return AlphaEdit.prepare(model("llama", copy), CONFIG, inputs), inputs


def recorded_templates(T: int = 1) -> Any:
    return record("llama", "AlphaEdit", T)["context_templates"]


def test_one_batch_of_ten() -> None:
    recorded = core("llama", "alphaedit_first10_batch")
    editor, inputs = prepared(recorded_templates())
    overlay = editor.new_overlay(1)
    editor.edit(overlay, first_ten(inputs))
    for i, site in enumerate(editor.sites):
        assert relative_error(overlay.part_of(site).left_LOJ[0], recorded[f"resid_L{i}"]) <= 1e-3
        assert relative_error(overlay.delta(0, site), recorded[f"delta_L{i}"]) <= 1e-3
        assert overlay.keys_LIM[site.name].shape == (1, 512, 10)
    # layer 0 reads the same keys before and after: nothing below it changes
    assert relative_error(overlay.keys_LIM[editor.sites[0].name][0], recorded["keys_L0"]) <= 1e-5


def test_projection() -> None:
    """The recorded one is of float32, and an eigenvalue lies near the threshold: hence the
    tolerance of layer 0."""
    recorded = core("llama", "alphaedit_first10_batch")
    for i, (rank, tolerance) in enumerate([(121, 2e-3), (445, 1e-4)]):
        found = built(i)
        assert found.meta == {"rank": rank}
        projection_II = found.tensors["projection"]
        assert relative_error(projection_II, recorded[f"P_L{i}"]) <= tolerance
        assert relative_error(projection_II @ projection_II, projection_II) <= 1e-5


def test_a_change_leaves_ordinary_keys_alone() -> None:
    """``delta`` times an eigenvector above the threshold is nothing."""
    editor, inputs = prepared(recorded_templates())
    overlay = editor.new_overlay(1)
    editor.edit(overlay, first_ten(inputs))
    for i, site in enumerate(editor.sites):
        outside_II = torch.eye(512) - built(i).tensors["projection"]
        delta_OI = overlay.delta(0, site)
        assert float((delta_OI @ outside_II).norm() / delta_OI.norm()) <= 5e-3


@pytest.mark.parametrize("T", [1, 10, pytest.param(100, marks=pytest.mark.long)])
def test_scores(T: int) -> None:
    """Edited one after another; the keys of one group are unknown to the next."""
    expected = record("llama", "AlphaEdit", T)

    def replay(copy: int) -> tuple[AlphaEdit, Overlay]:
        editor, inputs = prepared(expected["context_templates"], copy)
        return editor, run_groups(editor, T, expected["n_groups"], inputs)[0]

    check_record(expected, replay, norms=0.1 if T == 100 else 1e-2)


def test_nothing_survives_a_rollback() -> None:
    """The second group of a prepared method is that of a fresh one, and earlier keys do matter
    within a group."""
    editor, inputs = prepared(recorded_templates())
    run_groups(editor, 3, 1, inputs)
    after = editor.new_overlay(1)
    editor.edit(after, lane_edits(editor, [5], 1, 0, inputs))
    fresh, _ = prepared(recorded_templates())
    alone = fresh.new_overlay(1)
    fresh.edit(alone, lane_edits(fresh, [5], 1, 0, inputs))
    for name, tensor in alone.state(0).tensors.items():
        assert torch.equal(after.state(0).tensors[name], tensor)


# --- the closed form ---


def direct(
    projection_II: torch.Tensor, kept_LIM: torch.Tensor, keys_LIN: torch.Tensor, L2: float
) -> torch.Tensor:
    all_LIM = torch.cat([kept_LIM, keys_LIN], 2)
    whole_LII = (
        projection_II @ all_LIM @ all_LIM.transpose(1, 2) + L2 * torch.eye(len(projection_II)).double()
    )
    return torch.linalg.solve(whole_LII, projection_II @ keys_LIN).transpose(1, 2)


def test_lists_and_sums_of_keys_agree() -> None:
    g = torch.Generator().manual_seed(0)
    basis_IR = torch.linalg.qr(torch.randn(24, 15, generator=g, dtype=torch.float64))[0]
    projection_II = basis_IR @ basis_IR.T
    for kept in (0, 4, 30):
        kept_LIM = torch.randn(5, 24, kept, generator=g, dtype=torch.float64)
        keys_LIN = torch.randn(5, 24, 3, generator=g, dtype=torch.float64)
        expected_LNI = direct(projection_II, kept_LIM, keys_LIN, 0.5)
        sum_LII = kept_LIM @ kept_LIM.transpose(1, 2)
        for limit in (1, 20_000, 1 << 30):  # one lane, some, all at once
            listed_LNI = alphaedit_keys(projection_II, keys_LIN, kept_LIM, None, 0.5, limit)
            summed_LNI = alphaedit_keys(projection_II, keys_LIN, kept_LIM[:, :, :0], sum_LII, 0.5, limit)
            torch.testing.assert_close(listed_LNI, expected_LNI, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(summed_LNI, expected_LNI, rtol=1e-9, atol=1e-11)


def test_keys_survive_their_storage_across_the_switch() -> None:
    base = model("llama")
    sites = [base.site(0), base.site(1)]
    overlay = AlphaEditOverlay(sites, 2, torch.float64)
    assert overlay.state(0) == LaneState()
    g = torch.Generator().manual_seed(0)
    total_LII = torch.zeros(2, 512, 512, dtype=torch.float64)
    for count in (3, 200, 100, 7):  # 256 is half the width
        keys_LIN = torch.randn(2, 512, count, generator=g, dtype=torch.float64)
        total_LII += keys_LIN @ keys_LIN.transpose(1, 2)
        for site in sites:
            overlay.remember(site, keys_LIN)
        again = AlphaEditOverlay(sites, 2, torch.float64)
        for lane in range(2):
            again.load_state(lane, overlay.state(lane))
        for lane in range(2):
            a, b = overlay.state(lane).tensors, again.state(lane).tensors
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        kept_LIM = again.keys_LIM[sites[1].name]
        found_LII = kept_LIM @ kept_LIM.transpose(1, 2) + again.sums_LII.get(sites[1].name, 0)
        torch.testing.assert_close(found_LII, total_LII, rtol=1e-9, atol=1e-9)
    assert set(overlay.state(0).tensors) == {f"{site.name}/sum" for site in sites}
    overlay.load_state(0, LaneState())
    assert not overlay.sums_LII[sites[0].name][0].any() and overlay.sums_LII[sites[0].name][1].any()


def test_projections_that_cannot_be_are_refused() -> None:
    moment = {"moment": ArtifactData({"moment": torch.eye(8)})}
    with pytest.raises(DataError, match=r"nullspace_threshold: 0\.5: no eigenvalue .* of layer 3"):
        build_null_space(model("llama"), {"threshold": 0.5, "layer": 3}, Workbench(moment))
    moment = {"moment": ArtifactData({"moment": torch.full((8, 8), float("inf"))})}
    with pytest.raises(DataError, match="second moment of layer 2 is not finite"):
        build_null_space(model("llama"), {"threshold": 0.5, "layer": 2}, Workbench(moment))


# --- for the planner ---


def test_the_projection_is_made_of_the_second_moment(tmp_path: Path) -> None:
    corpus = tmp_path / "text.txt"
    corpus.write_text("one\n")
    config = CONFIG.model_copy(update={"corpus": str(corpus)})

    def specs(config: AlphaEditConfig) -> Mapping[str, Any]:
        return {
            s.name: s
            for s in config.artifacts(ArtifactContext(ModelFingerprint("m", "t"), ELSEWHERE, seed=0))
        }

    first = specs(config)
    assert list(first) == ["templates", "null_space.0", "null_space.1"]
    (moment,) = first["null_space.1"].needs
    assert (moment.name, moment.recipe["layer"]) == ("moment", 1)
    other = specs(config.model_copy(update={"nullspace_threshold": 0.2}))
    assert other["null_space.0"].key != first["null_space.0"].key
    assert other["null_space.0"].needs[0].key == first["null_space.0"].needs[0].key
    corpus.write_text("two\n")
    assert specs(config)["null_space.0"].key != first["null_space.0"].key


def test_easyedit_file(tmp_path: Path) -> None:
    path = tmp_path / "alphaedit.yaml"
    more = 'nullspace_threshold: 2e-2\nL2: 1\nP_loc: "./null_space_project.pt"\n'
    path.write_text(MEMIT_YAML.format(alg="AlphaEdit", layers=[4, 5]) + more)
    config = load_config("alphaedit", {}, path, ELSEWHERE)
    assert isinstance(config, AlphaEditConfig)
    assert (config.layers, config.nullspace_threshold, config.L2) == ((4, 5), 2e-2, 1)
