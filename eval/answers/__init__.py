"""Answers: the store of a run, and the files that other programs write."""

from eval.answers.store import (
    ADVICE,
    FILES,
    AnswerStore,
    current_settings,
    differences,
    flatten,
    index_answers,
    move_aside,
    result_folder,
)

__all__ = [
    "ADVICE",
    "FILES",
    "AnswerStore",
    "current_settings",
    "differences",
    "flatten",
    "index_answers",
    "move_aside",
    "result_folder",
]
