"""Weights & Biases: runs of evaluations, sweeps and tables; a workspace, a report and the upload of offline runs.

Logging never asks a question, never waits long, and works without network or home folder. A failure of W&B is reported
on standard error and changes neither the run nor its files. docs/wandb.md says what is logged.
"""

from eval.tracking.table_run import log_table_run
from eval.tracking.tracker import (
    COLUMNS,
    HEADLINE,
    PICTURES,
    TABLE_PICTURES,
    TABLE_ROWS,
    Tracker,
    flat,
    has_key,
    headline,
    resolve_mode,
    start,
    start_evaluation,
)

__all__ = [
    "COLUMNS",
    "HEADLINE",
    "PICTURES",
    "TABLE_PICTURES",
    "TABLE_ROWS",
    "Tracker",
    "flat",
    "has_key",
    "headline",
    "log_table_run",
    "resolve_mode",
    "start",
    "start_evaluation",
]
