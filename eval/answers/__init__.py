"""Answers: the store of a run, and the files that other programs write."""

from eval.answers.files import answer_id, seal_of
from eval.answers.restart import FILES, move_aside
from eval.answers.shards import Shard
from eval.answers.store import (
    ADVICE,
    HASHED,
    AnswerStore,
    differences,
    flatten,
    index_answers,
    result_folder,
)

__all__ = [
    "ADVICE",
    "FILES",
    "HASHED",
    "AnswerStore",
    "Shard",
    "answer_id",
    "differences",
    "flatten",
    "index_answers",
    "move_aside",
    "result_folder",
    "seal_of",
]
