"""The registry of editing methods. A new method needs its file, one line here and one subclass of
the contract test.

>>> get_method("wise").title
'WISE'
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from workers.inputs import explain
from workers.methods.base import Method, MethodConfig
from workers.methods.easyedit import FileRemarks, read_hparams
from workers.model.config import EMBEDDED, ModelConfig
from workers.types import JSON, ProtocolName, SpecError

REGISTRY: Mapping[str, str] = MappingProxyType(
    {
        # write weights
        "ft": "workers.methods.ft:FT",
        "ft-ewc": "workers.methods.ft_ewc:FTEWC",
        "lora": "workers.methods.lora:LoRA",
        "rome": "workers.methods.rome:ROME",
        "rrome": "workers.methods.rome:RROME",
        "memit": "workers.methods.memit:MEMIT",
        "memit-mass": "workers.methods.memit:MEMITMass",
        "emmet": "workers.methods.emmet:EMMET",
        "pmet": "workers.methods.pmet:PMET",
        "alphaedit": "workers.methods.alphaedit:AlphaEdit",
        "ultraedit": "workers.methods.ultraedit:UltraEdit",
        "simie": "workers.methods.simie:SimIE",
        # keep a memory beside the weights
        "grace": "workers.methods.grace:GRACE",
        "defer": "workers.methods.defer:DEFER",
        "melo": "workers.methods.melo:MELO",
        "wise": "workers.methods.wise.method:WISE",
        "serac": "workers.methods.serac:SERAC",
        # networks that are trained first and then write weights
        "mend": "workers.methods.mend:MEND",
        "malmen": "workers.methods.malmen:MALMEN",
        "rledit": "workers.methods.rledit:RLEdit",
        # change nothing in the model
        "none": "workers.methods.none:NoEdit",
        "icl": "workers.methods.icl:ICL",
    }
)


def method_names() -> tuple[str, ...]:
    return tuple(REGISTRY)


def get_method(name: str) -> type[Method[Any, Any]]:
    """The method's class. Raises :class:`SpecError` listing the valid names."""
    try:
        target = REGISTRY[name]
    except KeyError:
        raise SpecError(f"unknown method {name!r}; choices: {', '.join(method_names())}") from None
    module, attribute = target.split(":")
    found: type[Method[Any, Any]] = getattr(import_module(module), attribute)
    return found


def load_config(
    method: str,
    hparams: Mapping[str, JSON],
    hparams_file: Path | None,
    model: ModelConfig,
    protocol: ProtocolName = "paper",
) -> MethodConfig:
    """The config that :func:`load_method` gives, without what else a file says."""
    return load_method(method, hparams, hparams_file, model, protocol)[0]


def load_method(
    method: str,
    hparams: Mapping[str, JSON],
    hparams_file: Path | None,
    model: ModelConfig,
    protocol: ProtocolName = "paper",
) -> tuple[MethodConfig, FileRemarks | None]:
    """A method's frozen config: defaults, what ``protocol`` sets, an EasyEdit YAML (if given),
    ``hparams``; the later wins. And the keys of the file that are no hyperparameters.

    Without a file, the embedded model starts from the hyperparameters tuned for it. Raises
    :class:`SpecError` that names the method, the field, the value and the valid choices.
    """
    from pydantic import ValidationError

    cls = get_method(method)
    values: dict[str, JSON] = {}
    remarks = None
    if hparams_file is not None:
        loaded = read_hparams(hparams_file)
        values = cls.Config.from_easyedit(loaded, str(hparams_file))
        remarks = cls.Config.easyedit_remarks(loaded, str(hparams_file))
    elif model.name == EMBEDDED:
        values = cls.embedded_for(hparams)
    source = f"method {method}" if hparams_file is None else f"{hparams_file} (method {method})"
    try:
        if hparams_file is None:
            given = cls.Config.merged(values, hparams)
        else:
            given = cls.Config.merged_with_file(values, hparams)
            cls.Config.check_complete(given, str(hparams_file))
        if protocol == "easyedit":
            given = cls.Config.like_easyedit(given)
        return cls.Config.model_validate(given), remarks
    except ValidationError as error:
        problem = explain(error, cls.Config)
        if cls.Config.reads_corpus(given) and given.get("corpus") is None and model.name != EMBEDDED:
            lines = [line.strip() for line in problem.splitlines() if line.strip()]
            lines.append(
                f"corpus: {cls.title} needs a text or JSONL file for its statistics of {model.name!r}"
            )
            problem = "\n  " + "\n  ".join(lines)
        raise SpecError(f"{source}: {problem}") from None
    except ValueError as error:
        raise SpecError(f"{source}: {error}") from None
