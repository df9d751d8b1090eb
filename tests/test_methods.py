"""Every method keeps the contract."""

from __future__ import annotations

from typing import Any

from tests.contract import MethodContract
from tests.small import GOLDEN
from workers.methods.base import MethodConfig
from workers.methods.ft import FTConfig
from workers.methods.grace import GRACEConfig
from workers.methods.malmen import MALMENConfig
from workers.methods.mend import MENDConfig
from workers.methods.rome import ROMEConfig
from workers.methods.wise import WISEConfig
from workers.pretrain import Schedule

FEW: Any = {"context_template_length_params": ((5, 5),)}
"""Fewer context templates than the papers use: the contract does not depend on how many."""


class TestFTL(MethodContract):
    method = "ft"
    whole_answer = False  # its loss puts every target token at the last prompt position: two cannot both win

    def config(self) -> MethodConfig:
        return FTConfig(layers=(1,), lr=1e-2, num_steps=8, objective="prompt_last")


class TestFTM(MethodContract):
    method = "ft"

    def config(self) -> MethodConfig:
        return FTConfig(layers=(1, 2), lr=1e-2, num_steps=15, objective="target_new")


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


class TestGRACE(MethodContract):
    method = "grace"
    whole_answer = False

    def config(self) -> MethodConfig:
        return GRACEConfig(layer=1, n_iter=15, lr=1.0)


class TestWISEMerge(MethodContract):
    method = "wise"

    def config(self) -> MethodConfig:
        return WISEConfig(layer=1, n_iter=8, lr=1.0, retrieve=False, save_freq=2, merge_freq=4, **FEW)


class TestWISERetrieve(MethodContract):
    method = "wise"

    def config(self) -> MethodConfig:
        return WISEConfig(layer=1, n_iter=8, lr=1.0, retrieve=True, save_freq=2, merge_freq=4, **FEW)


class TestMEND(MethodContract):
    method = "mend"

    def config(self) -> MethodConfig:
        return MENDConfig(layers=(1, 2), rank=8, edit_lr=1e-2, schedule=Schedule(steps=3, batch_size=4))


class TestMALMEN(MethodContract):
    method = "malmen"

    def config(self) -> MethodConfig:
        return MALMENConfig(layers=(1, 2), rank=8, lr=2e-2, schedule=Schedule(steps=3, batch_size=4))
