"""MELO: separate blocks of low-rank adapters, selected per prompt by a database of activations.

Yu et al., MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA, arXiv 2312.11795. The
*query* of a row is the output of one linear map at the row's last prompt token. Maps of some later
layers have LoRA blocks: each call of :meth:`MELO.edit` (one request, or a batch) trains one new
block of rank ``rank`` at every map and no other block, so that later edits never change earlier
ones. A database holds, per lane, clusters of queries: a centre ``c``, a radius ``r``, a label, and
the cluster's points, each with the block that was trained for it.

A row whose query lies within the radius of the nearest centre gets the block of the cluster's
nearest point, ``W' x = W x + scale B_b A_b x`` at every token of the row; any other row is
unchanged. An edit with query ``q`` and nearest centre at distance ``d``

- **adds** a cluster of radius ``radius`` around ``q`` if there is none or ``d > r + radius``;
- else, with the same label, **updates** the cluster: ``q`` becomes one of its points, ``c`` the
  mean of its points, and ``r`` the largest distance of a point, at least ``radius``;
- else **splits**: a new cluster around ``q``, and both have radius ``d / 2``; points of the old one
  outside its new radius are removed (if none is left, its centre becomes a point without a block).

The new block is trained by Adam on the mean over the target's tokens of ``-log P(target_j | prompt,
target_<j)``; its step size is halved every ``halve_every`` steps.

The paper's text was not available: the above follows the authors' code, in EasyEdit's copy.
Differences from that code, all deliberate:

1. The query is taken at the last *real prompt* token, in editing and in scoring, and the choice of
   block is the same for the whole row and its generation. The public code takes the last column of
   prompt and target: teacher forcing then leaks the target into it.
2. Labels are compared token by token, not by the sum of their ids.
3. Requests of a batch use the clusters made by earlier requests of the batch; the public code looks
   all of them up beforehand.
4. Two edits of one prompt with different targets: splitting at ``d = 0`` would leave two clusters
   that no query matches. The later edit replaces the cluster (rule "replace"), as in our GRACE.
   Both radii after a split are ``d / 2``; the public ones differ by 2e-5.
5. ``A`` is uniform within ``1 / sqrt(in)`` as in LoRA; the public code draws it as part of a
   transposed matrix of all blocks, and so within ``1 / sqrt(all ranks)``.
6. The public code has ``num_block`` blocks and fails after them; here the number is not limited. It
   scales a block's change by ``num_block`` (its square root on each factor), so that unused blocks
   change the numbers: a loaded file sets ``scale`` to this value; the default is 1.
7. ``num_edit_per_block`` has no effect in the public code: each call makes one block, as here. The
   selected blocks are module-level state there and local to one forward here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from workers.data.scripts import joiner_of
from workers.inner_loop.descend import WholeBatch, descend
from workers.inner_loop.finetune import collate_requests, with_target
from workers.inner_loop.optim import Adam
from workers.methods.base import MOST_STEPS, EditOutcome, LaneEdit, Layers, Method, MethodConfig
from workers.methods.easyedit import COMMON_LOST, SWEEP_KEYS, FileRemarks, split_module
from workers.methods.families.adapter import uniform_A
from workers.model.base import Site
from workers.model.batch import Batch
from workers.model.config import ModelShape
from workers.model.overlay import LaneState, Overlay, lane_linear
from workers.model.replay import capture, override_forward, replay
from workers.types import JSON, SpecError

_TOP_LEVEL = frozenset(
    {
        "model_name",
        "device",
        "max_length",
        "task",
        "lora_task_type",
        "check_dir",
    }
)
"""Keys of a public file outside its sections that no number depends on."""

_IN_SECTIONS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "grace": frozenset(
            {
                *("name", "val_init", "val_train", "val_reg", "reg", "replacement", "num_pert"),
                *("num_edit_per_block", "metric_period"),
            }
        ),
        "model": frozenset(
            {"name", "class_name", "tokenizer_class", "tokenizer_name", "fan_in_fan_out", "pt"}
        ),
        "lora": frozenset(
            {
                *("cls_name", "cls_class", "supervised", "cos", "freeze", "square", "bound_embeds"),
                *("use_all_negatives", "freeze_lora", "dist_heads", "cross_attend", "soft_weighting"),
                *("checkpoint_grad", "lora_r", "lora_alpha"),
            }
        ),
    }
)
"""Keys of its sections that belong to an optional classifier, or are read by nobody."""

_USED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "grace": frozenset({"num_iter", "edit_lr", "init_radius", "num_rank_per_block", "num_block"}),
        "model": frozenset({"target_modules", "grace_layer"}),
        "lora": frozenset(),
    }
)

NO_BLOCK = -1

SAME_QUERY = 1e-3
"""Two queries nearer than this share of the initial radius count as equal up to rounding."""


class MELOConfig(MethodConfig):
    """Hyperparameters of MELO."""

    layers: Layers = Field(min_length=1, description="decoder layers that get blocks; all after key_layer")
    module: str | None = Field(
        None, description="linear map that gets blocks; null: the MLP's output projection"
    )
    key_layer: int = Field(ge=0, description="decoder layer whose map's answer is the query")
    key_module: str | None = Field(None, description="that map; null: the MLP's output projection")
    rank: int = Field(2, ge=1, le=65_536, description="rank of one block")
    scale: float = Field(
        1.0, gt=0, description="factor of a block's change (the public code's is its number of blocks)"
    )
    radius: float = Field(0.5, gt=0, description="radius of a new cluster")
    num_iter: int = Field(50, ge=1, le=MOST_STEPS, description="optimiser steps of one edit")
    lr: float = Field(1e-3, gt=0, description="Adam's step size at the beginning")
    halve_every: int = Field(
        20, ge=1, description="steps after which the step size is halved, again and again"
    )

    alg_names: ClassVar[tuple[str, ...]] = ("MELO",)
    easyedit_off: ClassVar[Mapping[str, tuple[JSON, ...]]] = MappingProxyType(
        {"dist_fn": ("euc",), "expand_mode": ("moving_avg",), "key_id": (-1,), "lora_dropout": (0, 0.0)}
    )

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        """Translate the sections ``grace`` (database, training), ``model`` (maps) and ``lora`` of a
        public file.

        Their other keys belong to an optional classifier, or have no effect.
        """
        cls.check_alg(values, source)
        unknown = sorted(
            set(values) - {"alg_name", "alg", *_IN_SECTIONS, *SWEEP_KEYS, *COMMON_LOST} - _TOP_LEVEL
        )
        if unknown:
            raise SpecError(f"{source}: {unknown[0]}: has no meaning for this method")
        sections: dict[str, dict[str, JSON]] = {}
        for name in ("grace", "model", "lora"):
            section = values.get(name)
            if not isinstance(section, dict):
                raise SpecError(f"{source}: {name}: expected a section of its own, found {section!r}")
            sections[name] = section
            strange = sorted(set(section) - _IN_SECTIONS[name] - _USED[name] - set(cls.easyedit_off))
            if strange:
                raise SpecError(
                    f"{source}: {name}.{strange[0]}: has no meaning for this method (value "
                    f"{section[strange[0]]!r})"
                )
            for key, allowed in cls.easyedit_off.items():
                if sections[name].get(key, allowed[0]) not in allowed:
                    raise SpecError(
                        f"{source}: {name}.{key}: {sections[name][key]!r} is not supported; choices: "
                        f"{allowed[0]!r}"
                    )
        grace, model = sections["grace"], sections["model"]
        try:
            out = {
                "num_iter": grace["num_iter"],
                "lr": grace["edit_lr"],
                "radius": grace["init_radius"],
                "rank": grace["num_rank_per_block"],
                "scale": grace["num_block"],
            }
            names = model["target_modules"]
            if not isinstance(names, list):
                raise SpecError(f"{source}: target_modules: {names!r}: expected a list of module names")
            targets = [split_module(name, source) for name in names]
            out["key_layer"], out["key_module"] = split_module(model["grace_layer"], source)
        except KeyError as missing:
            raise SpecError(f"{source}: {missing.args[0]}: this key is required") from None
        if len({path for _, path in targets}) != 1:
            raise SpecError(
                f"{source}: target_modules: expected one map of several layers, found "
                f"{model['target_modules']!r}"
            )
        return out | {"layers": [layer for layer, _ in targets], "module": targets[0][1]}

    @classmethod
    def easyedit_remarks(cls, values: Mapping[str, JSON], source: str) -> FileRemarks:
        inside = tuple(
            f"{name}.{key}" for name, keys in _IN_SECTIONS.items() for key in values[name] if key in keys
        )
        outside = {key: value for key, value in values.items() if key not in _IN_SECTIONS}
        return super().easyedit_remarks(outside, source) | FileRemarks(neutral=inside)

    @property
    def first_layer(self) -> int:
        return min(self.layers)  # the query of key_layer is read once, before the steps

    def check(self, shape: ModelShape) -> None:
        shape.check_layer(self.key_layer, "key_layer")
        for layer in self.layers:
            shape.check_layer(layer, "layers")
        if min(self.layers) <= self.key_layer:
            raise SpecError(
                f"layers: {min(self.layers)} is not after key_layer={self.key_layer}, where blocks are "
                f"chosen; choices: "
                f"{self.key_layer + 1} to {shape.layers - 1}"
            )
        shape.site(self.module)
        shape.site(self.key_module)

    @property
    def uses_seed(self) -> bool:
        return True

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        block = len(self.layers) * self.rank * sum(shape.site(self.module))
        queries = 2 * shape.site(self.key_module)[0]  # of a point and its centre
        # plus gradient and moments of one block, and a second copy of everything while a block is
        # added
        value: int = max(4, shape.bytes_per_value)
        return int(2 * edits * (block + queries) + 4 * block) * value


@dataclass
class _Cluster:
    """The scope of one or several edits. ``points``: indices of points in the lane's database."""

    radius: float
    label: tuple[int, ...]
    points: list[int]


class _Database:
    """One lane's clusters, and the queries and blocks of their points. ``keys_JO`` and ``blocks``
    only grow."""

    def __init__(self, width: int, like: Tensor) -> None:
        self.clusters: list[_Cluster] = []
        self.centres_CO = like.new_zeros(0, width)
        self.keys_JO = like.new_zeros(0, width)
        self.blocks: list[int] = []
        self.moved: set[int] = set()
        """Clusters whose centre was set anew."""

    def add(self, query_O: Tensor, radius: float, label: tuple[int, ...], block: int) -> None:
        self.clusters.append(_Cluster(radius, label, [self._point(query_O, block)]))
        self.centres_CO = torch.cat([self.centres_CO, query_O[None]])

    def _move(self, index: int, centre_O: Tensor) -> None:
        self.centres_CO[index] = centre_O
        self.moved.add(index)

    def _point(self, query_O: Tensor, block: int) -> int:
        self.keys_JO = torch.cat([self.keys_JO, query_O[None]])
        self.blocks.append(block)
        return len(self.blocks) - 1

    def place(self, query_O: Tensor, label: tuple[int, ...], block: int, radius: float) -> str:
        """Insert one edit; return the rule's name."""
        if not self.clusters:
            self.add(query_O, radius, label, block)
            return "add"
        found, index = _distances(query_O[None], self.centres_CO)[0].min(0)
        distance, near = float(found), self.clusters[int(index)]
        if distance > near.radius + radius:
            self.add(query_O, radius, label, block)
            return "add"
        if near.label == label:
            near.points.append(self._point(query_O, block))
            keys_PO = self.keys_JO[near.points]
            centre_O = keys_PO.mean(0)
            self._move(int(index), centre_O)
            near.radius = max(float(_distances(keys_PO, centre_O[None]).max()), radius)
            return "update"
        if distance <= SAME_QUERY * radius:
            near.label, near.points = label, [self._point(query_O, block)]
            self._move(int(index), query_O)
            near.radius = max(near.radius, radius)
            return "replace"
        near.radius = distance / 2
        from_centre = _distances(self.keys_JO[near.points], self.centres_CO[int(index)][None])[:, 0].tolist()
        kept = [point for point, d in zip(near.points, from_centre, strict=True) if d <= near.radius]
        near.points = kept or [self._point(self.centres_CO[int(index)].clone(), NO_BLOCK)]
        self.add(query_O, distance / 2, label, block)
        return "split"

    def find(self, query_BO: Tensor) -> list[int]:
        """The block of each row, or :data:`NO_BLOCK`."""
        if not self.clusters:
            return [NO_BLOCK] * query_BO.shape[0]
        found_B, near_B = _distances(query_BO, self.centres_CO).min(1)
        blocks = []
        for row, (distance, near) in enumerate(zip(found_B.tolist(), near_B.tolist(), strict=True)):
            cluster = self.clusters[near]
            if distance > cluster.radius:
                blocks.append(NO_BLOCK)
                continue
            point = int(_distances(query_BO[row : row + 1], self.keys_JO[cluster.points])[0].argmin())
            blocks.append(self.blocks[cluster.points[point]])
        return blocks


@dataclass
class _Route:
    """The block of each row of one forward, known once the query is computed."""

    block_B: list[int] | None = None


class BlockOverlay(Overlay):
    """Per lane a database and blocks of adapters at several maps."""

    def __init__(
        self, key: Site, sites: Sequence[Site], lanes: int, config: MELOConfig, dtype: torch.dtype
    ) -> None:
        super().__init__([key, *sites], lanes)
        self.key, self.adapted = key, tuple(sites)
        self.rank, self.scale = config.rank, config.scale
        self._like = torch.zeros((), dtype=dtype, device=key.weight_OI.device)
        self.databases = [_Database(key.shape[0], self._like) for _ in range(lanes)]
        # per map and lane, all blocks stacked: (blocks, R, I) and (blocks, O, R)
        self.down: dict[str, list[Tensor]] = {}
        self.up: dict[str, list[Tensor]] = {}
        for site in sites:
            out, in_features = site.shape
            self.down[site.name] = [self._like.new_zeros(0, self.rank, in_features) for _ in range(lanes)]
            self.up[site.name] = [self._like.new_zeros(0, out, self.rank) for _ in range(lanes)]

    def blocks(self, lane: int) -> int:
        """Number of blocks of a lane."""
        return int(self.down[self.adapted[0].name][lane].shape[0])

    def forward(self, site: Site, x_BSI: Tensor, batch: Batch) -> Tensor:
        raise TypeError("which block answers is known within a forward only; use installed()")

    @contextmanager
    def installed(self, batch: Batch) -> Iterator[None]:
        """Inside, the key map selects each row's block, and the later maps apply it."""
        route = _Route()
        with ExitStack() as stack:
            stack.enter_context(override_forward(self.key.module, partial(self._look_up, batch, route)))
            for site in self.adapted:
                stack.enter_context(override_forward(site.module, partial(self._answer, site, batch, route)))
            yield

    @contextmanager
    def learning(
        self, batch: Batch, down_LRI: Mapping[str, Tensor], up_LOR: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """Inside, every row uses the block that its lane is training."""

        def answer(site: Site, x_BSI: Tensor) -> Tensor:
            inner_BSR = lane_linear(x_BSI, down_LRI[site.name], batch)
            plain_BSO = site.base_output(x_BSI)
            return plain_BSO + lane_linear(inner_BSR, up_LOR[site.name], batch) * self.scale

        with ExitStack() as stack:
            for site in self.adapted:
                stack.enter_context(override_forward(site.module, partial(answer, site)))
            yield

    def _look_up(self, batch: Batch, route: _Route, x_BSI: Tensor) -> Tensor:
        out_BSO = self.key.base_output(x_BSI)
        query_BO = at_prompt_end(out_BSO, batch).to(self._like.dtype)
        route.block_B = [
            block
            for lane, start, stop in batch.segments
            for block in self.databases[lane].find(query_BO[start:stop])
        ]
        return out_BSO

    def _answer(self, site: Site, batch: Batch, route: _Route, x_BSI: Tensor) -> Tensor:
        out_BSO = site.base_output(x_BSI)
        if route.block_B is None:
            raise RuntimeError("a map with blocks was run before the map that chooses them")
        lane_B = [lane for lane, start, stop in batch.segments for _ in range(start, stop)]
        hit = [row for row, block in enumerate(route.block_B) if block != NO_BLOCK]
        if not hit:
            return out_BSO
        down_HRI = torch.stack([self.down[site.name][lane_B[row]][route.block_B[row]] for row in hit])
        up_HOR = torch.stack([self.up[site.name][lane_B[row]][route.block_B[row]] for row in hit])
        x_HSI = x_BSI[hit]
        inner_HSR = torch.bmm(x_HSI, down_HRI.to(x_HSI.dtype).transpose(1, 2))
        change_HSO = torch.bmm(inner_HSR, up_HOR.to(x_HSI.dtype).transpose(1, 2)) * self.scale
        return out_BSO.index_add(0, torch.tensor(hit, device=out_BSO.device), change_HSO)

    def append(self, lane: int, down_LRI: Mapping[str, Tensor], up_LOR: Mapping[str, Tensor]) -> None:
        """Add a lane's trained block."""
        for name, blocks in self.down.items():
            blocks[lane] = torch.cat([blocks[lane], down_LRI[name][lane : lane + 1].detach()])
            self.up[name][lane] = torch.cat([self.up[name][lane], up_LOR[name][lane : lane + 1].detach()])

    def tensors(self, lane: int) -> dict[str, Tensor]:
        database = self.databases[lane]
        if not database.clusters:
            return {}
        tensors = {"keys": database.keys_JO, "centres": database.centres_CO}
        for name in self.down:
            tensors[f"{name}.A"] = self.down[name][lane]
            tensors[f"{name}.B"] = self.up[name][lane]
        return tensors

    def meta(self, lane: int) -> dict[str, JSON]:
        database = self.databases[lane]
        if not database.clusters:
            return {}
        clusters = [[c.radius, list(c.label), list(c.points)] for c in database.clusters]
        return {"clusters": clusters, "blocks": list(database.blocks)}

    def changed(self, lane: int) -> Iterable[Tensor]:
        for name, tensor in self.tensors(lane).items():
            yield self._since(lane, name, tensor)
        database = self.databases[lane]
        yield database.centres_CO[sorted(database.moved)]
        database.moved.clear()

    def load_state(self, lane: int, state: LaneState) -> None:
        self._seen[lane].clear()
        database = self.databases[lane] = _Database(self.key.shape[0], self._like)
        for site in self.adapted:
            out, in_features = site.shape
            down, up = state.tensors.get(f"{site.name}.A"), state.tensors.get(f"{site.name}.B")
            # copies, so that the snapshot does not change
            self.down[site.name][lane] = (
                self._like.new_zeros(0, self.rank, in_features)
                if down is None
                else down.to(self._like).clone()
            )
            self.up[site.name][lane] = (
                self._like.new_zeros(0, out, self.rank) if up is None else up.to(self._like).clone()
            )
        if state.tensors:
            database.keys_JO = state.tensors["keys"].to(self._like).clone()
            database.centres_CO = state.tensors["centres"].to(self._like).clone()
            database.blocks = [int(block) for block in state.meta["blocks"]]
            database.clusters = [
                _Cluster(float(radius), tuple(label), list(points))
                for radius, label, points in state.meta["clusters"]
            ]

    def delta_norm(self, lane: int) -> float | None:
        return None


class MELO(Method[MELOConfig, BlockOverlay]):
    """Neuron-indexed dynamic LoRA.

    >>> editor = MELO.prepare(base, MELOConfig(key_layer=3, layers=(4, 5)), inputs={})
    """

    name: ClassVar[str] = "melo"
    title: ClassVar[str] = "MELO"
    paper: ClassVar[str] = (
        "Yu et al., MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA, AAAI 2024, arXiv "
        "2312.11795"
    )
    version: ClassVar[int] = 1
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 2.0
    Config: ClassVar[type[MethodConfig]] = MELOConfig

    def new_overlay(self, lanes: int) -> BlockOverlay:
        config, base = self.config, self.base
        key = base.site(config.key_layer, config.key_module)
        sites = [base.site(layer, config.module) for layer in sorted(config.layers)]
        return BlockOverlay(key, sites, lanes, config, base.master_dtype)

    def edit(self, overlay: BlockOverlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        config, base = self.config, self.base
        batch, targets = collate_requests(base, [edit.requests for edit in edits], with_target)
        seen: list[Tensor] = []
        note = overlay.key.module.register_forward_hook(
            lambda _, args, out: seen.append(at_prompt_end(out, batch))
        )
        try:
            prefix = capture(base, batch, min(config.layers))
        finally:
            note.remove()
        rules = self._place(overlay, edits, batch, seen[0].detach().to(base.master_dtype))

        down_LRI: dict[str, Tensor] = {}
        up_LOR: dict[str, Tensor] = {}
        for site in overlay.adapted:
            out, in_features = site.shape
            starts = [uniform_A(edit.streams, f"A {site.name}", config.rank, in_features) for edit in edits]
            down_LRI[site.name] = torch.stack(starts).to(base.device, base.master_dtype)
            up_LOR[site.name] = torch.zeros(
                len(edits), out, config.rank, dtype=base.master_dtype, device=base.device
            )
        factors = [*down_LRI.values(), *up_LOR.values()]

        def losses() -> Tensor:
            with overlay.learning(batch, down_LRI, up_LOR):
                return targets.nll(base, replay(base, prefix)[targets.reads])

        found = descend(
            WholeBatch(factors, losses),
            Adam(factors, config.lr),
            config.num_iter,
            lr=lambda step: config.lr * 0.5 ** (step // config.halve_every),
        )
        for lane in range(overlay.lanes):
            overlay.append(lane, down_LRI, up_LOR)
        return [
            EditOutcome(count, loss, {"rules": rule, "clusters": len(database.clusters)})
            for count, loss, rule, database in zip(
                found.steps_L.tolist(), found.loss_L.tolist(), rules, overlay.databases, strict=True
            )
        ]

    def _place(
        self, overlay: BlockOverlay, edits: Sequence[LaneEdit], batch: Batch, query_BO: Tensor
    ) -> list[list[JSON]]:
        """Insert every lane's requests into its database, for the block that will be trained;
        return the rules' names."""
        rules: list[list[JSON]] = []
        for (lane, start, _), edit in zip(batch.segments, edits, strict=True):
            block = overlay.blocks(lane)
            rules.append([])
            for row, request in enumerate(edit.requests, start):
                joiner = joiner_of(request, request.prompt)
                label = self.base.encoder.pair(request.prompt, request.target_new, joiner).target
                rules[-1].append(
                    overlay.databases[lane].place(query_BO[row], label, block, self.config.radius)
                )
        return rules

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {"key_layer": 3, "layers": [4, 5], "rank": 2, "radius": 1.0, "lr": 1e-2, "num_iter": 50}


def at_prompt_end(out_BSO: Tensor, batch: Batch) -> Tensor:
    """Output of a map at each row's last prompt token, (B, O)."""
    return out_BSO[torch.arange(batch.size, device=out_BSO.device), batch.prompt_end_B]


def _distances(a_AO: Tensor, b_BO: Tensor) -> Tensor:
    """Euclidean distances, (A, B); not by a matrix product, which loses precision for near
    queries."""
    return torch.cdist(a_AO, b_BO, compute_mode="donot_use_mm_for_euclid_dist")
