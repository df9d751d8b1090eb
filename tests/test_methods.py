"""Every method keeps the contract."""

from __future__ import annotations

from typing import Any

from tests.contract import MethodContract
from tests.small import GOLDEN
from workers.methods.base import MethodConfig
from workers.methods.ft import FTConfig
from workers.methods.ft_ewc import FTEWCConfig
from workers.methods.grace import GRACEConfig
from workers.methods.lora import LoRAConfig
from workers.methods.melo import MELOConfig
from workers.methods.rome import ROMEConfig
from workers.methods.wise import WISEConfig

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


class TestFTEWC(MethodContract):
    method = "ft-ewc"

    def config(self) -> MethodConfig:
        return FTEWCConfig(
            layers=(1, 2), lr=1e-2, num_steps=15, ew_lambda=10.0, samples=20, corpus=str(GOLDEN / "corpus.txt")
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


class TestGRACE(MethodContract):
    method = "grace"
    whole_answer = False

    def config(self) -> MethodConfig:
        return GRACEConfig(layer=1, n_iter=15, lr=1.0)


class TestLoRA(MethodContract):
    method = "lora"

    def config(self) -> MethodConfig:
        return LoRAConfig(rank=4, lora_alpha=16.0, lr=2e-2, num_steps=15)


class TestLoRADropout(MethodContract):
    method = "lora"

    def config(self) -> MethodConfig:
        return LoRAConfig(layers=(1, 2), rank=8, lora_alpha=16.0, lr=2e-2, num_steps=20, lora_dropout=0.1)


class TestMELO(MethodContract):
    method = "melo"

    def config(self) -> MethodConfig:
        return MELOConfig(key_layer=0, layers=(1, 2), radius=1.0, lr=5e-2, num_iter=15)


class TestWISEMerge(MethodContract):
    method = "wise"

    def config(self) -> MethodConfig:
        return WISEConfig(layer=1, n_iter=8, lr=1.0, retrieve=False, save_freq=2, merge_freq=4, **FEW)


class TestWISERetrieve(MethodContract):
    method = "wise"

    def config(self) -> MethodConfig:
        return WISEConfig(layer=1, n_iter=8, lr=1.0, retrieve=True, save_freq=2, merge_freq=4, **FEW)
