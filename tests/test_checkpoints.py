"""Where checkpoints land, what happens when they cannot, and in which mode a network trains."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import run_once

from topoqa_nb.ground.core import CheckpointError
from topoqa_nb.network.weights import read_checkpoint
from topoqa_nb.runs.record import RunDirectory, read_metadata
from topoqa_nb.training.callbacks import LocalCheckpoints
from topoqa_nb.training.module import TopoQAModule
from topoqa_nb.training.resume import resume


def started(tiny, place: Path, way: str, dropout: float) -> RunDirectory:
    "A training that began in one of the four ways."
    settings = {"model__dropout": dropout, "trainer__num_epochs": 2}
    if "fine-tune" in way:
        parent = run_once(tiny, place / "parents", trainer__num_epochs=1)
        settings["resume_from"] = parent.checkpoints / "best.ckpt"
    if "resumed" not in way:
        return run_once(tiny, place, **settings)
    run = run_once(tiny, place, **settings | {"trainer__num_epochs": 1})
    return resume(run, checkpoint="last", overrides=["trainer.num_epochs=2"])


@pytest.mark.parametrize("way", ["fresh", "fine-tune", "resumed", "resumed fine-tune"])
def test_every_way_to_start_trains_with_dropout(tiny, tmp_path, way, monkeypatch):
    step, modes = TopoQAModule.training_step, set()

    def noting_modes(self, *arguments):
        modes.update(module.training for module in self.modules())
        return step(self, *arguments)

    monkeypatch.setattr(TopoQAModule, "training_step", noting_modes)
    runs = [started(tiny, tmp_path / str(dropout), way, dropout) for dropout in (0.0, 0.25, 0.9)]
    assert modes == {True}
    rows = {run.metrics_file.read_text().splitlines()[-1] for run in runs}
    assert len(rows) == 3, "dropout changes nothing"
    assert not any("in eval mode" in run.log_file.read_text() for run in runs)


@pytest.mark.parametrize("where", ["run name", "run root"])
def test_double_colons_in_names_are_not_urls(tiny, tmp_path, where, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").write_text("untouched")
    name, root = ("a::file:outside", "runs") if where == "run name" else ("run", "ru::ns")
    run = run_once(tiny, tmp_path / root, name)
    assert read_checkpoint(run.checkpoints / "best.ckpt")["state_dict"]
    assert (tmp_path / "outside").read_text() == "untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["outside", root])
    resume(run, checkpoint="last", overrides=["trainer.num_epochs=3"])
    assert read_checkpoint(run.checkpoints / "last.chkpt")["epoch"] == 2


def test_checkpoints_need_no_temporary_folder(tiny, tmp_path, monkeypatch):
    "It is lost after the network was made, which needs it."
    start = TopoQAModule.on_train_epoch_start

    def losing(self):
        monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
        start(self)

    monkeypatch.setattr(TopoQAModule, "on_train_epoch_start", losing)
    run = run_once(tiny, tmp_path / "runs")
    assert read_checkpoint(run.checkpoints / "last.chkpt")["epoch"] == 1


def kept(run: RunDirectory) -> dict[str, int]:
    "Epoch of every file; all of them can be read."
    return {path.name: read_checkpoint(path)["epoch"] for path in run.checkpoints.glob("*.chkpt")}


def test_a_checkpoint_that_is_written_in_part_replaces_nothing(tiny, tmp_path, monkeypatch):
    "The disk loses what is written from the third epoch on."
    write = Path.write_bytes

    def lossy(place, content):
        epoch = torch.load(io.BytesIO(content))["epoch"] if ".chkpt" in place.name else 0
        return write(place, content[:1000] if epoch > 1 else content)

    monkeypatch.setattr(Path, "write_bytes", lossy)
    with pytest.raises(CheckpointError, match="expected the bytes that were written, found others"):
        run_once(tiny, tmp_path, trainer__num_epochs=5)
    monkeypatch.undo()
    run = RunDirectory(tmp_path / "run")
    assert read_metadata(run)["status"] == "failed"
    assert sorted(kept(run).values()) == [0, 1, 1]
    assert not list(run.path.rglob("*.tmp"))


LIMITED = """
import resource, signal, sys
from topoqa_nb.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def test_a_full_disk_loses_no_checkpoint_that_was_good(tiny, tmp_path):
    "A limit on the size of a file, below that of a checkpoint: the run goes on where its checkpoints fit."
    run = run_once(tiny, tmp_path, trainer__num_epochs=3)
    before = kept(run)
    size = min(path.stat().st_size for path in run.checkpoints.glob("*.chkpt"))
    command = [
        "resume",
        "--run-dir",
        str(run.path),
        "--checkpoint",
        "last",
        "--override",
        "trainer.num_epochs=6",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size - 1000), *command],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode != 0
    assert kept(run) == before
    resume(run, checkpoint="last")
    assert read_checkpoint(run.checkpoints / "last.chkpt")["epoch"] == 5


def test_a_written_checkpoint_is_whole_or_absent(tmp_path):
    place = tmp_path / "last.chkpt"
    LocalCheckpoints().save_checkpoint({"epoch": 1}, place)
    with pytest.raises(AttributeError):  # something that cannot be pickled
        LocalCheckpoints().save_checkpoint({"epoch": lambda: 2}, place)
    with pytest.raises(CheckpointError, match="a pickle that needs"):  # something that would not load
        LocalCheckpoints().save_checkpoint({"epoch": CheckpointError}, place)
    assert read_checkpoint(place) == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.chkpt"]
