"""A sweep spec: YAML -> frozen, validated models. The only module that reads a user's YAML.

    spec = load_spec(Path("sweeps/demo.yaml"), overrides=("grid.T=[1,10]",))
    spec.grid.T          # (1, 10)
    spec.methods[0]      # MethodSpec(method="ft", label="ft", ...)

Every fault is a :class:`~workers.types.SpecError` that names the file, the field, the value and the
valid choices. What needs a model or a data set (T against the number of edits is here, N against
the data set's size is not) is checked by :mod:`orchestrator.planning.plan`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from workers.data import DATASETS, TargetField
from workers.inputs import MAX_BYTES, explain, parse_yaml, short
from workers.job import Rollback, ScoreConfig
from workers.model.config import ModelConfig
from workers.scoring.registry import SCORES
from workers.types import DataError, Frozen, ModelError, ProtocolName, SpecError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_TEMPLATE_TAKEN = frozenset(
    {"messages", "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "tools"}
    | {"documents", "chat_template", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs"}
)


class DatasetSpec(Frozen):
    """The requests that are edited. Relative paths are relative to the spec file."""

    kind: str = Field(description=f"one of {', '.join(DATASETS)}")
    edits: int = Field(ge=1, description="N: how many edits each cell makes in total")
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
        if value not in DATASETS:
            raise ValueError(f"{short(value)} is not valid; choose {', '.join(DATASETS)}")
        return value


class TrainingSpec(Frozen):
    """Training data of methods that are trained before they edit (MEND, SERAC, MALMEN); never
    requests that the sweep edits."""

    kind: str | None = Field(
        None,
        description="as dataset.kind; null: the embedded world's own, or the train_path of a zsre dataset",
    )
    path: Path | None = None
    shards: tuple[int, ...] = Field(
        (),
        description="requests of each data shard, in file order; one more continues from what the others "
        "taught; "
        "empty: one shard with everything",
    )
    on_bad_record: Literal["error", "skip"] = "error"
    target_field: TargetField | None = Field(None, description="as dataset.target_field")
    allow_overlap: bool = Field(
        False, description="true: train also on requests that the sweep edits; recorded in every row"
    )

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


class GridSpec(Frozen):
    """The axes every method is run over."""

    T: tuple[int, ...] = Field(min_length=1, description="edits between two rollbacks; each divides N")
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    rollback: Rollback = "group"
    batch_size: int = Field(
        1, ge=1, description="requests edited in one call, for methods that can; divides every T"
    )

    @field_validator("T", "seeds", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, int) and not isinstance(value, bool) else value

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


class MethodSpec(Frozen):
    """One variant of a method. A bare name in the YAML is ``{method: name}``."""

    method: str
    label: str = ""
    hparams: dict[str, Any] = Field(default_factory=dict)
    hparams_file: Path | None = None
    protocol: ProtocolName | None = Field(None, description="null: what the sweep says")
    T: tuple[int, ...] = Field(
        (), description="which of the grid's T this variant is run at; empty: all of them"
    )

    @field_validator("T", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, int) and not isinstance(value, bool) else value

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


class Resources(Frozen):
    """Resources that one actor reserves. Fractions of a GPU are allowed."""

    cpu: float = Field(1, gt=0)
    gpu: float = Field(0, ge=0)
    memory_gb: float = Field(0, ge=0, description="memory an actor needs (0: twice the model's weights)")


class EngineSpec(Frozen):
    """Settings of cutting and running the work. They change speed, never the set of cells."""

    lanes: int | Literal["auto"] = Field(10, description="groups edited in lockstep; auto: what memory holds")
    lanes_across_seeds: bool = Field(
        False, description="true: the seeds of a cell share waves; false: a wave holds groups of one cell"
    )
    share_prefixes: bool = Field(
        True,
        description="true: with rollback: group, a lane also reports to the groups of smaller T that start "
        "where its own does; "
        "false: every T makes all of its edits",
    )
    gpu_memory_gb: float | None = Field(None, gt=0, description="memory of one GPU in GiB, as declared")
    threads: int = Field(1, ge=1, description="torch threads of one actor")
    cache_bytes: int = Field(
        256 << 20,
        ge=0,
        description="activations of scoring batches an actor may keep for when they come again",
    )
    shard_edits: int = Field(250, ge=1, description="edits of one shard, about; a wave is never cut")
    step_edits: int = Field(50, ge=1, description="edits between two commits, about")
    max_actors: int | None = Field(None, ge=1)
    resources: Resources = Resources()
    max_failures: int = Field(2, ge=0, description="launches again after a failure (a lost node counts)")
    checkpoint_seconds: float = Field(
        30, ge=0, description="time between two savings of an artifact that is being built, about"
    )

    @field_validator("lanes", mode="before")
    @classmethod
    def _count_or_auto(cls, value: object) -> object:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"{short(value)} is not valid; give a whole number of at least 1, or auto")


class RaySpec(Frozen):
    """The Ray cluster. Without an address a local one is started and shut down at the end."""

    address: str | None = None
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    connect_seconds: float = Field(15, gt=0)


def _read_scoring(value: object, handler: ValidatorFunctionWrapHandler) -> ScoreConfig:
    """The settings under ``scoring``, those of single scores included."""
    if isinstance(value, ScoreConfig):
        value = value.model_dump()
    if not isinstance(value, dict):
        found: ScoreConfig = handler(value)  # says what is wrong with it
        return found
    return SCORES.read(value)


class SweepSpec(Frozen):
    """A whole sweep, as written by the user and completed with defaults."""

    name: str
    model: ModelConfig
    dataset: DatasetSpec
    grid: GridSpec
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    protocol: ProtocolName = Field(
        "paper",
        description="what methods follow where paper and public code differ and the spec says nothing",
    )
    training: TrainingSpec = TrainingSpec()
    scoring: Annotated[ScoreConfig, WrapValidator(_read_scoring)] = Field(
        default_factory=lambda: SCORES.read({})
    )
    chat_template: bool = False
    template: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict, description="variables of the chat template, such as enable_thinking: false"
    )
    engine: EngineSpec = EngineSpec()
    ray: RaySpec = RaySpec()

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        return _plain_name(value)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        n, size = self.dataset.edits, self.grid.batch_size
        for t in self.grid.T:
            if n % t:
                raise ValueError(_not_a_divisor(t, n))
            if t % size:
                near = _nearest(size, [b for b in range(1, t + 1) if t % b == 0])
                raise ValueError(
                    f"grid.batch_size: {size} does not divide T={t}; the nearest valid values are {near}"
                )
        for mark in self.scoring.score_at:
            if mark % size:
                near = " and ".join(str(m) for m in (mark - mark % size, mark - mark % size + size) if m)
                raise ValueError(
                    f"scoring.score_at: {mark} lies within a batch of grid.batch_size={size} edits; the "
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

    def sizes(self, variant: int) -> tuple[int, ...]:
        """The values of T that a variant (by its number) is run at, in the grid's order."""
        wanted = self.methods[variant].T
        return tuple(t for t in self.grid.T if not wanted or t in wanted)

    @property
    def on_gpu(self) -> bool:
        """True if actors edit on a GPU, as far as the spec says: `device: auto` follows what an
        actor reserves."""
        return self.model.device == "cuda" or (self.model.device == "auto" and self.engine.resources.gpu > 0)

    @model_validator(mode="after")
    def _declares_memory(self) -> Self:
        if self.engine.lanes == "auto" and self.on_gpu and self.engine.gpu_memory_gb is None:
            raise ValueError(
                "engine.gpu_memory_gb: required with engine.lanes: auto on a GPU, because lanes follow the "
                "declared memory "
                "and not what happens to be free; give one GPU's memory in GiB, for example 80, or a "
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
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SpecError(f"{path}: {size} bytes; a spec has at most {MAX_BYTES}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such spec file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"{path}: cannot be read: {e}") from None
    return parse_spec(text, source=str(path), base=path.resolve().parent, overrides=overrides)


def parse_spec(text: str, source: str, base: Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """The spec in ``text``; ``source`` names it in errors, relative paths start at ``base``."""
    raw = parse_yaml(text, source)
    if not isinstance(raw, dict):
        raise SpecError(f"{source}: expected a mapping with the keys {_keys(SweepSpec)}, found {short(raw)}")
    for override in overrides:
        _override(raw, override)
    origin = source if not overrides else f"{source} (with --set)"
    try:
        spec = SweepSpec.model_validate(_with_paths(raw, base))
    except ValidationError as e:
        raise SpecError(f"{origin}: {explain(e, SweepSpec)}") from None
    return spec


def override_spec(spec: SweepSpec, overrides: Sequence[str]) -> SweepSpec:
    """A spec that was read before, with some of its fields overridden."""
    if not overrides:
        return spec
    text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)
    return parse_spec(text, source=f"the sweep {spec.name!r}", base=Path.cwd(), overrides=overrides)


def check_trust(spec: SweepSpec, source: str, trusted: bool, how: str) -> None:
    """Refuse a model whose files run code, unless the caller has said so too. ``how``: the way to
    say it."""
    if spec.model.trust_remote_code and not trusted:
        raise SpecError(
            f"{source}: model.trust_remote_code: true lets the model's files run code on this machine; "
            f"if you trust them, say so {how}"
        )


def default_results(spec: SweepSpec) -> str:
    """The results folder of a sweep for which none was named."""
    return str(Path("results") / spec.name)


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Errors that the planner finds in a spec, or in what it names, begin with the spec's file, as
    the parser's do."""
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
    """A copy whose relative paths are absolute (actors work in other directories)."""
    raw = dict(raw)

    def absolute(value: object) -> object:
        if not isinstance(value, str) or not value:
            return value
        return os.path.abspath(base / os.path.expanduser(value))  # neither raises, whatever the text is

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
    if (
        isinstance(model, dict)
        and isinstance(model.get("name"), str)
        and model["name"].startswith((".", "~", "/"))
    ):
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


# --- messages -------------------------------------------------------------------------------


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


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
