"""What the machine says of itself: power, the load of others, memory of a process, bytes on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil


def plugged_in() -> bool:
    """Whether the machine runs on mains power; one without a battery does."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return battery is None or battery.power_plugged is not False


def load_of_others(own: Iterable[int], seconds: float = 1.0) -> float:
    """The share of all processors, 0 to 1, that processes other than `own` use over the next `seconds`."""
    processes = list(own)
    busy, used = _busy(), _used(processes)
    began = time.monotonic()
    time.sleep(seconds)
    capacity = (time.monotonic() - began) * (psutil.cpu_count() or 1)
    others = (_busy() - busy) - (_used(processes) - used)
    return min(1.0, max(0.0, others / capacity))


def _busy() -> float:
    """Processor seconds that the machine has worked."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _used(processes: Iterable[int]) -> float:
    """Processor seconds that processes have used."""
    total = 0.0
    for process in processes:
        try:
            times = psutil.Process(process).cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def resident_bytes(process: int) -> int:
    """Memory that a process holds; 0 once it is gone."""
    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return 0


def bytes_under(folder: Path) -> int:
    """Bytes of all files in a folder, those of folders within it included."""
    total, waiting = 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue  # a file that was replaced meanwhile
    return total
