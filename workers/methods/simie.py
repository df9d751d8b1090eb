"""SimIE: another method's edits are combined into one change that gives, for each edit's keys, the
same outputs as that edit alone.

Guo et al., Towards Lifelong Model Editing via Simulating Ideal Editor, ICML 2025, arXiv 2503.15045.
A standard method edits each request of a sequence from the pristine weights ``W_0``: changes ``D_1
.. D_T`` at its linear maps. With ``K_t`` the inputs of such a map at all tokens of prompt and
target (one row per token), the ideal change has the same outputs for ``K_t`` as ``D_t``, for all
edits at once. SimIE takes the ridge solution,

``min_D  lamHyper ||D||^2 + sum_t ||K_t (D - D_t)^T||^2``,  that is  ``D = (sum_t D_t K_t^T K_t)
P_T^-1``

with ``P_t = lamHyper I + K_1^T K_1 + .. + K_t^T K_t``, computed edit by edit:

``W_t = W_{t-1} + (W_0 + D_t - W_{t-1}) K_t^T K_t P_t^-1``.

The change is of rank ``N_t`` (the request's tokens). While there are fewer keys than half the
inputs, ``K_t P_t^-1`` is solved with one unknown per key: with ``A`` all keys so far, it is the
last ``N_t`` rows of ``(lamHyper I + A A^T)^-1 A``. After that the overlay keeps ``A^T A`` instead.

The base method (``base_method``, its own hyperparameters in ``base``) edits a new overlay for each
request, so its state between edits (AlphaEdit's earlier keys) starts empty. With ``init_model:
false`` it edits the sequence's current weights instead; ``K_t`` is then read from them, too, and
``W_0 + D_t`` above is its result from ``W_{t-1}``.

Differences from the public code (EasyEdit), all deliberate:

1. No state survives a group. In EasyEdit, ``P`` and the weights stay with the hyperparameters
   through every rollback (golden README, fault 5), and the first call edits one extra request to
   find the names of the edited weights.
2. Solved in float64 and rounded once (public: float32). ``P`` is positive definite, so the public
   choice of a solver changes numbers only by rounding; ``solver`` and ``fast`` are dropped.
3. The weight orientation follows from the map itself (public: from the model's name; other names
   raise).
4. The tokens are those of the joint text, with true position ids. Same keys up to rounding.
5. One request per edit, as in the public code, also for base methods that edit several.

``lamHyper`` is 10, as in the example of the authors' repository (EasyEdit's files: 10000). Their
script edits the current weights by default, EasyEdit's files the pristine ones. The paper's text
was not available: the recursion follows the two published codes, its ridge form was derived from
it, and equations are not numbered here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from torch import Tensor, nn

from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.data.needs import Need
from workers.data.scripts import joiner_of
from workers.inputs import explain
from workers.methods.base import ArtifactContext, EditOutcome, LaneEdit, Method, MethodConfig
from workers.methods.easyedit import IGNORED, FileRemarks, read_hparams
from workers.model.base import BaseModel, Site
from workers.model.batch import collate
from workers.model.config import ModelShape
from workers.model.overlay import DenseOverlay, LaneState, LowRankOverlay
from workers.model.replay import override_forward
from workers.types import JSON, SpecError

BASES = ("rome", "rrome", "memit", "emmet", "pmet", "alphaedit", "ft", "ft-ewc")
"""Methods whose edit changes a linear map's weight, computed from one request without pretrained
networks."""

REMEMBERING = ("alphaedit",)
"""Base methods with state beyond the weight change: they can only start from the pristine
weights."""

TOKENS_PER_EDIT = 32
"""Assumed tokens of a request in memory estimates."""


class SimIEConfig(MethodConfig):
    """Hyperparameters of SimIE, under their usual names."""

    base_method: str = Field(description=f"method whose edits are blended: {', '.join(BASES)}")
    base: dict[str, Any] = Field(
        default_factory=dict, validate_default=True, description="hyperparameters of the base method"
    )
    lamHyper: float = Field(10.0, gt=0, allow_inf_nan=False, description="weight of the change's own norm")
    init_model: bool = Field(
        True, description="edit the pristine weights; false: the sequence's present ones"
    )

    alg_names: ClassVar[tuple[str, ...]] = ("SimIE",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType({"solver": IGNORED, "fast": IGNORED})

    @field_validator("base_method")
    @classmethod
    def _wraps(cls, name: str) -> str:
        if name not in BASES:
            raise ValueError(f"{name!r} cannot be wrapped; choices: {', '.join(BASES)}")
        return name

    @field_validator("base")
    @classmethod
    def _complete(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Complete the base method's hyperparameters with its defaults: all are part of a cell's
        identity."""
        if "base_method" not in info.data:  # already reported as an error
            return values
        config = _method(info.data["base_method"]).Config
        try:
            return config.model_validate(values).model_dump(mode="json")
        except ValidationError as error:
            raise ValueError(f"{info.data['base_method']}: {explain(error, config)}") from None

    @field_validator("init_model")
    @classmethod
    def _starts(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("base_method") in REMEMBERING:
            raise ValueError(
                f"false, but {info.data['base_method']} keeps more than its change between edits, which is "
                f"not carried along; "
                "set it to true"
            )
        return value

    @property
    def base_config(self) -> MethodConfig:
        """The base method's config."""
        return _method(self.base_method).Config.model_validate(self.base)

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        """Translate the file; the base method's hyperparameters come from the file of the same name
        in its folder, if it exists."""
        out = super().from_easyedit(values, source)
        if "base_method" in out:
            public = str(out["base_method"])
            name = _named(public, source)
            out["base_method"] = name
            path = _base_file(public, source)
            if path is not None:
                out["base"] = _method(name).Config.from_easyedit(read_hparams(path), str(path))
        return out

    @classmethod
    def merged_with_file(cls, values: Mapping[str, JSON], hparams: Mapping[str, JSON]) -> dict[str, JSON]:
        """The same for the base method, whose file gives what ``base`` leaves open."""
        out = super().merged_with_file(values, hparams)
        name, below, above = values.get("base_method"), values.get("base"), hparams.get("base")
        same = name in BASES and out.get("base_method") == name
        if same and isinstance(below, Mapping) and isinstance(above, Mapping):
            out["base"] = _method(str(name)).Config.merged(below, above)
        elif not same and above is None:
            out.pop("base", None)  # the file's is of another base method
        return out

    @classmethod
    def check_complete(cls, values: Mapping[str, JSON], source: str) -> None:
        super().check_complete(values, source)
        name, base = values.get("base_method"), values.get("base")
        if name in BASES and isinstance(base, Mapping):
            _method(str(name)).Config.check_complete(base, f"{source} (base: {name})")

    @classmethod
    def easyedit_remarks(cls, values: Mapping[str, JSON], source: str) -> FileRemarks:
        """Those of the file, and of the base method's."""
        found = super().easyedit_remarks(values, source)
        public = str(values.get("base_method"))
        path = _base_file(public, source)
        if path is None:
            return found
        base = _method(_named(public, source)).Config
        return base.easyedit_remarks(read_hparams(path), str(path)).within(public) | found

    @classmethod
    def like_easyedit(cls, values: Mapping[str, JSON]) -> dict[str, JSON]:
        """Complete the values, those of the base method included."""
        out = super().like_easyedit(values)
        name, base = out.get("base_method"), out.get("base", {})
        if name in BASES and isinstance(base, Mapping):  # otherwise validation raises
            out["base"] = _method(name).Config.like_easyedit(base)
        return out

    def check(self, shape: ModelShape) -> None:
        with _of_base():
            self.base_config.check(shape)

    def check_edits(self, shape: ModelShape, edits: int) -> None:
        with _of_base():
            self.base_config.check_edits(shape, 1 if self.init_model else edits)

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        with _of_base():
            return self.base_config.artifacts(context)

    @property
    def uses_seed(self) -> bool:
        return self.base_config.uses_seed

    @property
    def needs(self) -> tuple[Need, ...]:
        return self.base_config.needs

    @property
    def first_layer(self) -> int:
        return self.base_config.first_layer

    @property
    def rows_per_edit(self) -> int:
        return self.base_config.rows_per_edit

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        base: Any = self.base_config  # all of BASES have a module, and a layer or several
        out, in_features = shape.site(base.module)
        maps = len(base.layers) if "layers" in type(base).model_fields else 1
        value = max(4, shape.bytes_per_value)
        tokens = min(TOKENS_PER_EDIT * edits, in_features)
        kept = in_features * tokens * value if tokens <= in_features // 2 else in_features * in_features * 8
        solving = 8 * (2 * tokens * tokens + tokens * in_features + 2 * out * in_features)
        # the base method's change may start dense
        inner: int = base.overlay_bytes(shape, 1 if self.init_model else max(edits, in_features))
        return maps * (out * in_features * value + kept) + solving + inner

    def shared_bytes(self, shape: ModelShape) -> int:
        return self.base_config.shared_bytes(shape)


class SimIEOverlay(DenseOverlay):
    """Edited weights and, per map, the keys of all edits: a list, or the sum of their outer
    products.

    The sum is kept in float64: keys at a model's first token may have a norm of 1000 or more, and
    the rounding error of their squares in float32 is larger than ``lamHyper``.
    """

    def __init__(self, sites: Sequence[Site], lanes: int, dtype: torch.dtype) -> None:
        super().__init__(sites, lanes, dtype)
        self._keys = [{site.name: _no_keys(site, dtype) for site in self.sites} for _ in range(lanes)]
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(lanes)]

    @torch.no_grad()
    def blend(
        self, lane: int, site: Site, edited_OI: Tensor, keys_NI: Tensor, weight: float
    ) -> tuple[float, float]:
        """Apply one step of the recursion to one lane's map, with ``W_0 + D_t`` = ``edited_OI``,
        ``K_t`` = ``keys_NI`` and ``lamHyper`` = ``weight``. Return the squared norms of the step
        and of ``edited_OI`` minus the current weight."""
        now_OI = self.weights_LOI[site.name][lane]
        way_OI = edited_OI.to(torch.float64) - now_OI
        right_NI = self._remember(lane, site, keys_NI, weight)
        step_OI = (way_OI @ keys_NI.to(torch.float64).T) @ right_NI
        self.weights_LOI[site.name][lane] = (now_OI + step_OI).to(now_OI)
        self.touch([lane])
        return float(step_OI.square().sum()), float(way_OI.square().sum())

    def _remember(self, lane: int, site: Site, keys_NI: Tensor, weight: float) -> Tensor:
        """Add an edit's keys to those of the lane; return ``K P^-1``, (N, I), float64."""
        sums, kept = self._sums[lane], self._keys[lane]
        if site.name in sums:
            keys_NI = keys_NI.to(torch.float64)
            sums[site.name] += keys_NI.T @ keys_NI
            return _solve(sums[site.name], weight, keys_NI.T).T
        kept[site.name] = all_MI = torch.cat([kept[site.name], keys_NI.to(kept[site.name])])
        total, in_features = all_MI.shape
        all_MI = all_MI.to(torch.float64)
        if total > in_features // 2:  # a longer list would soon be larger than the sum
            sums[site.name] = all_MI.T @ all_MI
            kept[site.name] = kept[site.name][:0].clone()
        new_MN = torch.eye(total, dtype=torch.float64, device=all_MI.device)[:, total - len(keys_NI) :]
        return _solve(all_MI @ all_MI.T, weight, new_MN).T @ all_MI

    def tensors(self, lane: int) -> dict[str, Tensor]:
        found = super().tensors(lane)
        found.update({f"{n}/keys": t for n, t in self._keys[lane].items() if len(t)})
        found.update({f"{n}/sum": t for n, t in self._sums[lane].items()})
        return found

    def load_state(self, lane: int, state: LaneState) -> None:
        super().load_state(lane, state)
        self._sums[lane] = {}
        for site in self.sites:
            none_NI = _no_keys(site, self.weights_LOI[site.name].dtype)
            self._keys[lane][site.name] = state.tensors.get(f"{site.name}/keys", none_NI).to(
                none_NI, copy=True
            )
            sum_II = state.tensors.get(f"{site.name}/sum")
            if sum_II is not None:
                self._sums[lane][site.name] = sum_II.to(none_NI.device, torch.float64, copy=True)


class SimIE(Method[SimIEConfig, SimIEOverlay]):
    """Simulating the ideal editor.

    >>> config = SimIEConfig(base_method="rome", base={"layer": 5})
    >>> editor = SimIE.prepare(base, config, inputs={"moment": moment, "templates": texts})  # those of ROME
    """

    name: ClassVar[str] = "simie"
    title: ClassVar[str] = "SimIE"
    paper: ClassVar[str] = (
        "Guo et al., Towards Lifelong Model Editing via Simulating Ideal Editor, ICML 2025, arXiv 2503.15045"
    )
    version: ClassVar[int] = 1
    relative_cost: ClassVar[float] = 1.5
    Config: ClassVar[type[MethodConfig]] = SimIEConfig

    def __init__(
        self,
        base: BaseModel,
        config: SimIEConfig,
        inputs: Mapping[str, ArtifactData],
        editor: Method[Any, Any],
    ) -> None:
        """``editor``: the prepared base method."""
        super().__init__(base, config, inputs)
        self.editor = editor
        self.sites: tuple[Site, ...] = editor.new_overlay(1).sites

    @classmethod
    def prepare(cls, base: BaseModel, config: SimIEConfig, inputs: Mapping[str, ArtifactData]) -> Self:
        return cls(
            base, config, inputs, _method(config.base_method).prepare(base, config.base_config, inputs)
        )

    def new_overlay(self, lanes: int) -> SimIEOverlay:
        return SimIEOverlay(self.sites, lanes, self.base.master_dtype)

    def edit(self, overlay: SimIEOverlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        if any(len(edit.requests) != 1 for edit in edits):
            raise ValueError("SimIE edits one request at a time")
        keys = self._keys(overlay, edits)
        fresh: DenseOverlay | LowRankOverlay = self.editor.new_overlay(overlay.lanes)
        if not self.config.init_model:
            for site in self.sites:
                for lane in range(overlay.lanes):
                    fresh.set_weight(lane, site, overlay.weight(lane, site))
        outcomes = self.editor.edit(fresh, edits)
        return [
            EditOutcome(
                out.iterations, out.loss, {**out.details, **self._blend(overlay, fresh, lane, keys[lane])}
            )
            for lane, out in enumerate(outcomes)
        ]

    def _blend(
        self, overlay: SimIEOverlay, fresh: DenseOverlay | LowRankOverlay, lane: int, keys: Sequence[Tensor]
    ) -> dict[str, JSON]:
        """Add one lane's edit to its weights; return the figures that are reported."""
        step = way = 0.0
        for site, keys_NI in zip(self.sites, keys, strict=True):
            squares = overlay.blend(lane, site, fresh.weight(lane, site), keys_NI, self.config.lamHyper)
            step, way = step + squares[0], way + squares[1]
        return {"base_delta_norm": fresh.delta_norm(lane), "kept": (step / way) ** 0.5 if way else 0.0}

    @torch.no_grad()
    def _keys(self, overlay: SimIEOverlay, edits: Sequence[LaneEdit]) -> list[list[Tensor]]:
        """Inputs of every site at all tokens of prompt and target, per lane and site (N, I), in the
        masters' precision."""
        base = self.base
        firsts = [edit.requests[0] for edit in edits]
        encoded = [base.encoder.pair(r.prompt, r.target_new, joiner_of(r, r.prompt)) for r in firsts]
        batch = collate(encoded, range(len(edits)), base.encoder.pad_id, base.device)
        with ExitStack() as stack:
            if not self.config.init_model:
                stack.enter_context(overlay.installed(batch))
            caught = stack.enter_context(_inputs(base, self.sites))
            base.hidden_states(batch)
        return [
            [caught[site.name][lane, batch.offsets[lane] :].to(base.master_dtype) for site in self.sites]
            for lane in range(len(edits))
        ]

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return cls.embedded_for({})

    @classmethod
    def embedded_for(cls, hparams: Mapping[str, JSON]) -> dict[str, JSON]:
        name = hparams.get("base_method", "rome")
        base = _method(name).embedded() if name in BASES else {}
        return {"base_method": name, "base": base, "lamHyper": 10.0}


def _method(name: str) -> type[Method[Any, Any]]:
    """The base method's class, from the registry: methods do not import each other."""
    from workers.methods import get_method

    return get_method(name)


def _base_file(public: str, source: str) -> Path | None:
    """The base method's file of the same name as ``source``, where there is one."""
    path = Path(source).parent.parent / public / Path(source).name
    return path if path.is_file() else None


def _named(public: str, source: str) -> str:
    """The base method that EasyEdit calls ``public``."""
    names = {alg: name for name in BASES for alg in _method(name).Config.alg_names}
    if public not in names:
        raise SpecError(f"{source}: base_method: {public!r} cannot be wrapped; choices: {', '.join(names)}")
    return names[public]


def _no_keys(site: Site, dtype: torch.dtype) -> Tensor:
    return torch.zeros(0, site.shape[1], dtype=dtype, device=site.weight_OI.device)


def _solve(gram_MM: Tensor, weight: float, right_MN: Tensor) -> Tensor:
    """``(weight I + gram)^-1 right`` in float64; NaN if the matrix is not positive definite after
    rounding."""
    shifted_MM = gram_MM.to(torch.float64, copy=True)
    shifted_MM.diagonal().add_(weight)
    factor_MM, info = torch.linalg.cholesky_ex(shifted_MM)
    solved_MN = torch.cholesky_solve(right_MN, factor_MM)
    return torch.where(info == 0, solved_MN, torch.nan)


@contextmanager
def _inputs(base: BaseModel, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward records the inputs of each site, by its name. Layers above the last site
    are not run."""
    caught: dict[str, Tensor] = {}
    top: list[Any] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught[name] = args[0]

        return hook

    last = max(site.layer for site in sites)
    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_pre_hook(note(site.name)).remove)
        stack.callback(base.layers[last].register_forward_hook(lambda _, args, out: top.append(out)).remove)
        for layer in base.layers[last + 1 :]:
            stack.enter_context(override_forward(layer, lambda *_, **__: top[0]))
        yield caught


@contextmanager
def _of_base() -> Iterator[None]:
    """Prefix errors of the base method's hyperparameters with ``base.``."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"base.{error}") from None
