"""The highest memory of a device while something runs."""

import ctypes
import gc
from pathlib import Path

import torch


def start_peak(device: torch.device) -> None:
    """Forget the highest memory seen so far; on a CPU, what was freed is first given back to the system."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: torch.device) -> int:
    """Bytes since `start_peak`, weights included: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
