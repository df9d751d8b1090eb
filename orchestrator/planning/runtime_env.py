"""Ray's ``runtime_env``: the small part that a spec may set, and the whole one of a file that the
user names on the command line.

Specs are shared, so a spec sets variables of :data:`VARIABLES` only: none of them makes a worker
load or run anything. Ray also writes every ``runtime_env`` into its logs, so credentials are
refused wherever they stand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from workers.inputs import found, kind_of, parse_yaml, read_text, short
from workers.types import SpecError

VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "AWS_DEFAULT_REGION": "names the region of a bucket",
        "AWS_MAX_ATTEMPTS": "a number of tries",
        "AWS_REGION": "names the region of a bucket",
        "AWS_RETRY_MODE": "names one of the retry rules of the AWS library",
        "CUDA_DEVICE_ORDER": "numbers the GPUs",
        "CUDA_LAUNCH_BLOCKING": "a switch: errors appear at the kernel that made them",
        "DO_NOT_TRACK": "a switch: libraries send no usage statistics",
        "HF_HUB_DISABLE_TELEMETRY": "a switch: the hub's library sends no usage statistics",
        "HF_HUB_DOWNLOAD_TIMEOUT": "a number of seconds",
        "HF_HUB_ETAG_TIMEOUT": "a number of seconds",
        "HF_HUB_OFFLINE": "a switch: nothing is fetched from the hub",
        "HF_HUB_VERBOSITY": "a level of log messages",
        "PYTHONFAULTHANDLER": "a switch: a crash prints where it happened",
        "PYTHONUNBUFFERED": "a switch: output appears at once",
        "PYTORCH_ALLOC_CONF": "sizes and thresholds of torch's allocator",
        "PYTORCH_CUDA_ALLOC_CONF": "sizes and thresholds of torch's allocator",
        "TORCH_SHOW_CPP_STACKTRACES": "a switch: longer error messages",
        "TRANSFORMERS_OFFLINE": "a switch: nothing is fetched from the hub",
        "TRANSFORMERS_VERBOSITY": "a level of log messages",
    }
)
"""Environment variable that a spec may set -> why it is harmless."""

_SET_BY_THE_SWEEP: Mapping[str, str] = MappingProxyType(
    {
        "CUBLAS_WORKSPACE_CONFIG": "it decides bits of the results",
        "MKL_NUM_THREADS": "set engine.threads",
        "OMP_NUM_THREADS": "set engine.threads",
        "TOKENIZERS_PARALLELISM": "tokenizers run in the actor's own thread",
    }
)

_SECRET_WORDS = frozenset(
    {"APIKEY", "CREDENTIAL", "CREDENTIALS", "KEY", "KEYS", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD"}
    | {"PAT", "PWD", "SECRET", "SECRETS", "TOKEN"}
)
_PLACES = frozenset({"DIR", "FILE", "PATH"})
"""Last words of variables that name a place where a secret lies, and hold none."""


def check_spec_environment(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``ray.runtime_env`` of a spec, with values as texts. Raises ``ValueError`` that names
    the key and where it may come from."""
    for key in value:
        if key != "env_vars":
            raise ValueError(f"{short(key)} is not for a spec, which may set env_vars only: {_ELSEWHERE}")
    variables = value.get("env_vars") or {}
    if not isinstance(variables, Mapping):
        raise ValueError(f"env_vars: expected a mapping of names to texts, found {found(variables)}")
    texts = {}
    for name, text in variables.items():
        if is_secret(name):
            raise ValueError(f"env_vars.{name}: {_NO_SECRETS}")
        if name in _SET_BY_THE_SWEEP:
            raise ValueError(f"env_vars.{name}: is set by the sweep ({_SET_BY_THE_SWEEP[name]}); remove it")
        if name not in VARIABLES:
            raise ValueError(
                f"env_vars.{name}: is not one of the variables that a spec may set, because each of them is "
                f"known to run nothing ({', '.join(VARIABLES)}): {_ELSEWHERE}"
            )
        texts[name] = _as_text(name, text)
    return {"env_vars": texts} if texts else {}


def read_runtime_env(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the file of ``--runtime-env``: Ray's whole ``runtime_env`` as YAML or JSON, whatever it
    makes workers do. Raises :class:`SpecError`."""
    source = f"--runtime-env {os.fspath(path)}"
    return check_runtime_env(parse_yaml(read_text(Path(path), source), source), source)


def check_runtime_env(value: object, source: str) -> dict[str, Any]:
    """Return a ``runtime_env`` that the user gave in person. Raises :class:`SpecError` if it is no
    mapping, or holds credentials."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SpecError(f"{source}: expected a mapping, Ray's runtime_env, found {kind_of(value)}")
    variables = value.get("env_vars") or {}
    if not isinstance(variables, Mapping):
        raise SpecError(f"{source}: env_vars: expected a mapping, found {found(variables)}")
    for name in variables:
        if is_secret(name):
            raise SpecError(f"{source}: env_vars.{name}: {_NO_SECRETS}")
    try:
        texts = {str(name): _as_text(name, text) for name, text in variables.items()}
    except ValueError as error:
        raise SpecError(f"{source}: {error}") from None
    return {**value, "env_vars": texts} if texts else dict(value)


def is_secret(name: object) -> bool:
    """Return whether a variable's name says that it holds a credential."""
    words = str(name).upper().split("_")
    return not _SECRET_WORDS.isdisjoint(words) and words[-1] not in _PLACES


def _as_text(name: object, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"env_vars.{name}: expected a text or a whole number, found {found(value)}")
    return str(value)


_ELSEWHERE = (
    "specs are shared, and it can run code on every node. Give it on the command line, --runtime-env FILE, or "
    "set it on the nodes, in the cluster file (docs/cluster.md)"
)
_NO_SECRETS = (
    "credentials do not go through runtime_env, because Ray writes it into its logs; the workers of a local "
    "run inherit them from your environment, and the nodes of a cluster have their own (docs/cluster.md)"
)
