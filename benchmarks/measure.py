"""How times are taken and printed."""

import contextlib
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

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
