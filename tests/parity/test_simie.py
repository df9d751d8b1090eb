"""SimIE against the recorded numbers and its ridge form, what it wraps, and the hyperparameter
files of EasyEdit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.common import check_record, inverse, lane_edits, model, record, run_groups
from tests.parity.test_rome import RECORDED, recorded_templates
from tests.parity.test_wise import public_base
from tests.small import GOLDEN, build_inputs, random_model
from workers.methods import get_method, load_config, method_names
from workers.methods.base import ArtifactContext, EditOutcome, LaneEdit
from workers.methods.families.locate import request_lines
from workers.methods.rome import ROME, ROMEConfig
from workers.methods.simie import BASES, SimIE, SimIEConfig
from workers.model.base import model_shape
from workers.model.batch import Batch, Encoded, collate
from workers.model.config import EMBEDDED, ModelConfig, ModelFingerprint
from workers.model.overlay import LowRankOverlay, Overlay
from workers.types import EditRequest, SpecError

pytestmark = pytest.mark.numeric

ELSEWHERE = ModelConfig(name="some/other-model")


class LeftPaddedROME(ROME):
    """ROME as it ran in SimIE's records: on rows padded on the left, but read at the columns of
    rows padded on the right.

    The public code chooses the padding by the method's name, and SimIE's is not among those that
    ROME's code needs padded on the right. Positions count columns. Written down for the pristine
    model, one request after another.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    def edit(self, overlay: LowRankOverlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        assert overlay.rank == 0
        for (request,) in (edit.requests for edit in edits):
            if request.case_id not in self.known:  # what the pristine model gives is the same in every group
                self.known[request.case_id] = self.factors(request)
        left, right = zip(*(self.known[edit.requests[0].case_id] for edit in edits), strict=True)
        overlay.add(torch.stack(left), torch.stack(right))
        return [EditOutcome(self.config.v_num_grad_steps - 1, 0.0) for _ in edits]

    def rows(self, encoded: Sequence[Encoded]) -> Batch:
        return collate(encoded, [0] * len(encoded), self.base.encoder.pad_id, public_positions=True)

    def run(self, rows: Batch, delta_O: Tensor, lookup: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and input and output (before the vector is added) of the edited map."""
        caught: list[Tensor] = []

        def add(_: Any, args: tuple[Tensor], output_BSO: Tensor) -> Tensor:
            caught.extend((args[0], output_BSO.detach()))
            here_BS1 = torch.nn.functional.one_hot(torch.tensor(lookup), output_BSO.shape[1])[:, :, None]
            return output_BSO + here_BS1 * delta_O

        handle = self.site.module.register_forward_hook(add)
        try:
            logits = self.base.logits(self.base.hidden_states(rows))
        finally:
            handle.remove()
        return logits, caught[0].detach(), caught[1]

    def factors(self, request: EditRequest) -> tuple[Tensor, Tensor]:
        config = self.config
        texts = self.inputs["templates"].meta["templates"]
        *contexts, essence = lines = request_lines(self.base, request, texts, config)
        lookup = [line.lookup for line in lines]
        rows = self.rows([line.encoded for line in lines])
        delta_O = torch.zeros(self.site.shape[0], requires_grad=True)
        optimizer = torch.optim.Adam([delta_O], lr=config.v_lr)
        kept = start_O = None
        for step in range(config.v_num_grad_steps):
            logits, _, output_BSO = self.run(rows, delta_O, lookup)
            logp_BSV = logits.log_softmax(2)
            now_V = logp_BSV[len(contexts), essence.lookup]
            if kept is None or start_O is None:
                kept, start_O = now_V.detach(), output_BSO[0, lookup[0]]
            told = [
                -sum(logp_BSV[i, line.read + j, token] for j, token in enumerate(line.target))
                / len(line.target)
                for i, line in enumerate(contexts)
            ]
            kl = (now_V.exp() * (now_V - kept)).sum()
            loss = (
                torch.stack(told).mean()  # type: ignore[arg-type]
                + config.kl_factor * kl
                + config.v_weight_decay * delta_O.norm() / start_O.norm() ** 2
            )
            if loss < 5e-2 or step == config.v_num_grad_steps - 1:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            largest = config.clamp_norm_factor * start_O.norm()
            with torch.no_grad():
                delta_O.mul_((largest / delta_O.norm()).clamp(max=1.0))
        with torch.no_grad():
            nothing_O = torch.zeros_like(delta_O)
            prompts = [
                Encoded(line.encoded.ids[: line.encoded.prompt_len], line.encoded.prompt_len)
                for line in contexts
            ]
            _, input_BSI, _ = self.run(self.rows(prompts), nothing_O, lookup[:-1])
            key_I = torch.stack([input_BSI[i, at] for i, at in enumerate(lookup[:-1])]).mean(0)
            right_I = self._direction(key_I[None])[0]
            _, input_BSI, output_BSO = self.run(self.rows(prompts[:1]), nothing_O, lookup[:1])
            left_O = start_O + delta_O - output_BSO[0, lookup[0]]
            return left_O / (input_BSI[0, lookup[0]] @ right_I), right_I


@cache
def recorded_base(copy: int = 0) -> LeftPaddedROME:
    inverse_II = inverse("llama", copy)
    return LeftPaddedROME(
        public_base("llama", copy),
        ROMEConfig.model_validate(RECORDED),
        recorded_templates("llama"),
        inverse_II,
    )


def over(editor: ROME, **changes: Any) -> SimIE:
    config = SimIEConfig.model_validate({"base_method": "rome", "base": RECORDED, **changes})
    return SimIE(editor.base, config, editor.inputs, editor)


@pytest.mark.parametrize("T", [pytest.param(1, marks=pytest.mark.slow), 10])
def test_scores(T: int) -> None:
    expected = record("llama", "SimIE", T)

    def replay(copy: int) -> tuple[SimIE, Overlay]:
        editor = over(recorded_base(copy), lamHyper=10.0)
        return editor, run_groups(editor, T, expected["n_groups"])[0]

    check_record(expected, replay, norms=1e-3)


# --- what the change is ---


class Given(ROME):
    """Gives each request a change of its own, whatever the model says."""

    def edit(self, overlay: LowRankOverlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        generators = [edit.streams.generator("change") for edit in edits]
        out, in_features = self.site.shape
        left, right = (
            torch.stack([torch.randn(n, generator=g) for g in generators]) for n in (out, in_features)
        )
        overlay.add(left, right)
        return [EditOutcome(0, 0.0) for _ in edits]


def given(dtype: torch.dtype = torch.float64, **changes: Any) -> SimIE:
    base = random_model("llama", dtype)
    config = {"layer": 1, "mom2_adjustment": False, "context_template_length_params": []}
    editor = Given(base, ROMEConfig.model_validate(config), {})
    return over(editor, base=config, **changes)


def ridge(editor: SimIE, edits: Sequence[LaneEdit], weight: float) -> Tensor:
    """The change by its definition: the normal equation of all edits at once."""
    (site,) = editor.sites
    gram_II = weight * torch.eye(site.shape[1], dtype=torch.float64)
    wanted_OI = torch.zeros(site.shape, dtype=torch.float64)
    for edit in edits:
        fresh = editor.editor.new_overlay(1)
        editor.editor.edit(fresh, [edit])
        ((keys_NI,),) = editor._keys(editor.new_overlay(1), [edit])
        gram_II += keys_NI.T @ keys_NI
        wanted_OI += fresh.delta(0) @ keys_NI.T @ keys_NI  # type: ignore[attr-defined]
    return torch.linalg.solve(gram_II, wanted_OI.T).T


@pytest.mark.parametrize("edits", [1, 3, 20])  # twenty requests have more tokens than the map has inputs
@pytest.mark.parametrize("weight", [1e-3, 10.0])
def test_the_recursion_ends_at_the_ridge_solution(edits: int, weight: float) -> None:
    editor = given(lamHyper=weight)
    sequence = [lane_edits(editor, [0], edits, position, {})[0] for position in range(edits)]
    overlay = editor.new_overlay(1)
    for edit in sequence:
        (outcome,) = editor.edit(overlay, [edit])
        assert 0 < outcome.details["kept"] <= 1 + 1e-9
    (site,) = editor.sites
    change_OI = overlay.weight(0, site) - site.weight_OI
    assert f"{site.name}/{'sum' if edits == 20 else 'keys'}" in overlay.state(0).tensors
    expected_OI = ridge(editor, sequence, weight)
    assert float((change_OI - expected_OI).norm() / expected_OI.norm()) <= 1e-9


def test_without_a_weight_the_request_is_answered_as_by_the_base_method() -> None:
    editor = given(lamHyper=1e-9)
    (edit,) = lane_edits(editor, [0], 1, 0, {})
    overlay, fresh = editor.new_overlay(1), editor.editor.new_overlay(1)
    editor.edit(overlay, [edit])
    editor.editor.edit(fresh, [edit])
    pair = editor.base.encoder.pair(edit.requests[0].prompt, edit.requests[0].target_new)
    rows = collate([pair], [0], editor.base.encoder.pad_id)
    wanted = fresh.hidden_states(editor.base, rows)
    assert (overlay.hidden_states(editor.base, rows) - wanted).abs().max() <= 1e-6
    assert (editor.base.hidden_states(rows) - wanted).abs().max() > 1e-2
    assert 0 < overlay.delta_norm(0) < fresh.delta_norm(0)  # type: ignore[operator]


def test_present_weights_are_edited_and_give_the_keys() -> None:
    """Two maps in a row: the second one's keys depend on the first one's change only where the
    present weights are edited."""
    base = random_model("gpt2")
    ft = {"layers": (1, 2), "lr": 1e-2, "num_steps": 3}
    keys, weights = [], []
    for pristine in (True, False):
        config = SimIEConfig(base_method="ft", base=ft, lamHyper=1e-2, init_model=pristine)
        editor = SimIE.prepare(base, config, {})
        overlay = editor.new_overlay(1)
        for position in range(2):
            (edit,) = lane_edits(editor, [0], 2, position, {})
            found = editor._keys(overlay, [edit])
            editor.edit(overlay, [edit])
        keys.append(found[0])
        weights.append(overlay.weight(0, editor.sites[0]))
    assert torch.equal(keys[0][0], keys[1][0]) and not torch.allclose(keys[0][1], keys[1][1])
    assert not torch.allclose(*weights)


def test_a_system_that_rounding_made_singular_is_not_finite() -> None:
    editor = given(lamHyper=1e-300)
    overlay = editor.new_overlay(1)
    (edit,) = lane_edits(editor, [0], 1, 0, {})
    for _ in range(2):  # the same keys again
        editor.edit(overlay, [edit])
    assert not overlay.finite(0)


# --- what it wraps ---

SMALL: Mapping[str, Any] = {
    "corpus": str(GOLDEN / "corpus.txt"),
    "samples": 100,
    "v_num_grad_steps": 2,
    "context_template_length_params": [[5, 5]],
}


@pytest.mark.parametrize("name", BASES)
def test_every_base_method_is_blended(name: str) -> None:
    fields = get_method(name).Config.model_fields
    values = {**SMALL, "layer": 0, "layers": [0, 1], "num_steps": 2, "nullspace_threshold": 1.0}
    config = SimIEConfig(base_method=name, base={k: v for k, v in values.items() if k in fields})
    base = random_model("llama")
    specs = [s.model_dump() for s in config.artifacts(ArtifactContext(FINGERPRINT, ELSEWHERE, 0))]
    assert specs == [
        s.model_dump() for s in config.base_config.artifacts(ArtifactContext(FINGERPRINT, ELSEWHERE, 0))
    ]
    inputs = build_inputs(base, "simie", config)
    editor = SimIE.prepare(base, config, inputs)
    overlay = editor.new_overlay(2)
    for position in range(2):
        editor.edit(overlay, lane_edits(editor, [0, 1], 2, position, inputs))
    for lane in range(2):
        assert all(not torch.equal(overlay.weight(lane, site), site.weight_OI) for site in editor.sites)
        assert overlay.finite(lane)
    assert config.overlay_bytes(SHAPE, 10) > overlay.lane_bytes(0)


FINGERPRINT = ModelFingerprint("m", "t")
SHAPE = model_shape(model("llama").config)


def test_what_is_no_change_of_a_weight_is_refused() -> None:
    for name in {*method_names()} - {*BASES}:
        with pytest.raises(
            SpecError, match=rf"base_method: '{name}' cannot be wrapped; choices: rome, .*, ft-ewc$"
        ):
            load_config("simie", {"base_method": name}, None, ELSEWHERE)
    with pytest.raises(SpecError, match="base_method: this field is required"):
        load_config("simie", {}, None, ELSEWHERE)


def test_errors_of_the_base_method_say_so() -> None:
    def config(**values: Any) -> Any:
        return load_config("simie", {"base_method": "rome", **values}, None, ELSEWHERE)

    with pytest.raises(SpecError, match=r"method simie: base: rome: layer: this field is required"):
        config()
    with pytest.raises(
        SpecError, match=r"base: rome: layers: unknown key 'layers' \(did you mean 'layer'\?\)"
    ):
        config(base={"layer": 0, "layers": [0]})
    with pytest.raises(SpecError, match=r"base\.layer: layer 6 is out of range; the model has layers 0 to 5"):
        config(base={"layer": 6}).check(SHAPE)
    with pytest.raises(SpecError, match=r"base\.corpus: ROME needs a text or JSONL file"):
        config(base={"layer": 0}).artifacts(ArtifactContext(FINGERPRINT, ELSEWHERE, 0))
    with pytest.raises(SpecError, match=r"lamHyper: .*greater than 0"):
        config(base={"layer": 0}, lamHyper=0)
    with pytest.raises(SpecError, match="init_model: false, but alphaedit keeps more than its change"):
        config(base_method="alphaedit", base={"layers": [0]}, init_model=False)


def test_defaults_of_the_base_method_are_part_of_the_config() -> None:
    one, other = (
        SimIEConfig(base_method="rome", base=base) for base in ({"layer": 0}, {"layer": 0, "v_lr": 0.5})
    )
    assert one == other and one.base["v_lr"] == 0.5
    assert one.uses_seed
    assert not SimIEConfig(base_method="ft", base={"layers": [0]}).uses_seed


def test_the_embedded_model_has_defaults_for_every_base_method() -> None:
    embedded = ModelConfig(name=EMBEDDED)
    assert load_config("simie", {}, None, embedded).model_dump()["base_method"] == "rome"
    for name in BASES:
        found = load_config("simie", {"base_method": name}, None, embedded).model_dump(mode="json")["base"]
        assert found == load_config(name, {}, None, embedded).model_dump(mode="json")


# --- hyperparameter files ---

YAML = """
alg_name: "SimIE"
model_name: "./hugging_cache/Llama-3-8B"
device: 0
base_method: "{base}"
lamHyper: 10000.0
init_model: true
solver: "LU"
fast: false
model_parallel: false
fp16: false
max_length: 40
"""


def written(folder: Path, base: str = "ROME") -> Path:
    (folder / "SimIE").mkdir()
    path = folder / "SimIE" / "llama3-8b.yaml"
    path.write_text(YAML.format(base=base))
    return path


def test_easyedit_file_finds_that_of_the_base_method(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(
        SpecError, match=r"llama3-8b\.yaml \(method simie\): base: rome: layer: this field is required"
    ):
        load_config("simie", {}, path, ELSEWHERE)
    given = load_config("simie", {"base": {"layer": 4}}, path, ELSEWHERE).model_dump()
    assert (given["base_method"], given["lamHyper"], given["init_model"], given["base"]["layer"]) == (
        "rome",
        1e4,
        True,
        4,
    )
    (tmp_path / "ROME").mkdir()
    theirs = tmp_path / "ROME" / "llama3-8b.yaml"
    theirs.write_text(
        'alg_name: "ROME"\nlayers: [5]\nv_lr: 5e-1\nrewrite_module_tmp: "model.layers.{}.mlp.down_proj"\n'
    )
    found = load_config("simie", {}, path, ELSEWHERE).model_dump()["base"]
    assert (found["layer"], found["module"]) == (5, "mlp.down_proj")
    theirs.write_text('alg_name: "ROME"\nlayers: [5, 6]\n')
    with pytest.raises(
        SpecError, match=r"ROME/llama3-8b\.yaml: layers: \[5, 6\]: ROME edits exactly one layer"
    ):
        load_config("simie", {}, path, ELSEWHERE)


@pytest.mark.parametrize("base", ["WISE", "../ROME"])
def test_easyedit_file_with_another_base_method(tmp_path: Path, base: str) -> None:
    with pytest.raises(
        SpecError, match=rf"base_method: '{base}' cannot be wrapped; choices: ROME, R-ROME, MEMIT"
    ):
        load_config("simie", {}, written(tmp_path, base), ELSEWHERE)
