"""A sweep spec: YAML -> frozen, validated models. The only module that reads a user's YAML.

    spec = load_spec(Path("sweeps/demo.yaml"), overrides=("grid.T=[1,10]",))
    spec.grid.T          # (1, 10)
    spec.methods[0]      # MethodSpec(method="ft", label="ft", ...)

An invalid spec raises :class:`~workers.types.SpecError`, which names the file, the field, the value
and the valid choices. Checks that need the model or the data set (such as N against the data set's
size) are in :mod:`orchestrator.planning.inputs` and :mod:`orchestrator.planning.plan`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from orchestrator.planning.places import Found, find_model, is_bare
from orchestrator.planning.runtime_env import check_spec_environment
from workers.data import DATASETS, TargetField
from workers.inputs import explain, found, kind_of, parse_yaml, read_text, short
from workers.job import Rollback, ScoreConfig
from workers.model.config import EMBEDDED, ModelConfig
from workers.scoring.registry import SCORES
from workers.types import DataError, ModelError, ProtocolName, SpecError, Written

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_TEMPLATE_TAKEN = frozenset(
    {"messages", "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "tools"}
    | {"documents", "chat_template", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs"}
)


class DatasetSpec(Written):
    """Data set of the requests that are edited. Relative paths start at the spec file's folder."""

    kind: str = Field(description=f"one of {', '.join(DATASETS)}")
    edits: int = Field(ge=1, description="N: total number of edits of each cell")
    order: Literal["file", "shuffle"] = "shuffle"
    path: Path | None = None
    train_path: Path | None = None
    on_bad_record: Literal["error", "skip"] = "error"
    target_field: TargetField | None = Field(
        None, description="field of the target, for records that have both `ans` and `alt`"
    )
    joiner: str | None = Field(
        None,
        max_length=100,
        description="text between every prompt and its answer; null: one space, and nothing after a prompt that "
        "is written without spaces (Chinese, Japanese, Thai)",
    )

    @field_validator("kind")
    @classmethod
    def _known(cls, value: str) -> str:
        return _known_kind(value)


class TrainingSpec(Written):
    """Training data of methods that train a network before they edit (MEND, SERAC, MALMEN). It must
    not contain requests that the sweep edits, unless ``allow_overlap``."""

    kind: str | None = Field(
        None,
        description="as dataset.kind; null: the embedded world's training data, or dataset.train_path of zsre",
    )
    path: Path | None = None
    shards: tuple[int, ...] = Field(
        (),
        description="number of requests of each data shard, in file order; training on a further shard "
        "continues from the network trained on the earlier ones; "
        "empty: one shard with all requests",
    )
    on_bad_record: Literal["error", "skip"] = "error"
    target_field: TargetField | None = Field(None, description="as dataset.target_field")
    allow_overlap: bool = Field(
        False, description="true: train also on requests that the sweep edits; recorded in every row"
    )

    @field_validator("kind")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return None if value is None else _known_kind(value)

    @field_validator("shards")
    @classmethod
    def _positive(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        low = [v for v in values if v < 1]
        if low:
            raise ValueError(f"a data shard has at least 1 request, not {low[0]}")
        return values

    @model_validator(mode="after")
    def _path_of_a_kind(self) -> Self:
        if self.path is not None and self.kind is None:
            raise ValueError(f"kind: required with path; choose {', '.join(DATASETS)}")
        return self


class GridSpec(Written):
    """The axes of the grid, which every method is run on."""

    T: tuple[int, ...] = Field(min_length=1, description="edits between two rollbacks; each divides N")
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    rollback: Rollback = "group"
    batch_size: int = Field(
        1,
        ge=1,
        description="requests edited in one call, unless a variant has its own number; divides every T",
    )

    @field_validator("T", "seeds", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return _as_list(value)

    @field_validator("T", "seeds")
    @classmethod
    def _unique(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        twice = sorted({v for v in values if values.count(v) > 1})
        if twice:
            raise ValueError(f"values appear twice: {', '.join(map(str, twice))}")
        return values

    @field_validator("T")
    @classmethod
    def _positive(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        low = [v for v in values if v < 1]
        if low:
            raise ValueError(f"T counts edits and is at least 1, not {low[0]}")
        return values

    @field_validator("seeds")
    @classmethod
    def _small(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        bad = [v for v in values if not 0 <= v < 1 << 31]
        if bad:
            raise ValueError(f"a seed is between 0 and 2147483647, not {bad[0]}")
        return values


class MethodSpec(Written):
    """One variant of a method. In the YAML, ``name`` alone means ``{method: name}``."""

    method: str
    label: str = ""
    hparams: dict[str, Any] = Field(default_factory=dict)
    hparams_file: Path | None = None
    protocol: ProtocolName | None = Field(None, description="null: the sweep's protocol")
    T: tuple[int, ...] = Field(
        (), description="which of the grid's T this variant is run at; empty: all of them"
    )
    batch_size: int | None = Field(
        None, ge=1, description="requests edited in one call, for this variant; null: what the grid says"
    )

    @field_validator("T", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return _as_list(value)

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"method": value}
        if isinstance(value, dict) and not value.get("label") and isinstance(value.get("method"), str):
            value = {**value, "label": value["method"]}
        return value

    @field_validator("label")
    @classmethod
    def _plain(cls, value: str) -> str:
        return _plain_name(value)


class Resources(Written):
    """Resources that one actor reserves. Fractions of a GPU are allowed."""

    cpu: float = Field(1, gt=0, le=10_000)
    gpu: float = Field(0, ge=0, le=1000)
    memory_gb: float = Field(
        0, ge=0, le=1_000_000, description="memory an actor needs (0: twice the model's weights)"
    )


class EngineSpec(Written):
    """Settings of how the work is divided and run. They affect speed and memory, never the set of
    cells."""

    lanes: int | Literal["auto"] = Field(10, description="groups edited in lockstep; auto: as many as fit")
    lanes_across_seeds: bool = Field(
        False, description="true: the seeds of a cell share waves; false: a wave holds groups of one cell"
    )
    share_prefixes: bool = Field(
        True,
        description="true: with rollback: group, a lane also scores the groups of smaller T that start at "
        "the same request; "
        "false: every T makes all of its edits",
    )
    gpu_memory_gb: float | None = Field(
        None, gt=0, le=100_000, description="memory of one GPU in GiB, as declared"
    )
    threads: int = Field(1, ge=1, le=1024, description="torch threads of one actor")
    cache_bytes: int = Field(
        256 << 20,
        ge=0,
        le=1 << 50,
        description="size of an actor's cache for activations of repeated scoring batches",
    )
    shard_edits: int = Field(250, ge=1, description="approximate edits of one shard; a wave is never cut")
    step_edits: int = Field(50, ge=1, description="approximate edits between two commits")
    max_actors: int | None = Field(None, ge=1, le=100_000)
    resources: Resources = Resources()
    max_failures: int = Field(2, ge=0, le=1000, description="restarts after a failure (a lost node counts)")
    checkpoint_seconds: float = Field(
        30,
        ge=0,
        le=86_400,
        description="approximate time between two saves of an artifact under construction",
    )

    @field_validator("lanes", mode="before")
    @classmethod
    def _count_or_auto(cls, value: object) -> object:
        if value == "auto" or (
            isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10_000
        ):
            return value
        raise ValueError(f"{short(value)} is not valid; give a whole number from 1 to 10000, or auto")


class RaySpec(Written):
    """The Ray cluster. Without an address, a local Ray is started and shut down at the end."""

    address: str | None = Field(None, description="host:port, or auto")
    runtime_env: dict[str, Any] = Field(
        default_factory=dict, description="env_vars that run nothing; the rest by --runtime-env FILE"
    )
    connect_seconds: float = Field(15, gt=0, le=86_400)

    @field_validator("runtime_env")
    @classmethod
    def _harmless(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_spec_environment(value)

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is None or value == "auto":
            return value
        if value.startswith("ray://"):
            raise ValueError(
                f"{short(value)} is not host:port or auto: Ray Client is not supported; run editsweep on a "
                "node of the cluster"
            )
        host, _, port = value.rpartition(":")
        if not host or "/" in host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise ValueError(
                f"{short(value)} is not host:port or auto; leave it out to start a local Ray on this machine"
            )
        return value


def _read_scoring(value: object, handler: ValidatorFunctionWrapHandler) -> ScoreConfig:
    """Read the settings under ``scoring``, including those of individual scores."""
    if isinstance(value, ScoreConfig):
        value = value.model_dump()
    if not isinstance(value, dict):
        read: ScoreConfig = handler(value)  # raises pydantic's error message
        return read
    return SCORES.read(value)


@dataclass(frozen=True)
class _Origin:
    """Where a spec was read. Specs from two folders may be equal."""

    folder: Path = field(compare=False)


class SweepSpec(Written):
    """A whole sweep, as written by the user and completed with defaults."""

    name: str
    model: ModelConfig
    dataset: DatasetSpec
    grid: GridSpec
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    protocol: ProtocolName = Field(
        "paper",
        description="source of hyperparameters that the spec leaves open and paper and public code differ in",
    )
    training: TrainingSpec = TrainingSpec()
    scoring: Annotated[ScoreConfig, WrapValidator(_read_scoring)] = Field(
        default_factory=lambda: SCORES.read({})
    )
    chat_template: bool = False
    template: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict,
        description="variables of the chat template, such as enable_thinking: false; date: the day it is told",
    )
    engine: EngineSpec = EngineSpec()
    ray: RaySpec = RaySpec()

    _found_model: Found | None = PrivateAttr(None)
    _origin: _Origin = PrivateAttr(default_factory=lambda: _Origin(Path.cwd()))

    @property
    def base(self) -> Path:
        """The folder at which relative paths start: the spec file's, or the working folder."""
        return self._origin.folder

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the reader of the spec's file chose where it could be read in several ways."""
        place = self._found_model
        return () if place is None or place.remark is None else (place.remark,)

    @property
    def looked_at(self) -> tuple[str, ...]:
        """The places where the spec's reader found no model of a bare name."""
        return () if self._found_model is None else self._found_model.looked_at

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        return _plain_name(value)

    @field_validator("template", mode="before")
    @classmethod
    def _days_are_texts(cls, value: object) -> object:
        """YAML reads 2024-07-26 as a day, which a template gets as the text that was written."""
        if not isinstance(value, dict):
            return value
        return {name: day.isoformat() if type(day) is date else day for name, day in value.items()}

    @model_validator(mode="after")
    def _divides(self) -> Self:
        n = self.dataset.edits
        for t in self.grid.T:
            if n % t:
                raise ValueError(_not_a_divisor(t, n))
        for i in range(len(self.methods)):
            size, name = self.batch_size(i)
            for t in self.sizes(i):
                if t % size:
                    near = _nearest(size, [b for b in range(1, t + 1) if t % b == 0])
                    raise ValueError(
                        f"{name}: {size} does not divide T={t}; the nearest valid values are {near}"
                    )
            for mark in self.scoring.score_at:
                if mark % size:
                    near = " and ".join(str(m) for m in (mark - mark % size, mark - mark % size + size) if m)
                    raise ValueError(
                        f"scoring.score_at: {mark} lies within a batch of {name}={size} edits; the "
                        f"nearest valid values "
                        f"are {near}"
                    )
        return self

    @model_validator(mode="after")
    def _chats(self) -> Self:
        taken = sorted(self.template.keys() & _TEMPLATE_TAKEN)
        if taken:
            raise ValueError(
                f"template.{taken[0]}: is set by the sweep; give other variables of the template"
            )
        if self.template and not self.chat_template:
            raise ValueError("template: has no effect without chat_template: true")
        if self.chat_template and self.dataset.joiner is not None:
            raise ValueError(
                "dataset.joiner: has no effect with chat_template: true, where the template itself stands "
                "between prompt and answer; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _of_the_grid(self) -> Self:
        for i, method in enumerate(self.methods):
            other = [t for t in method.T if t not in self.grid.T]
            if other:
                raise ValueError(
                    f"methods.{i}.T: {other[0]} is not in grid.T; choose from "
                    f"{', '.join(map(str, self.grid.T))}"
                )
        return self

    def batch_size(self, variant: int) -> tuple[int, str]:
        """Requests of one call that are asked of a variant (by its number), and the field that says
        so."""
        own = self.methods[variant].batch_size
        if own is not None and own != self.grid.batch_size:
            return own, f"methods.{variant}.batch_size"
        return self.grid.batch_size, "grid.batch_size"

    def sizes(self, variant: int) -> tuple[int, ...]:
        """The values of T that a variant (by its number) is run at, in the grid's order."""
        wanted = self.methods[variant].T
        return tuple(t for t in self.grid.T if not wanted or t in wanted)

    @property
    def on_gpu(self) -> bool:
        """True if actors edit on a GPU according to the spec. With `device: auto` this depends on
        whether an actor reserves a GPU."""
        return self.model.device == "cuda" or (self.model.device == "auto" and self.engine.resources.gpu > 0)

    @model_validator(mode="after")
    def _declares_memory(self) -> Self:
        if self.engine.lanes == "auto" and self.on_gpu and self.engine.gpu_memory_gb is None:
            raise ValueError(
                "engine.gpu_memory_gb: required with engine.lanes: auto on a GPU, because the number of "
                "lanes is computed from the declared "
                "and not from the free memory; give one GPU's memory in GiB, for example 80, or a "
                "number of lanes"
            )
        return self

    @model_validator(mode="after")
    def _labels(self) -> Self:
        labels = [m.label for m in self.methods]
        twice = sorted({name for name in labels if labels.count(name) > 1})
        if twice:
            raise ValueError(
                f"methods: the label {twice[0]!r} is used {labels.count(twice[0])} times; "
                "give each variant its own `label:`"
            )
        return self


def load_spec(path: Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """Read, override and validate one spec file."""
    path = Path(path)
    text = read_text(path, str(path), "spec file")
    return parse_spec(text, source=str(path), base=path.resolve().parent, overrides=overrides)


def parse_spec(text: str, source: str, base: Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """Read the spec in ``text``. ``source``: its name in errors. ``base``: the folder at which
    relative paths start."""
    raw = parse_yaml(text, source)
    if not isinstance(raw, dict):
        raise SpecError(
            f"{source}: expected a mapping with the keys {_keys(SweepSpec)}, found {kind_of(raw)}"
        )
    if raw and not raw.keys() & SweepSpec.model_fields.keys():
        raise SpecError(f"{source}: is no sweep: it has none of the keys {_keys(SweepSpec)}")
    for override in overrides:
        _override(raw, override)
    origin = source if not overrides else f"{source} (with --set)"
    raw, found_model = _with_model(_with_paths(raw, base), base)
    try:
        spec = SweepSpec.model_validate(raw)
    except ValidationError as e:
        raise SpecError(f"{origin}: {explain(e, SweepSpec)}") from None
    spec._found_model = found_model
    spec._origin = _Origin(base)
    return spec


def override_spec(spec: SweepSpec, overrides: Sequence[str]) -> SweepSpec:
    """A copy of a spec with some of its fields overridden."""
    if not overrides:
        return spec
    text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)
    return parse_spec(text, source=f"the sweep {spec.name!r}", base=spec.base, overrides=overrides)


def check_trust(spec: SweepSpec, source: str, trusted: bool, how: str) -> None:
    """Refuse a model whose files run code, unless the caller allows it besides the spec. ``how``:
    how to allow it, for the message."""
    if spec.model.trust_remote_code and not trusted:
        raise SpecError(
            f"{source}: model.trust_remote_code: true lets the model's files run code on this machine; "
            f"if you trust them, say so {how}"
        )


def default_results(spec: SweepSpec) -> str:
    """The results folder of a sweep if the user gives none."""
    return str(Path("results") / spec.name)


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Prefix the spec's file name to the messages of planning errors, as in those of the parser."""
    try:
        yield
    except (SpecError, DataError, ModelError) as error:
        raise type(error)(f"{source}: {error}") from None


def _override(raw: dict[str, Any], text: str) -> None:
    """Apply one ``dotted.path=value`` in place. The value is YAML."""
    path, sign, value = text.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise SpecError(f"--set {text!r}: expected key=value, for example grid.T=[1,10]")
    parsed = parse_yaml(value, f"--set {path}")
    here: Any = raw
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(here, list):
            if not key.isdigit() or int(key) >= len(here):
                raise SpecError(
                    f"--set {text!r}: {'.'.join(keys[:i])} has entries 0 to {len(here) - 1}, not {key!r}"
                )
            if isinstance(here[int(key)], str) and not last:
                here[int(key)] = {"method": here[int(key)]}
            if last:
                here[int(key)] = parsed
            else:
                here = here[int(key)]
        elif isinstance(here, dict):
            if last:
                here[key] = parsed
            else:
                if here.get(key) is None:
                    here[key] = {}
                here = here[key]
        else:
            raise SpecError(f"--set {text!r}: {'.'.join(keys[:i])} is {short(here)} and has no fields")


def _with_paths(raw: dict[str, Any], base: Path) -> dict[str, Any]:
    """A copy in which relative paths are made absolute, because actors run in other directories."""
    raw = dict(raw)

    def absolute(value: object) -> object:
        if not isinstance(value, str) or not value:
            return value
        return os.path.abspath(base / os.path.expanduser(value))  # neither raises for any text

    dataset = raw.get("dataset")
    if isinstance(dataset, dict):
        raw["dataset"] = {k: absolute(v) if k in ("path", "train_path") else v for k, v in dataset.items()}
    scoring = raw.get("scoring")
    if isinstance(scoring, dict):
        raw["scoring"] = {k: absolute(v) if k in SCORES.path_keys else v for k, v in scoring.items()}
    training = raw.get("training")
    if isinstance(training, dict):
        raw["training"] = {k: absolute(v) if k == "path" else v for k, v in training.items()}
    model = raw.get("model")
    if isinstance(model, str):
        raw["model"] = model = {"name": model}
    if isinstance(model, dict) and isinstance(model.get("name"), str) and not is_bare(model["name"]):
        raw["model"] = {**model, "name": absolute(model["name"])}
    methods = raw.get("methods")
    if isinstance(methods, (str, dict)):
        methods = [methods]
    if isinstance(methods, list):
        raw["methods"] = [
            {**m, "hparams_file": absolute(m["hparams_file"])}
            if isinstance(m, dict) and m.get("hparams_file")
            else m
            for m in methods
        ]
    return raw


def _with_model(raw: dict[str, Any], base: Path) -> tuple[dict[str, Any], Found | None]:
    """A copy whose model's bare name stands for the place where it was found."""
    model = raw.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if not isinstance(name, str) or not name or name == EMBEDDED or not is_bare(name):
        return raw, None
    place = find_model(name, base)
    return {**raw, "model": {**raw["model"], "name": place.name}}, place


# --- messages -------------------------------------------------------------------------------


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _known_kind(value: str) -> str:
    if value not in DATASETS:
        raise ValueError(f"{short(value)} is not valid; choose {', '.join(DATASETS)}")
    return value


def _as_list(value: object) -> object:
    """A list as it is, and a number as a list of one."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (value,)
    raise ValueError(f"expected a number or a list of numbers, found {found(value)}")


def _plain_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{short(value)} is not a plain name: start with a letter or digit, then letters, digits and . "
            f"_ + - "
            "(at most 100)"
        )
    return value


def _not_a_divisor(t: int, n: int) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    if t > n:
        return (
            f"grid.T: {t} is larger than dataset.edits={n}; the largest valid value is {n} (or set "
            f"dataset.edits to {t})"
        )
    up = ((n + t - 1) // t) * t
    down = n // t * t
    return (
        f"grid.T: {t} does not divide dataset.edits={n}; the nearest valid values of T are "
        f"{_nearest(t, divisors)} "
        f"(or set dataset.edits to {down} or {up})"
    )


def _nearest(value: int, valid: Sequence[int]) -> str:
    below = [v for v in valid if v < value]
    above = [v for v in valid if v > value]
    return " and ".join(str(v) for v in (*below[-1:], *above[:1]))
