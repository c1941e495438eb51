"""Every script of benchmarks/ runs; here on little data, for what it prints and not for how fast.

`make test` runs those whose parts the others share, `make test-faults` all of them (TOPOQA_BENCHMARKS=all).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
LITTLE = {
    "epoch": ["--graphs", "40", "--repeats", "1", "--epochs", "2", "--sizes", "real"],
    "gpu": [
        "--graphs",
        "40",
        "--repeats",
        "1",
        "--epochs",
        "1",
        "--sizes",
        "real",
        "--accelerator",
        "cpu",
        "--precision",
        "32",
    ],
    "start": ["--graphs", "40", "--repeats", "1"],
    "sweep": ["--graphs", "40", "--repeats", "1", "--epochs", "1", "--jobs", "1"],
    "growth": ["--graphs", "40"],
    "answer": [
        "--graphs",
        "40",
        "--epochs",
        "1",
        "--jobs",
        "1",
        "--bootstrap",
        "0",
        "--recipes",
        "recommended",
    ],
    "store": ["--graphs", "40", "--repeats", "1"],
    "predict": ["--graphs", "40", "--repeats", "1"],
    "build": ["--count", "4", "--processes", "1"],
    "scaling": [
        "--kinds",
        "build",
        "--workers",
        "1",
        "--structures",
        "2",
        "--graphs",
        "4",
        "--trainings",
        "1",
    ],
    "kernel": ["--graphs", "2", "--rounds", "1", "--nodes", "9", "--edges", "30"],
}
SAID = {
    "epoch": "differ by at most",
    "gpu": "together",
    "start": "of which the store",
    "sweep": "x the speed of the original's way",
    "growth": "peak memory: anonymous",
    "answer": "x the speed of the original's way",
    "store": "with sidecar",
    "predict": "graphs a second",
    "build": "ms a structure",
    "scaling": "ms a task",
    "kernel": "reference / kernel",
}
NOT_RUN = {
    "graphs",
    "measure",
    "original",
    "build_slowly",
}  # what the scripts share, and what needs packages that are no dependency


SHORT = ("epoch", "store", "kernel")  # what `make test` has the time for


@pytest.mark.parametrize("name", LITTLE)
def test_a_benchmark_runs(name: str, tmp_path: Path):
    if name not in SHORT and os.environ.get("TOPOQA_BENCHMARKS") != "all":
        pytest.skip("runs with `make test-faults`")
    command = [sys.executable, str(FOLDER / f"{name}.py"), *LITTLE[name]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAID[name] in done.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is left in the working directory"


def test_no_benchmark_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.py")} == LITTLE.keys() | NOT_RUN
