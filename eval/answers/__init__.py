"""Answers: the store of a run, and the files that other programs write."""
