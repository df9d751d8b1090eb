"""Every method keeps the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract import MethodContract
from tests.small import GOLDEN, random_model
from workers.artifacts.pretrain import TrainingSchedule
from workers.methods.alphaedit import AlphaEditConfig
from workers.methods.base import MethodConfig
from workers.methods.defer import DEFERConfig
from workers.methods.emmet import EMMETConfig
from workers.methods.ft import FTConfig
from workers.methods.ft_ewc import FTEWCConfig
from workers.methods.grace import GRACEConfig
from workers.methods.icl import ICLConfig
from workers.methods.lora import LoRAConfig
from workers.methods.malmen import MALMENConfig
from workers.methods.melo import MELOConfig
from workers.methods.memit import MEMITConfig
from workers.methods.mend import MENDConfig
from workers.methods.none import NoEditConfig
from workers.methods.pmet import PMETConfig
from workers.methods.rledit import RLEditConfig
from workers.methods.rome import ROMEConfig, RROMEConfig
from workers.methods.serac import SERACConfig
from workers.methods.simie import SimIEConfig
from workers.methods.ultraedit import UltraEditConfig
from workers.methods.wise.config import WISEConfig
from workers.model.base import BaseModel

a_variant = pytest.mark.slow
"""For a class whose method shares nearly all of its code with another class."""

FEW: Any = {"context_template_length_params": ((5, 5),)}
"""Fewer context templates than the papers use: the contract does not depend on how many."""


@a_variant
class TestFTL(MethodContract):
    method = "ft"
    whole_answer = False  # its loss puts every target token at the last prompt position: two cannot both win

    def config(self) -> MethodConfig:
        return FTConfig(layers=(1,), lr=1e-2, num_steps=8, objective="prompt_last")


class TestFTM(MethodContract):
    method = "ft"

    def config(self) -> MethodConfig:
        return FTConfig(layers=(1, 2), lr=1e-2, num_steps=15, objective="target_new")


class TestFTEWC(MethodContract):
    method = "ft-ewc"

    def config(self) -> MethodConfig:
        return FTEWCConfig(
            layers=(1, 2),
            lr=1e-2,
            num_steps=15,
            ew_lambda=10.0,
            samples=20,
            corpus=str(GOLDEN / "corpus.txt"),
        )


class TestROME(MethodContract):
    method = "rome"
    whole_answer = False

    def config(self) -> MethodConfig:
        return ROMEConfig(
            layer=0,
            corpus=str(GOLDEN / "corpus.txt"),
            samples=100,
            fact_token="last",
            v_num_grad_steps=12,
            **FEW,
        )


@a_variant
class TestRROME(MethodContract):
    method = "rrome"
    whole_answer = False

    def config(self) -> MethodConfig:
        # random models answer a prompt and its contexts with very different keys: a larger value
        # for the average to carry
        return RROMEConfig.model_validate({**TestROME().config().model_dump(), "clamp_norm_factor": 10.0})


class TestMEMIT(MethodContract):
    method = "memit"
    whole_answer = False

    def config(self) -> MethodConfig:
        return MEMITConfig(
            layers=(0, 1),
            corpus=str(GOLDEN / "corpus.txt"),
            samples=100,
            fact_token="last",
            v_num_grad_steps=12,
            mom2_update_weight=0.1,
        )


@a_variant
class TestMEMITMass(TestMEMIT):
    method = "memit-mass"


class TestAlphaEdit(MethodContract):
    method = "alphaedit"
    whole_answer = False

    def config(self) -> MethodConfig:
        return AlphaEditConfig(
            layers=(0, 1),
            corpus=str(GOLDEN / "corpus.txt"),
            samples=100,
            fact_token="last",
            v_num_grad_steps=12,
            nullspace_threshold=1.0,
            L2=1e-2,
        )


class TestGRACE(MethodContract):
    method = "grace"
    whole_answer = False

    def config(self) -> MethodConfig:
        return GRACEConfig(layer=1, n_iter=15, lr=1.0)


class TestLoRA(MethodContract):
    method = "lora"

    def config(self) -> MethodConfig:
        return LoRAConfig(rank=4, lora_alpha=16.0, lr=2e-2, num_steps=15)


@a_variant
class TestLoRADropout(MethodContract):
    method = "lora"

    def config(self) -> MethodConfig:
        return LoRAConfig(layers=(1, 2), rank=8, lora_alpha=16.0, lr=2e-2, num_steps=20, lora_dropout=0.1)


class TestMELO(MethodContract):
    method = "melo"

    def config(self) -> MethodConfig:
        return MELOConfig(key_layer=0, layers=(1, 2), radius=1.0, lr=5e-2, num_iter=15)


@a_variant
class TestWISEMerge(MethodContract):
    method = "wise"

    def config(self) -> MethodConfig:
        return WISEConfig(layer=1, n_iter=8, lr=1.0, retrieve=False, save_freq=2, merge_freq=4, **FEW)


class TestWISERetrieve(MethodContract):
    method = "wise"

    def config(self) -> MethodConfig:
        return WISEConfig(layer=1, n_iter=8, lr=1.0, retrieve=True, save_freq=2, merge_freq=4, **FEW)


class TestUltraEdit(MethodContract):
    method = "ultraedit"
    whole_answer = False

    def config(self) -> MethodConfig:
        return UltraEditConfig(modules={"mlp_out": (0, 1, 2)}, token="ans", lr=1e-2)


class TestEMMET(MethodContract):
    method = "emmet"
    whole_answer = False

    def config(self) -> MethodConfig:
        return EMMETConfig(
            layers=(0,),
            corpus=str(GOLDEN / "corpus.txt"),
            samples=100,
            fact_token="last",
            v_num_grad_steps=12,
            emmet_lambda=1e-4,
            **FEW,
        )


class TestPMET(MethodContract):
    method = "pmet"
    whole_answer = False

    def config(self) -> MethodConfig:
        return PMETConfig(
            layers=(0, 1),
            corpus=str(GOLDEN / "corpus.txt"),
            samples=100,
            fact_token="last",
            v_num_grad_steps=12,
            clamp_norm_factor=4.0,
            v_weight_decay=1e-3,
            mom2_update_weight=0.1,
            **FEW,
        )


class TestNone(MethodContract):
    method = "none"
    effect = "none"
    runs_base = False

    def config(self) -> MethodConfig:
        return NoEditConfig()


class TestICL(MethodContract):
    method = "icl"
    effect = "moves"  # an untrained model repeats nothing that it read
    runs_base = False

    def config(self) -> MethodConfig:
        return ICLConfig()

    def model(self, arch: str, dtype: torch.dtype = torch.float32) -> BaseModel:
        return random_model(arch, dtype, max_position_embeddings=512)


class TestDEFER(MethodContract):
    method = "defer"
    effect = "likelier"  # one value at every token: of two target tokens neither need win

    def config(self) -> MethodConfig:
        return DEFERConfig(layer=1, n_iter=15, lr=3e-2)


class TestSERAC(MethodContract):
    method = "serac"
    effect = "moves"  # its networks have seen sixteen requests
    runs_base = False

    def config(self) -> MethodConfig:
        return SERACConfig(lr=1e-3, threshold=1e-3, schedule=TrainingSchedule(steps=4, batch_size=4))

    def model(self, arch: str, dtype: torch.dtype = torch.float32) -> BaseModel:
        return random_model(arch, dtype, max_position_embeddings=512)


class TestMEND(MethodContract):
    method = "mend"

    def config(self) -> MethodConfig:
        return MENDConfig(
            layers=(1, 2), rank=8, edit_lr=1e-2, schedule=TrainingSchedule(steps=3, batch_size=4)
        )


class TestMALMEN(MethodContract):
    method = "malmen"

    def config(self) -> MethodConfig:
        return MALMENConfig(layers=(1, 2), rank=8, lr=2e-2, schedule=TrainingSchedule(steps=3, batch_size=4))


class TestRLEdit(MethodContract):
    method = "rledit"

    def config(self) -> MethodConfig:
        return RLEditConfig(
            layers=(1, 2), rank=8, lr=2e-2, edit_size=2, schedule=TrainingSchedule(steps=3, batch_size=4)
        )


class TestSimIE(MethodContract):
    method = "simie"
    whole_answer = False

    def config(self) -> MethodConfig:
        return SimIEConfig(base_method="rome", base=TestROME().config().model_dump(), lamHyper=1e-2)


@a_variant
class TestSimIEPresentWeights(MethodContract):
    method = "simie"

    def config(self) -> MethodConfig:
        base = {"layers": (1, 2), "lr": 1e-2, "num_steps": 15}
        return SimIEConfig(base_method="ft", base=base, lamHyper=1e-2, init_model=False)
