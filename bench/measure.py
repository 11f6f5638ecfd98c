"""How the benchmarks measure: medians side by side, peak memory in processes of their own."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def side_by_side(
    sides: dict[str, Callable[[], Any]], repeats: int, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of every side, interleaved run by run so that drift hits all of them alike."""
    if warm:
        for work in sides.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            gc.collect()
            times[name].append(seconds(work))
    return times


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def spread(times: Sequence[float]) -> str:
    """Half the range in percent of the median."""
    return f"{50 * (max(times) - min(times)) / median(times):.0f} %"


def forget_peak() -> bool:
    """Let the peak start anew from what is held now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Largest resident memory that this process has had (since `forget_peak`), in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def mapped() -> dict[str, str]:
    """The environment of a process that maps and unmaps every larger tensor by itself (glibc).

    Its peak is that of what lives. Otherwise freed memory is kept by the allocator's own lights,
    and the peaks of one and the same work were seen to differ by a factor of two.
    """
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}


def in_own_process(
    module: str, arguments: Sequence[str], limit: float, around: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """Run `python -m module arguments`; the last line it prints is JSON. None where it fails.
    `around`: its environment, where it is not to be ours."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            env=around,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1:], file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def where() -> str:
    """The machine in general words, with versions and threads."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {gpu}"
    )
