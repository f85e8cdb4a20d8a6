"""Answers: the store of a run, and the files that other programs write."""

from eval.answers.files import AnswerFiles, Shard, answer_id, settings_hash
from eval.answers.source_hash import HASHED, differences, flatten
from eval.answers.store import ADVICE, AnswerStore, result_folder

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
