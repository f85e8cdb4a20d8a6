# What scripts over many runs share; sourced by them. Without accelerators they start one one-thread rank per core, at most
# eight: that is faster than one process with as many threads. GPUS, RANKS, HOSTFILE or a Slurm job say it otherwise.
if [ -z "${RANKS:-}${GPUS:-}${HOSTFILE:-}${SLURM_JOB_ID:-}" ] && ! command -v nvidia-smi >/dev/null 2>&1; then
  RANKS=$(( $(nproc) < 8 ? $(nproc) : 8 ))
  export RANKS
fi
