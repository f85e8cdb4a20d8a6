"""Several processes for one command: DeepSpeed's launcher starts them, this package says who does what.

    placement.py  which machines and accelerators: GPUS, RANKS, HOSTFILE, a Slurm allocation
    launch.py     the command that the user typed: starts the ranks, sees one that hangs, died or is lost, ends all
    worker.py     what the launcher runs on every accelerator
    ranks.py      the place of this process among the ranks, and the key-value store that they share

A rank is one process. A replica is the group of ranks that together hold one model: one rank, or as many as tensor
parallelism or ZeRO take. Replicas share the questions; the ranks of a replica answer the same ones together.
"""
