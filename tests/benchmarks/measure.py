"""What the benchmarks share: interleaved samples, peaks of memory, and their figures in tables, JSON and pictures.

Ways to do one thing are called one after the other in every round, so that a noisy machine disturbs all of them alike;
medians over rounds are reported, and ratios of medians are what to read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

Call = Callable[[], Any]
Figures = dict[str, Any]

#: A sample of a short call is the mean over as many calls as take this long.
LEAST_MS = 20.0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings of the libraries that are compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- time --------------------------------------------------------------------------------------------------------------------


def milliseconds(call: Call, repeats: int = 1) -> float:
    """Returns the milliseconds of one call, the mean over repeats."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e3 * (time.perf_counter() - start) / repeats


def interleaved(calls: Mapping[str, Call], rounds: int, before: Mapping[str, Call] | None = None) -> dict[str, list[float]]:
    """Returns the samples of every call in milliseconds, one a round, after two calls to warm up.

    Args:
        calls: The ways to compare, by name.
        rounds: How many samples are taken of each.
        before: What is called untimed before every call of that name; such a sample is of one call.
    """
    before = before or {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        times = []
        for _ in range(2):
            before.get(name, lambda: None)()
            times.append(milliseconds(call))
        repeats[name] = 1 if name in before else max(1, round(LEAST_MS / min(times)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before.get(name, lambda: None)()
            samples[name].append(milliseconds(call, repeats[name]))
    return samples


def medians(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Returns the median milliseconds of each call over interleaved rounds."""
    return {name: statistics.median(s) for name, s in interleaved(calls, rounds).items()}


def summary(samples: Sequence[float]) -> Figures:
    """Returns the median and the quartiles of samples in milliseconds, and their number."""
    q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {"ms": statistics.median(samples), "q1": q1, "q3": q3, "rounds": len(samples)}


# -- memory ------------------------------------------------------------------------------------------------------------------


def peak_bytes(call: Call) -> int:
    """Returns the most bytes that were allocated at once during a call, over what was before it."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    recorded: Any = profile.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def time_and_peak(calls: Mapping[str, Call], rounds: int) -> dict[str, Figures]:
    """Measures milliseconds and peak bytes of every call, and both over those of the first."""
    samples = interleaved(calls, rounds)
    ways = {name: {**summary(samples[name]), "peak_bytes": peak_bytes(call)} for name, call in calls.items()}
    first = next(iter(ways.values()))
    for w in ways.values():
        w["time_to_first"], w["peak_to_first"] = w["ms"] / first["ms"], w["peak_bytes"] / first["peak_bytes"]
    return ways


def memory_table(figures: Sequence[Figures], title: str) -> Table:
    """Makes the table of what ``time_and_peak`` found at several shapes."""
    table = Table("hidden, layers, batch, tokens", "", "ms", "/ first", "peak MiB", "/ first", title=title)
    for one in figures:
        for i, (name, w) in enumerate(one["ways"].items()):
            where = ", ".join(map(str, one["shape"].values())) if i == 0 else ""
            memory = f"{w['peak_bytes'] / 2**20:.2f}", f"{w['peak_to_first']:.2f}"
            table.add_row(where, name, f"{w['ms']:.0f}", f"{w['time_to_first']:.2f}", *memory)
        table.add_section()
    return table


# -- results -----------------------------------------------------------------------------------------------------------------


def machine() -> Figures:
    """Returns what the figures depend on: versions, processor, threads."""
    versions = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "funcpeft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def write_json(path: Path, figures: Figures) -> None:
    """Writes figures whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(unfinished, path)


def goal(what: str, found: float, *, at_least: float | None = None, at_most: float | None = None) -> Figures:
    """Returns a goal for a ratio, and whether it is met."""
    met = (at_least is None or found >= at_least) and (at_most is None or found <= at_most)
    return {"what": what, "found": found, "at_least": at_least, "at_most": at_most, "met": met}


def goal_rows(goals: Sequence[Figures]) -> Iterator[tuple[str, str, str, str]]:
    """Yields the row of a table for each goal: what, goal, found, met."""
    for g in goals:
        bound = f"at least {g['at_least']:.3g}" if g["at_least"] is not None else f"at most {g['at_most']:.3g}"
        yield g["what"], bound, f"{g['found']:.2f}", "[green]yes[/]" if g["met"] else "[bold red]no[/]"


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Makes a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="samples of each call")
    made.add_argument("--quick", action="store_true", help="tiny settings, to see that it runs")
    made.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the JSON and the picture")
    made.add_argument("--threads", type=int, help="threads of torch; by default its own choice")
    return made


def options(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options, and sets the threads."""
    given = made.parse_args(argv)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.quick:
        given.rounds = 2
    return given
