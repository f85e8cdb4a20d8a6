"""This repository beside what a user would run instead, on one machine: two worker processes take turns.

A worker is a process that builds its model once and then measures on request (protocol.py). `ours.py` is the worker of
this repository, `stock.py` that of transformers; a worker of an official code lives outside, in an environment of its
own.
"""
