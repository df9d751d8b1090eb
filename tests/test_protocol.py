"""``protocol: easyedit``, single deviations, and the identities that neither may change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import yaml
from pydantic import Field

from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.spec import override_spec, parse_spec
from workers.data import load_dataset
from workers.methods import get_method, load_config, method_names
from workers.methods.base import ADDED_LATER, Deviations, MethodConfig
from workers.methods.ft import FTConfig
from workers.methods.wise.config import WISEConfig
from workers.model.config import EMBEDDED, ModelConfig
from workers.rng import derive_seed
from workers.types import JSON, SpecError

ROOT = Path(__file__).resolve().parent.parent
HERE = ModelConfig(name=EMBEDDED)
ELSEWHERE = ModelConfig(name="elsewhere/model")

PLAIN = {
    "ft": ("4c9e723bbb3d195a", "48072210", 4294960984971102349),
    "ft-ewc": ("78e7c55b2d387c32", "e3900647", 5532044057746916689),
    "lora": ("973dfc69c760666f", "aa8176f8", 1965867968228547257),
    "rome": ("7d180c924c9197d3", "cb2adcb2", 227967364541994004),
    "rrome": ("beeb5ce1f8bcd3c1", "0b981d0f", 2451135985286696656),
    "memit": ("7d648594e1041efe", "0218dc37", 327687632727191086),
    "memit-mass": ("dbc6ceb5e49da4b1", "4ff7e90c", 4539676770680616124),
    "emmet": ("e1558333bf419e5c", "d9f23cca", 5542869015900755409),
    "pmet": ("1457bda227019da5", "cbdc7436", 5963810055358643477),
    "alphaedit": ("c824b17c4c10cfdb", "98eb2a57", 563359193537844763),
    "ultraedit": ("d2ad5a7d27b51894", "1bfca67a", 5869789099898088420),
    "simie": ("6c62237361918999", "3ec08411", 8901424183078930170),
    "grace": ("21175c62ccb6c815", "8deea7af", 8766319975671879402),
    "defer": ("d966485008f0370b", "a8cd4a22", 8916421020156104969),
    "melo": ("f7e9c8f599494f6c", "49a41f99", 1317068186885256956),
    "wise": ("242d67d0bac473b4", "32066b0a", 1282175249328294379),
    "serac": ("dfdfb89eeeea5c1d", "60f1e7ef", 1948194228138083583),
    "mend": ("22ad21daf0b8f5a9", "21dc7244", 7531037549223436505),
    "malmen": ("52995a3da79d9daf", "4c3bdf11", 6289944242919288094),
    "rledit": ("510a9b097b92bb06", "0ed63a8b", 5821133415812056177),
    "none": ("aa67e2ac5ee469ab", "e65f671b", 2332743554956175318),
    "icl": ("af6fedd1bdbb209c", "6a19b501", 6179894608943219150),
}
"""Cell id (T = 10, seed 0), hparams_id and a seed of random numbers of each method as it is,
recorded with version 0.1."""

NAMED: Mapping[str, tuple[dict[str, JSON], tuple[str, str, int]]] = {
    "ft": (
        {"objective": "prompt_last", "public_bos": True, "constraint_around": "edit"},
        ("2c09ccb3bf6917e7", "30b88c11", 5030287962471702074),
    ),
    "mend": (
        {"public_bos": True, "train_on": "prompt"},
        ("18cd44babcaa061c", "f4332975", 3172349223271884668),
    ),
    "pmet": ({"public_target": True}, ("73c365e0de140fae", "0286cf54", 4557025963509479154)),
    "ultraedit": (
        {"statistics": "turn", "public_labels": True, "public_variance": True},
        ("9a62ef9aaf56b911", "06c3a9a9", 2254305729634412214),
    ),
    "wise": (
        {
            "routing": "all_tokens",
            "activation": "public",
            "public_margin": True,
            "public_loss_mask": True,
            "public_decay": True,
            "public_positions": True,
            "public_dare": True,
        },
        ("9a73f590658abc9e", "cfd83c84", 7430487624098058012),
    ),
    "simie": (
        {"base_method": "ft", "base": {"layers": [3], "public_bos": True}},
        ("8282607252d08dec", "46fdee9a", 8173733801372975650),
    ),
}
"""The same with hyperparameters as version 0.1 wrote them: deviations among the others."""


def planned(methods: list[Any], **top: Any) -> Plan:
    raw = {
        "name": "p",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": 10},
        "grid": {"T": [10]},
        "methods": methods,
        **top,
    }
    return make_plan(parse_spec(yaml.safe_dump(raw), "p.yaml", ROOT), dataset=load_dataset("tinyworld"))


def identities(plan: Plan) -> dict[str, tuple[str, str, int]]:
    found = {}
    for cell in plan.cells:
        variant = plan.variants[cell.variant]
        seed = derive_seed(variant.algorithm, variant.config, 0, 0, 0, "mask")
        found[variant.label] = (cell.cell_id, variant.hparams_id, seed)
    return found


def grouped(method: str, hparams: Mapping[str, JSON]) -> dict[str, JSON]:
    """Version 0.1's hyperparameters as they are written now."""
    config = get_method(method).Config
    if method == "simie":
        return {**hparams, "base": grouped(hparams["base_method"], hparams["base"])}
    switches = config.switches()
    assert set(hparams) & set(switches)
    return {
        **{key: value for key, value in hparams.items() if key not in switches},
        "deviations": {key: value for key, value in hparams.items() if key in switches},
    }


# --- identities -----------------------------------------------------------------------------


def test_identities_are_those_of_version_0_1() -> None:
    assert identities(planned(list(method_names()))) == PLAIN


@pytest.mark.parametrize("written", ["as version 0.1 did", "as a group"])
def test_a_deviation_that_is_named_keeps_its_identity(written: str) -> None:
    methods = [
        {"method": name, "hparams": old if written == "as version 0.1 did" else grouped(name, old)}
        for name, (old, _) in NAMED.items()
    ]
    assert identities(planned(methods)) == {name: identity for name, (_, identity) in NAMED.items()}


def test_the_protocol_enters_identities_by_what_it_sets_only() -> None:
    """Everything said, it changes nothing; nothing said, it is what its values are when they are
    said."""
    both = planned(list(method_names()), protocol="easyedit")
    changed = {name for name, identity in identities(both).items() if identity != PLAIN[name]}
    assert changed == {name for name in method_names() if get_method(name).Config.easyedit_values}
    named = {"ft", "mend", "pmet", "ultraedit", "wise"}
    said = [{"method": name, "hparams": NAMED[name][0], "protocol": "easyedit"} for name in named]
    assert identities(planned(said)) == {name: NAMED[name][1] for name in named}
    short = [{"method": "ft", "hparams": {"objective": "prompt_last"}}, *sorted(named - {"ft"})]
    assert identities(planned(short, protocol="easyedit")) == {name: NAMED[name][1] for name in named}
    simie = {
        "method": "simie",
        "hparams": {"base_method": "ft", "base": {"layers": [3], "constraint_around": "base"}},
    }
    assert identities(planned([simie], protocol="easyedit")) == {"simie": NAMED["simie"][1]}


def test_configs_of_older_manifests_are_read_and_written_as_they_were() -> None:
    old = {
        "layers": [3],
        "module": None,
        "objective": "prompt_last",
        "num_steps": 25,
        "lr": 0.0005,
        "weight_decay": 0.0,
        "norm_constraint": None,
        "constraint_around": "base",
        "public_bos": True,
    }
    config = FTConfig.model_validate(old)
    assert config.deviations.public_bos
    assert list(config.model_dump(mode="json").items()) == list(old.items())
    assert FTConfig.model_validate_json(config.model_dump_json()) == config
    assert config.model_dump(mode="json", include={"lr", "deviations"}) == {"lr": 0.0005, "public_bos": True}


class _Group(Deviations):
    public_old: bool = False
    public_new: Annotated[bool, ADDED_LATER] = False


class _Config(MethodConfig):
    old: int = 1
    new: Annotated[int, ADDED_LATER] = Field(2, ge=0)
    many: Annotated[tuple[int, ...], ADDED_LATER] = Field(default_factory=tuple)
    deviations: _Group = _Group()

    easyedit_values: ClassVar[Mapping[str, JSON]] = {"new": 3, "deviations": {"public_new": True}}


def test_a_field_added_later_enters_no_identity_at_its_default() -> None:
    assert _Config().model_dump(mode="json") == {"old": 1, "public_old": False}
    assert _Config(new=2, deviations=_Group(public_new=False)).model_dump() == {"old": 1, "public_old": False}
    changed = _Config(new=5, many=(1,), deviations=_Group(public_new=True))
    assert changed.model_dump(mode="json") == {
        "old": 1,
        "new": 5,
        "many": [1],
        "public_old": False,
        "public_new": True,
    }
    for config in (_Config(), changed):
        assert _Config.model_validate(config.model_dump(mode="json")) == config


# --- what the protocol sets -----------------------------------------------------------------


def test_the_protocol_sets_what_is_left_open() -> None:
    assert load_config("ft", {"layers": [1]}, None, ELSEWHERE).deviations.public_bos is False  # type: ignore[attr-defined]
    config = load_config("wise", {"layer": 4}, None, ELSEWHERE, "easyedit")
    assert isinstance(config, WISEConfig)
    assert (config.routing, config.activation) == ("all_tokens", "public")
    assert set(config.deviations.model_dump().values()) == {True}


def test_the_protocol_overrides_nothing_said(tmp_path: Path) -> None:
    hparams = {"layer": 4, "routing": "prompt", "deviations": {"public_margin": False}, "public_decay": False}
    config = load_config("wise", hparams, None, ELSEWHERE, "easyedit")
    assert isinstance(config, WISEConfig)
    assert (config.routing, config.activation) == ("prompt", "public")
    off = {name for name, value in config.deviations.model_dump().items() if not value}
    assert off == {"public_margin", "public_decay"}
    path = tmp_path / "ft.yaml"
    path.write_text(
        'alg_name: "FT"\nlayers: [1]\nconstraint_around: base\npublic_bos: false\n'
        "objective_optimization: target_new\n"
    )
    from_file = load_config("ft", {}, path, ELSEWHERE, "easyedit")
    assert from_file == FTConfig(layers=(1,))
    over = load_config("ft", {"deviations": {"public_bos": True}}, path, ELSEWHERE, "easyedit")
    assert over == load_config("ft", {"public_bos": True}, path, ELSEWHERE)


@pytest.mark.parametrize("method", method_names())
def test_every_deviation_is_set_and_no_tuned_value_is(method: str) -> None:
    """Else hyperparameters tuned for the embedded model would stand in the protocol's way there."""
    kind = get_method(method)
    values = kind.Config.easyedit_values
    assert set(values) <= set(kind.Config.model_fields)
    assert values.get("deviations", {}) == dict.fromkeys(kind.Config.switches(), True)
    assert not set(kind.embedded()) & {*values, *kind.Config.switches()}
    config = load_config(method, {}, None, HERE, "easyedit")
    assert {**config.model_dump(), **kind.Config.nested(values).get("deviations", {})} == config.model_dump()


def test_a_variant_may_differ_from_the_sweep() -> None:
    plan = planned(
        ["wise", {"method": "wise", "label": "as-published", "protocol": "paper"}], protocol="easyedit"
    )
    assert identities(plan) == {"wise": NAMED["wise"][1], "as-published": PLAIN["wise"]}
    again = override_spec(plan.spec, ("methods.0.protocol=paper", "methods.1.protocol=easyedit"))
    assert [method.protocol for method in again.methods] == ["paper", "easyedit"]


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "top", "field"),
    [
        (["ft"], {"protocol": "easyedti"}, "protocol"),
        ([{"method": "ft", "protocol": "easyedti"}], {}, "methods.0.protocol"),
    ],
)
def test_an_unknown_protocol_is_refused_with_the_choices(
    methods: list[Any], top: dict[str, Any], field: str
) -> None:
    said = rf"p\.yaml:\s+{re.escape(field)}: 'easyedti' is not valid; choose 'paper' or 'easyedit'"
    with pytest.raises(SpecError, match=said):
        planned(methods, **top)


@pytest.mark.parametrize("protocol", ["paper", "easyedit"])
@pytest.mark.parametrize(
    ("hparams", "said"),
    [
        ({"deviations": {"public_boss": True}}, r"deviations\.public_boss: unknown key.*'public_bos'"),
        ({"public_bos": "maybe"}, r"deviations\.public_bos: .*'maybe'"),
        ({"deviations": 3}, r"deviations: .*found 3"),
        (
            {"public_bos": True, "deviations": {"public_bos": True}},
            "public_bos: given twice, alone and in deviations",
        ),
        ({"public_margin": True}, "public_margin: unknown key"),
    ],
)
def test_faulty_deviations(hparams: dict[str, JSON], said: str, protocol: Any) -> None:
    with pytest.raises(SpecError, match=f"method ft: {said}"):
        load_config("ft", {"layers": [1], **hparams}, None, ELSEWHERE, protocol)


# --- docs -----------------------------------------------------------------------------------


def test_the_methods_page_has_what_the_protocol_sets() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    section = page.partition("\n### Paper or public code\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"(?m)^\| `([\w-]+)` \| (.+) \|$", section))
    expected = {}
    for name in method_names():
        values = get_method(name).Config.easyedit_values
        if values:
            plain = [f"`{key}: {yaml_word(value)}`" for key, value in values.items() if key != "deviations"]
            group = [f"`{switch}`" for switch in values.get("deviations", {})]
            expected[name] = ", ".join(plain + group)
    assert rows == expected


def yaml_word(value: JSON) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
