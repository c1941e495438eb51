"A full disk, little memory, a lost process: one line, the right exit code, a run that says why it failed."

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from topoqa_nb.cli import main
from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import DemoPaths, write_tiny_dataset
from topoqa_nb.network.weights import read_checkpoint

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
SIZES = ["24k", "40k", "60k", "80k", "100k", "130k", "170k", "280k", "400k", "700k", "8m"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    demo = write_tiny_dataset(tmp_path_factory.mktemp("tiny") / "data", targets=3, decoys=4)
    open_store(demo.graph_dir)  # packed before anything is limited
    return demo


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    "Makes a disk of a size."
    place = tmp_path / "disk"

    def make(size: str) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if done.returncode:
            pytest.skip(f"a tmpfs may not be mounted here: {done.stderr.strip()}")
        return place

    yield make
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


def settings(demo: DemoPaths, **more: object) -> list[str]:
    values = {"paths.graph": demo.graph_dir, "num_epochs": 3, "model.hidden_dim": 8}
    values |= {key.replace("__", "."): value for key, value in more.items()}
    return [part for key, value in values.items() for part in ("--override", f"{key}={value}")]


def start(*arguments: object, limit: tuple[int, int] | None = None) -> subprocess.Popen:
    "A command, perhaps with a limit of the system."
    before = (lambda: resource.setrlimit(limit[0], (limit[1],) * 2)) if limit else None
    return subprocess.Popen(
        [sys.executable, "-m", "topoqa_nb.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before,
    )  # fmt: skip


def train(demo: DemoPaths, root: Path, limit: tuple[int, int] | None = None, **more: object):
    "Exit code and what was said on standard error."
    common = ["run", "--config", "config.yaml", "--run-name", "a", "--output-root", root]
    process = start(*common, *settings(demo, **more), limit=limit)
    _, err = process.communicate()
    return process.returncode, err


def check_failed(run: Path, err: str, *parts: str, noted: bool = True) -> None:
    "One line, the same reason in the metadata, the traceback in the log, and checkpoints that are whole."
    assert err.startswith("topoqa: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err
    assert ".tmp" not in err
    metadata = json.loads((run / "run_metadata.json").read_text())
    if noted:
        assert metadata["status"] == "failed"
        assert metadata["reason"] == "TrainingError: " + err.removeprefix("topoqa: error: ").strip()
        assert "Traceback" in (run / "logs" / "training.log").read_text()
    for file in (run / "model_checkpoints").iterdir():
        assert not file.name.startswith("."), file
        assert file.exists() and read_checkpoint(file), file
    assert metadata["checkpoints"]["best"] is None or (run / "model_checkpoints" / "best.ckpt").exists()


@linux
@pytest.mark.parametrize("size", SIZES)
def test_a_disk_that_is_too_small(size: str, small_disk, demo: DemoPaths):
    disk = small_disk(size)
    code, err = train(demo, disk / "runs")
    if size == SIZES[-1]:
        assert (code, err) == (0, "")
    else:
        assert code == 1
        parts = (f"{disk}/runs/a/", "found No space left on device", "free some space", "paths.save_dir")
        check_failed(disk / "runs" / "a", err, *parts, noted=size not in SIZES[:4])


@linux
def test_a_sweep_on_a_disk_that_is_too_small_says_how_each_run_ended(
    small_disk, tmp_path: Path, demo: DemoPaths
):
    manifest = tmp_path / "manifest.yaml"
    jobs = [{"name": name, "config": "config.yaml"} for name in "ab"]
    manifest.write_text(yaml.safe_dump({"jobs": jobs, "continue_on_error": True}))
    root = small_disk("40k") / "runs"
    process = start("batch", "--manifest", manifest, "--output-root", root, *settings(demo))
    out, err = process.communicate()
    assert (process.returncode, err) == (1, "")
    rows = [line for line in out.splitlines() if line.startswith(("a  ", "b  "))]
    assert len(rows) == 2 and all(" failed " in row and "No space left on device" in row for row in rows), out


@pytest.mark.parametrize("size", [2_000, 6_000, 40_000])
def test_a_limit_of_the_size_of_files(size: int, tmp_path: Path, demo: DemoPaths):
    code, err = train(demo, tmp_path / "runs", (resource.RLIMIT_FSIZE, size))
    if size == 2_000:  # not even the configuration
        assert code == 2
        assert err.count("\n") == 1 and "found File too large" in err, err
        assert not list((tmp_path / "runs").glob("*"))
    else:
        assert code == 1
        check_failed(tmp_path / "runs" / "a", err, "found File too large", "ulimit -f")


@linux
def test_little_memory(tmp_path: Path, demo: DemoPaths):
    "The limit is set when everything is imported, so that it says the same on every machine."
    arguments = ["run", "--config", "config.yaml", "--run-name", "a", "--output-root", str(tmp_path / "runs")]
    arguments += settings(demo, model__hidden_dim=1024)
    code = f"""
import resource, sys, psutil, topoqa_nb.training.training
from topoqa_nb.cli import main
limit = psutil.Process().memory_info().vms + 150_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main({arguments!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    check_failed(tmp_path / "runs" / "a", done.stderr, "memory: expected", "batch_size", "num_workers")


@linux
@pytest.mark.parametrize("signum", [9, 15])
def test_a_loader_process_that_is_killed(signum: int, tmp_path: Path, demo: DemoPaths):
    more = settings(demo, num_epochs=100_000, early_stopping__patience=100_000, dataloader__num_workers=2)
    process = start(
        "run", "--config", "config.yaml", "--run-name", "a", "--output-root", tmp_path / "runs", *more
    )
    assert any("Epoch 000 | train" in line for line in process.stdout)
    psutil.Process(process.pid).children()[0].send_signal(signum)
    _, err = process.communicate()
    assert process.returncode == 1, err
    check_failed(tmp_path / "runs" / "a", err, "dataloader.num_workers: expected", "DataLoader worker (pid")


def test_a_fault_of_the_program_is_in_the_log_of_the_run(
    tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fault(*arguments: object, **options: object) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr("topoqa_nb.training.training.fit", fault)
    common = ["run", "--config", "config.yaml", "--run-name", "a", "--output-root", str(tmp_path)]
    assert main([*common, *settings(demo)]) == 1
    for said in (capsys.readouterr().err, (tmp_path / "a" / "logs" / "training.log").read_text()):
        assert "Traceback" in said and "KeyError: 'no such thing'" in said
    assert json.loads((tmp_path / "a" / "run_metadata.json").read_text())["status"] == "failed"
