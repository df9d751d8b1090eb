"""What an EasyEdit hyperparameter file says of the sweep it stands in, compared with the sweep.

found = compare(spec, 0, file_remarks("wise", path), shape, whole_group=False)
warnings_of_files(spec, [found])   # what a file says and nothing follows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.planning.spec import SweepSpec
from workers.inputs import short
from workers.model.config import ModelShape
from workers.types import JSON, SpecError

if TYPE_CHECKING:
    from workers.methods.easyedit import FileRemarks

HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class FileFindings:
    """The keys of one file that nothing follows."""

    warnings: tuple[str, ...]
    """Those that change numbers in the file's own code, each with the reason."""
    neutral: tuple[str, ...]
    """Those that no number depends on."""


def compare(
    spec: SweepSpec, variant: int, remarks: FileRemarks, shape: ModelShape, whole_group: bool
) -> FileFindings:
    """Compare a variant's file with the sweep. Raises :class:`SpecError` that names every
    contradiction."""
    problems: list[str] = []
    warnings = _lost(remarks)
    for key, value in remarks.sweep.items():
        if key == "batch_size":
            _batch_size(spec, variant, value, whole_group, problems, warnings)
        elif key == "v_loss_layer":
            if value != shape.layers - 1:
                warnings.append(
                    f"v_loss_layer: {short(value)} is not followed: the value search reads the loss after the "
                    f"model's last layer, {shape.layers - 1}"
                )
        elif not isinstance(value, bool):
            problems.append(f"{key}: {short(value)} is not valid; choose true or false")
        elif key == "use_chat_template" and value != spec.chat_template:
            problems.append(
                f"use_chat_template: {_yaml(value)}, but the sweep has chat_template: "
                f"{_yaml(spec.chat_template)}; set one to the other"
            )
        elif key in ("fp16", "half"):
            _precision(spec, key, value, problems, warnings)
        elif key == "model_parallel" and value:
            warnings.append(
                "model_parallel: true is not followed: an actor holds the whole model on one device"
            )
    if problems:
        lines = problems if len(problems) == 1 else ["", *problems]
        raise SpecError(f"hparams_file: {spec.methods[variant].hparams_file}: " + "\n  ".join(lines))
    return FileFindings(tuple(warnings), remarks.neutral)


def _lost(remarks: FileRemarks) -> list[str]:
    """A line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for key, (value, why) in remarks.lost.items():
        by_reason.setdefault(why, []).append(f"{key}: {short(value)}")
    return [
        f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} not followed: {why}"
        for why, keys in by_reason.items()
    ]


def _batch_size(
    spec: SweepSpec,
    variant: int,
    value: JSON,
    whole_group: bool,
    problems: list[str],
    warnings: list[str],
) -> None:
    """An explicit ``batch_size`` of the variant goes before the file's, as ``hparams`` do; the grid's
    does not."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        problems.append(f"batch_size: {short(value)} is not valid; give a whole number of at least 1")
        return
    own, (asked, name) = spec.methods[variant].batch_size, spec.batch_size(variant)
    if whole_group:
        if any(T != value for T in spec.sizes(variant)):
            warnings.append(f"batch_size: {value} is not followed: this method edits all T requests at once")
    elif own is not None and own != value:
        warnings.append(f"batch_size: {value} is not followed: methods.{variant}.batch_size is {own}")
    elif asked != value:
        problems.append(
            f"batch_size: {value}, but the sweep has {name}: {asked}; give this variant its own, for example "
            f"methods.{variant}.batch_size: {value}"
        )


def _precision(spec: SweepSpec, key: str, value: bool, problems: list[str], warnings: list[str]) -> None:
    """``fp16`` and ``half`` against ``model.dtype``. EasyEdit's ``half`` is float16 for some methods
    and bfloat16 for others."""
    dtype = spec.model.dtype
    fits = HALF if key == "half" else ("float16",)
    if value and dtype not in fits:
        problems.append(
            f"{key}: true, but the sweep has model.dtype: {dtype}; set model.dtype to {' or '.join(fits)}, "
            f"or {key} to false"
        )
    elif not value and dtype == "float16":
        problems.append(
            f"{key}: false, but the sweep has model.dtype: float16; set model.dtype to float32, or {key} to "
            "true"
        )
    elif not value and dtype == "bfloat16":
        warnings.append(f"{key}: false is not followed: the sweep has model.dtype: bfloat16")


def _yaml(value: bool) -> str:
    return "true" if value else "false"


def warnings_of_files(spec: SweepSpec, found: Sequence[FileFindings | None]) -> list[str]:
    """A line for every key that changes numbers elsewhere and not here, and one for all others that
    have no meaning here."""
    lines = []
    neutral: dict[str, None] = {}
    for method, file in zip(spec.methods, found, strict=True):
        if file is not None and method.hparams_file is not None:
            lines += [f"{method.label}: {method.hparams_file.name}: {warning}" for warning in file.warnings]
            neutral |= dict.fromkeys(file.neutral)
    if neutral:
        lines.append(
            "keys of hyperparameter files that no number depends on are left aside: "
            f"{', '.join(sorted(neutral))}"
        )
    return lines
