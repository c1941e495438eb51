"Nothing stays in the folder for temporary files, however a command ends."

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PATIENCE, in_turn, until

from topoqa_nb.data.tiny import DemoPaths
from topoqa_nb.runs.record import read_metadata

CACHE_OF_PYTORCH = "torchinductor_"  # one folder for a user, always of the same name


@pytest.fixture
def folder() -> Iterator[Path]:
    "A working folder with a short path: loader processes have sockets in its `tmp`."
    with tempfile.TemporaryDirectory(prefix="topoqa_") as name:
        yield Path(name)


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    "A command with a folder of its own for temporary files."
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a compiled module is a leftover, too
    return subprocess.Popen(
        [sys.executable, "-m", "topoqa_nb.cli", *map(str, arguments)],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def training(folder: Path, demo: DemoPaths, epochs: int, workers: int) -> subprocess.Popen:
    settings = {"paths.graph": demo.graph_dir, "num_epochs": epochs, "model.hidden_dim": 8}
    settings |= {"early_stopping.patience": epochs, "dataloader.num_workers": workers}
    overrides = [part for key, value in settings.items() for part in ("--override", f"{key}={value}")]
    return start(folder, "run", "--config", "config.yaml", *overrides)


def left_in(folder: Path) -> list[str]:
    return [path.name for path in (folder / "tmp").iterdir() if not path.name.startswith(CACHE_OF_PYTORCH)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_ends_leaves_nothing(folder: Path, demo: DemoPaths, workers: int):
    process = training(folder, demo, 2, workers)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert left_in(folder) == []


@pytest.mark.parametrize(
    "seconds, signum, send",
    [(0.0, signal.SIGTERM, os.kill), (0.13, signal.SIGTERM, os.killpg), (0.29, signal.SIGUSR1, os.killpg)],
)
def test_a_run_that_is_stopped_leaves_nothing(
    folder: Path, demo: DemoPaths, seconds: float, signum: int, send: Callable
):
    "A batch system sends its signals to all processes of a run, also to those that load."
    process = training(folder, demo, 100_000, workers=2)
    assert any("Epoch 000 | train" in line for line in process.stdout)
    time.sleep(seconds)  # somewhere in an epoch
    send(process.pid, signum)
    said, _ = process.communicate()
    assert process.returncode == 128 + signum
    assert "Traceback" not in said
    assert read_metadata(folder / "training_runs" / "latest")["status"] == "interrupted"
    assert left_in(folder) == []


def test_validate_leaves_nothing(folder: Path, demo: DemoPaths):
    process = start(folder, "validate", "--graph-dir", demo.graph_dir, "--labels", demo.train_labels)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert left_in(folder) == []


@pytest.mark.parametrize("line", ["sweep: running", " | started: "])
def test_a_pipeline_that_is_stopped_leaves_nothing(folder: Path, demo: DemoPaths, line: str):
    "Its kernels have connection files, which belong to the process that was to remove them."
    options = ["--fast-dev-run", "--graph-dir", demo.graph_dir, "--run-root", folder / "runs"]
    process = start(folder, "pipeline", *options)
    assert any(line in said for said in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert left_in(folder) == []


def test_a_folder_whose_sockets_loader_processes_could_not_use_is_refused(folder: Path, demo: DemoPaths):
    "PyTorch's loader would wait for ever."
    deep = folder / ("a" * 100)
    process = training(deep, demo, 2, workers=2)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert said.startswith("topoqa: error: TMPDIR: expected a folder for the sockets of loader processes")
    assert len(said.splitlines()) == 1
    assert not (deep / "training_runs").exists()
    assert left_in(deep) == []


def catches(number: int, signum: int) -> bool:
    "Has a process said what happens on a signal?"
    state = Path(f"/proc/{number}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", state)[1], 16) >> (signum - 1) & 1)


def stopped_after(seconds: float, signum: int, *arguments: object) -> tuple[int, str]:
    "Exit code and standard error of a command that gets a signal so early."
    process = subprocess.Popen(
        [sys.executable, "-m", "topoqa_nb.cli", *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    # Before that the interpreter has not come to us; SIGUSR2 is the last one that the command arranges for.
    until(lambda: process.poll() is not None or catches(process.pid, signal.SIGUSR2))
    time.sleep(seconds)
    process.send_signal(signum)
    _, said = process.communicate(timeout=PATIENCE)
    until(lambda: not is_group(process.pid))  # nothing that it started is left
    return process.returncode, said


def is_group(number: int) -> bool:
    "Whether there is a process of that group, be it one that nobody has waited for yet."
    with suppress(ProcessLookupError):
        os.killpg(number, 0)
        return True
    return False


@in_turn(
    "seconds, signum",
    [(0.0, signal.SIGTERM), (0.5, signal.SIGINT), (1.0, signal.SIGHUP), (1.5, signal.SIGUSR1)],
)
def test_a_signal_in_the_first_moments_is_one_line(
    seconds: float, signum: int, demo: DemoPaths, tmp_path: Path
):
    "Imports, reading, a server that has only just begun: no traceback, and no run that says it is running."
    settings = {"paths.graph": demo.graph_dir, "paths.save_dir": tmp_path, "num_epochs": 100_000}
    overrides = [part for key, value in settings.items() for part in ("--override", f"{key}={value}")]
    code, said = stopped_after(seconds, signum, "run", "--config", "config.yaml", *overrides)
    assert (code, said) == (128 + signum, f"topoqa: stopped by {signum.name}\n")
    metadata = list(tmp_path.glob("*/run_metadata.json"))
    assert all(read_metadata(file.parent)["status"] == "interrupted" for file in metadata)
    assert not list(tmp_path.rglob("*.tmp"))
