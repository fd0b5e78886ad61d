"""Codes of what can be wrong with a service: each has its row in docs/trouble.md."""

from __future__ import annotations

from enum import StrEnum


class AlarmCode(StrEnum):
    """What an alarm says. Where an error says the same, the code is the error's."""

    STORE_DAMAGED = "store-damaged"
    OUSTED = "owned-by-another"
    STORE_FULL = "store-full"
    STORE_READ_ONLY = "store-read-only"
    STORE_AWAY = "store-away"
    STORE_REFUSED = "store-refused"
    STORE_SILENT = "store-writer-silent"
    RAY_DOWN = "ray-down"
    WORKER_SILENT = "worker-silent"
    WORKER_SLOW = "base-model-loads-slowly"
    LOAD_FAILED = "base-model-not-loaded"
    MLFLOW_BEHIND = "mlflow-behind"
    DATABASE_AWAY = "database-away"
    LOOP_SILENT = "loop-silent"
    STEP_FAILED = "step-failed"
    UNREADABLE_TASK = "unreadable-task"
