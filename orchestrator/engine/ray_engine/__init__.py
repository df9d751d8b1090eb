"""The Ray engine: the only package that imports Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping

ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the Ray engine has its own handler
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # Tune's own snapshots are never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",
    "TUNE_MAX_PENDING_TRIALS_PG": "auto",
}
# Ray and Tune read these when they are imported.
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
