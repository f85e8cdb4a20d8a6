"""The most memory that is allocated at once while a function runs: by torch's allocator, and by the meter."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from eval.efficiency.memory import Meter


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes above those at the start; memory-mapped weights do not count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def metered_peak(call: Callable[[], object]) -> int:
    """The same, by the meter of `--dry-run`, which also counts on the meta device."""
    with torch.inference_mode(), Meter() as meter:
        call()
    return meter.peak()
