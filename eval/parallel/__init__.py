"""Run one command in several processes, which DeepSpeed's launcher starts.

    placement.py  which machines and accelerators are used: GPUS, RANKS, HOSTFILE, a Slurm allocation
    launch.py     the process that the user started: starts the ranks, and ends all if one hangs, died or is lost
    worker.py     what the launcher runs on every accelerator
    ranks.py      the place of this process among the ranks, and the key-value store that they share

A rank is one process. A replica is the group of ranks that together hold one model: one rank, or several with tensor
parallelism or ZeRO. The questions are divided among replicas; the ranks of a replica answer the same questions
together.
"""
