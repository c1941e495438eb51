"""How times are taken and printed."""

import contextlib
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import torch

from topoqa_nb.ground.machine import available_cores


def seconds(action: Callable[[], object]) -> float:
    "Wall-clock time of one call."
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median(action: Callable[[], object], repeats: int) -> float:
    "Median time of several calls (s)."
    return statistics.median(seconds(action) for _ in range(repeats))


def ratio_line(name: str, times: list[float], original: list[float]) -> str:
    "Median and range; for all but the original also the median of the ratios within a repeat."
    line = f"  {name:<9} median {statistics.median(times):7.3f} s ({min(times):.3f} to {max(times):.3f})"
    if times is original:
        return line
    ratios = [slow / fast for slow, fast in zip(original, times, strict=True)]
    return f"{line} | {statistics.median(ratios):.2f} x the speed of the original's way"


def peak_text(peak: dict[str, float]) -> str:
    "What `watched` saw at most, in MB."
    return f"peak memory: anonymous {peak['anonymous']:5.0f} MB, mapped {peak['mapped']:5.0f} MB"


def machine() -> str:
    "What the figures belong to."
    model = "unknown processor"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return (
        f"{model}, {available_cores()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    "Without the lines that a training prints."
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere):
            yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def timed(action: Callable[..., object], times: list[float]) -> Callable[..., object]:
    "The same action, which also notes how long it took."

    def run(*arguments: object, **options: object) -> object:
        start = time.perf_counter()
        try:
            return action(*arguments, **options)
        finally:
            times.append(time.perf_counter() - start)

    return run


SOURCES = {"anonymous": ("smaps_rollup", "Pss_Anon:"), "mapped": ("status", "RssFile:")}


def memory(process: psutil.Process, kind: str) -> float:
    "Memory of a process and its children; what forked processes share counts once (MB)."
    name, field = SOURCES[kind]
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(OSError):  # ended meanwhile
            lines = Path(f"/proc/{each.pid}/{name}").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith(field))
    return total * 1024 / 1e6


def watched(script: Sequence[str]) -> tuple[str, dict[str, float]]:  # its output, and MB by kind
    "Run a script in a process of its own, watched from outside for its highest memory."
    highest = dict.fromkeys(SOURCES, 0.0)
    process = subprocess.Popen([sys.executable, *script], stdout=subprocess.PIPE, text=True)
    seen = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            highest = {kind: max(value, memory(seen, kind)) for kind, value in highest.items()}
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(script)} failed")
    return process.stdout.read(), highest
