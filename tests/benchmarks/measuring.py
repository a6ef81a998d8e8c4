"""How passes are measured: time in alternating pairs, memory by counting what PyTorch's allocator hands out.

In every pair each pass runs once, in turns forwards and backwards (A B, B A, ...), so that a machine that slows down
slows all of them; a pass's ratio is the median of its ratios to the first pass of the same pair.

Memory is what a pass allocates on top of the model and its input. On CUDA the caching allocator counts it. On a CPU
torch.profiler records every allocation of PyTorch's allocator, and their running sum is exact and repeatable; the
resident size of a process also holds libraries, the model and whatever malloc hasn't given back.
"""

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

os.environ["KINETO_LOG_LEVEL"] = "99"  # torch.profiler is talkative on stderr; read when it starts for the first time

Pass = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How often is measured, and where."""

    pairs: int
    repeat: int
    device: str


class Memory(NamedTuple):
    """Bytes on top of what was allocated before a pass."""

    peak: int
    kept: int  # by what the pass returns: a gradient, or an output with its graph


class Row(NamedTuple):
    """One pass beside the first one of its pairs, which is the plain one."""

    name: str
    plain_ms: float
    ms: float
    time_ratios: list[float]  # one median for every repetition
    quartiles: tuple[float, float]  # of all pairs of all repetitions
    plain_bytes: int
    bytes: int


def seconds(run: Pass, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Inside:
    """Adds up the time in which at least one thread is inside of functions that it watches."""

    def __init__(self):
        self.total, self.calls, self.since = 0.0, 0, 0.0
        self.lock = threading.Lock()

    def watched(self, function: Callable) -> Callable:
        def run(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return run

    def __enter__(self):
        with self.lock:
            self.calls += 1
            if self.calls == 1:
                self.since = time.perf_counter()

    def __exit__(self, *exception):
        with self.lock:
            self.calls -= 1
            if not self.calls:
                self.total += time.perf_counter() - self.since


def memory(run: Pass, device: str) -> Memory:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()  # noqa: F841 (alive while memory is counted)
        torch.cuda.synchronize()
        return Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()  # noqa: F841
    running = list(accumulate(allocations(recorded), initial=0))
    return Memory(max(running), running[-1])


def allocations(recorded: profile) -> list[int]:
    """Bytes of every allocation, and minus those of every release, in the order in which they happened."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]


def alternate(passes: dict[str, Pass], effort: Effort) -> dict[str, list[float]]:
    """Seconds of every pass in every pair (or triple, ...); every second one runs backwards."""
    times = {name: [] for name in passes}
    for pair in tqdm(range(effort.pairs), desc=[*passes][-1], leave=False, disable=None):
        for name in passes if pair % 2 == 0 else reversed(passes):
            times[name].append(seconds(passes[name], effort.device))
    return times


def compare(passes: dict[str, Pass], effort: Effort, count: str = "peak") -> list[Row]:
    """Every pass but the first beside the first; `count` names the field of Memory that the rows show."""
    for run in passes.values():
        run()  # the first pass of each also pays for set-up
    repetitions = [alternate(passes, effort) for _ in range(effort.repeat)]
    used = {name: getattr(memory(run, effort.device), count) for name, run in passes.items()}
    plain, *others = passes
    return [make_row(name, plain, repetitions, used) for name in others]


def make_row(name: str, plain: str, repetitions: list[dict[str, list[float]]], used: dict[str, int]) -> Row:
    ratios = [[a / b for a, b in zip(times[name], times[plain], strict=True)] for times in repetitions]
    lower, _, upper = statistics.quantiles(sum(ratios, []), n=4)
    plain_ms, ms = (1000 * statistics.median(sum((times[key] for times in repetitions), [])) for key in (plain, name))
    medians = [statistics.median(of_one) for of_one in ratios]
    return Row(name, plain_ms, ms, medians, (lower, upper), used[plain], used[name])


def print_header(repeat: int) -> None:
    ratios = "time ratio (quartiles)".center(7 * repeat + 18)
    print(f"{'':39}{'plain':>10}{'this':>13}  {ratios}{'plain':>12}{'this':>12}   memory ratio")


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        ratios = "".join(f"{ratio:7.3f}" for ratio in row.time_ratios)
        print(
            f"  {row.name:36}{row.plain_ms:8.1f} ms{row.ms:10.1f} ms"
            f" {ratios}  ({row.quartiles[0]:.3f} to {row.quartiles[1]:.3f})"
            f"{row.plain_bytes / 1e6:9.1f} MB{row.bytes / 1e6:9.1f} MB{row.bytes / row.plain_bytes:15.3f}",
            flush=True,
        )


def print_skipped(name: str, why: str) -> None:
    print(f"  {name}: skipped, {why}", flush=True)
