"""Answers: the store of a run, and the files that other programs write."""

from eval.answers.source_hash import HASHED, differences, flatten
from eval.answers.store import ADVICE, AnswerFiles, AnswerStore, Shard, answer_id, result_folder, settings_hash

__all__ = [
    "ADVICE",
    "HASHED",
    "AnswerFiles",
    "AnswerStore",
    "Shard",
    "answer_id",
    "differences",
    "flatten",
    "result_folder",
    "settings_hash",
]
