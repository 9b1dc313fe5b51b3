"""What all benchmarks share: the machine's description, interleaved timing, peak memory, JSON lines.

A ratio is only as good as its peer's conditions, so tasks run in one process and take turns: first, second,
first, second. The speed-up is taken within each round, and reported as median, smallest and largest, so that
a slow moment of the machine hits both sides. Memory is measured in a fresh process for each task.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

# PyTorch is imported where it is used: a process that measures NumPy code would only carry its weight.
Task = Callable[[], object]
# A machine that others use too is measured by the time that its processors spent on the task, on one thread.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "scikit-image", "FrEIA", "timm")
MIB = 2**20


def emit(benchmark: str, what: str, **values: object) -> None:
    """Print one JSON line, at once, so that a benchmark cut short keeps what it has measured."""
    rounded = {k: _rounded(v) for k, v in values.items()}
    print(json.dumps({"benchmark": benchmark, "what": what, **rounded}), flush=True)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what all benchmarks that compute with PyTorch can be told."""
    parser.add_argument("--threads", type=int, help="threads of PyTorch; its own choice unless given")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts processor seconds, for a machine that is shared; then use one thread",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure it")


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add which images to measure on."""
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--data-root", help="the dataset's folder, where it is not the usual one")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add where both sides run."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both sides run")


def apply_arguments(args: argparse.Namespace) -> None:
    """Set the number of threads; the clock is refused where it would count waiting threads.

    Raises:
        SystemExit: Something is wrong with the arguments, or the device is not there.
    """
    import torch

    from hgadlib.errors import InputError
    from hgadlib.runs.hardware import select_device

    device = getattr(args, "device", "cpu")  # the metrics' benchmark has no choice
    try:
        select_device(device)
    except InputError as error:
        raise SystemExit(f"--device: {error}") from None
    if device != "cpu" and args.clock == "cpu":
        raise SystemExit("--clock cpu: expected --device cpu, for a GPU's work takes no processor seconds")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.clock == "cpu" and torch.get_num_threads() > 1:
        raise SystemExit("--clock cpu: expected --threads 1, for threads that wait count as work")


def environment(device: str = "cpu", clock: str = "wall") -> dict[str, object]:
    """Describe the machine, its threads and the versions that a number depends on."""
    import torch

    from hgadlib.runs.hardware import cpu_name

    return {
        "clock": clock,
        "machine": cpu_name(),
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


@dataclass(frozen=True)
class Timing:
    """Seconds of one task by one of the `CLOCKS`, a value per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float]:
        """Median, smallest and largest, in seconds."""
        return {"median_s": self.median, "min_s": min(self.seconds), "max_s": max(self.seconds)}


def interleave(
    tasks: Mapping[str, Task],
    *,
    repeats: int,
    warmup: int = 1,
    device: str = "cpu",
    clock: str = "wall",
) -> dict[str, Timing]:
    """Time tasks in turns: each once, then each once more.

    Args:
        tasks: What to run, by name.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        device: Where the tasks run; a CUDA device is waited for after each.
        clock: One of `CLOCKS`.
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    wait = _waiter(device)
    for round_ in range(warmup + repeats):
        for name, task in tasks.items():
            start = now()
            task()
            wait()
            if round_ >= warmup:
                seconds[name].append(now() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _waiter(device: str) -> Callable[[], None]:
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def speedup(ours: Timing, *peers: Timing) -> dict[str, float]:
    """How many times faster ours is than the peers one after another; a ratio per round."""
    ratios = [sum(p) / o for o, *p in zip(ours.seconds, *(p.seconds for p in peers), strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


@dataclass(frozen=True)
class Memory:
    """Peak memory of one task in a process of its own, in MiB.

    Attributes:
        base: Resident before the task, its inputs and imports included.
        added: What the task added to that at its peak.
        device: Peak of what PyTorch allocated on a CUDA device, inputs included; 0 without one.
    """

    base: float
    added: float
    device: float

    def summary(self) -> dict[str, float]:
        """The three numbers, the unit in their names."""
        return {f"{name}_mib": value for name, value in asdict(self).items()}


def peak_memory(prepare: Callable[..., Task], *args: object) -> Memory:
    """Measure the peak memory of ``prepare(*args)()`` in a fresh process.

    Args:
        prepare: A module's function that makes the inputs, warms up imports and returns the task.
        *args: Its arguments; they are pickled.
    """
    # Spawned, not forked: a fork inherits freed memory that the task could use unseen, and dead threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, prepare, args).result()


def _measure(prepare: Callable[..., Task], args: Sequence[object]) -> Memory:
    task = prepare(*args)
    _return_freed_memory()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # sets the high-water mark back to what is resident now
    torch = sys.modules.get("torch")
    cuda = torch.cuda if torch and torch.cuda.is_available() and torch.cuda.is_initialized() else None
    if cuda:
        cuda.reset_peak_memory_stats()
    base = _high_water_mark()
    task()
    device = cuda.max_memory_allocated() if cuda else 0
    return Memory(base / MIB, (_high_water_mark() - base) / MIB, device / MIB)


def _return_freed_memory() -> None:
    """Give freed memory back to the system; glibc keeps it, and the task could use it unseen."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _high_water_mark() -> int:
    """Largest resident size so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
