"""A run that was stopped and resumed, against one that never stopped; and what a resume refuses."""

import os
import shutil
import signal

import pytest
import torch
from conftest import PATIENCE
from test_training import run_once, start_slow_run

from topoqa_nb.data.dataset import open_data
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import CheckpointError, ConfigError, RunError, held
from topoqa_nb.ground.machine import this_process
from topoqa_nb.ground.signals import Interrupted
from topoqa_nb.network.weights import read_checkpoint
from topoqa_nb.runs.record import RunDirectory, read_metadata, update_metadata
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.training.module import TopoQAModule
from topoqa_nb.training.resume import resume


def weights(run):
    return read_checkpoint(run.checkpoints / "last.chkpt")["state_dict"]


def assert_equal_runs(one, other):
    assert one.metrics_file.read_bytes() == other.metrics_file.read_bytes()
    assert all(torch.equal(weights(one)[name], value) for name, value in weights(other).items())


@pytest.mark.parametrize("scheduler", ["reduce_on_plateau", "none"])
def test_resuming_from_last_continues_exactly(tiny, tmp_path, scheduler):
    "With a scheduler that acts in between, and early stopping that counts across the stop."
    settings = {"scheduler__type": scheduler, "scheduler__patience": 0, "early_stopping__patience": 3}
    whole = run_once(tiny, tmp_path / "a", trainer__num_epochs=9, **settings)
    part = run_once(tiny, tmp_path / "b", trainer__num_epochs=4, **settings)
    resume(part, checkpoint="last", overrides=["trainer.num_epochs=9"])
    assert_equal_runs(whole, part)
    assert read_metadata(part)["status"] == "completed"


def test_a_killed_run_resumes_as_if_it_had_not_been(tiny, tmp_path):
    process = start_slow_run(tiny, tmp_path)
    process.kill()
    process.join(PATIENCE)
    killed = RunDirectory(tmp_path / "slow")
    epochs = len(read_metrics(killed)) + 2
    resume(killed, checkpoint="last", overrides={"trainer.num_epochs": epochs})
    changes = {"trainer__num_epochs": epochs, "early_stopping__patience": 500}
    whole = run_once(tiny, tmp_path / "whole", **changes)
    assert_equal_runs(whole, killed)


def test_resuming_from_an_earlier_epoch_sets_the_later_ones_aside(tiny, tmp_path):
    run = run_once(tiny, tmp_path, trainer__num_epochs=6)
    before, files = (
        run.metrics_file.read_text(),
        sorted(path.name for path in run.checkpoints.glob("*epoch*")),
    )
    epochs = {name: read_checkpoint(run.checkpoints / name)["epoch"] for name in files}
    name, epoch = min(epochs.items(), key=lambda item: item[1])
    resume(run, checkpoint=run.checkpoints / name, overrides=["trainer.num_epochs=7"])
    assert run.metrics_file.read_text().startswith(before)
    assert read_metrics(run).epoch.tolist() == list(range(7))
    aside = {path.name for path in (run.path / "resumed" / "1").iterdir()}
    assert {other for other, later in epochs.items() if later > epoch} <= aside
    assert {"metrics.csv", "config.yaml", "last.chkpt"} <= aside
    entry = read_metadata(run)["resumes"][0]
    assert (entry["after_epoch"], entry["moved_to"]) == (epoch, "resumed/1")


def test_a_fine_tune_that_never_beat_its_parent_resumes_from_the_parent(tiny, tmp_path):
    parent = run_once(tiny, tmp_path, "parent", trainer__num_epochs=6)
    settings = {"resume_from": parent.checkpoints / "best.ckpt", "optimizer__learning_rate": 0.5}
    child = run_once(tiny, tmp_path, "child", trainer__num_epochs=2, **settings)
    assert (child.checkpoints / "best.ckpt").readlink().name.endswith("_epoch-01.chkpt")
    rows = child.metrics_file.read_text()
    resume(child, overrides=["trainer.num_epochs=3"])
    assert child.metrics_file.read_text().startswith(rows)
    assert read_metadata(child)["lineage"]["mode"] == "fine-tune"


def test_a_finished_run_needs_more_epochs(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    with pytest.raises(RunError, match="raise the number with --override trainer.num_epochs=N"):
        resume(run, checkpoint="last")
    assert read_metadata(run)["status"] == "completed"


def test_drift_is_named_field_by_field_and_can_be_accepted(tiny, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(tiny["paths.graph"], copy / "graph_data")
    for name in ("train.csv", "val.csv"):
        shutil.copy(tiny["paths.train_labels"].replace("train.csv", name), copy / name)
    paths = {"paths__graph": str(copy / "graph_data"), "paths__train_labels": str(copy / "train.csv"),
             "paths__val_labels": str(copy / "val.csv")}  # fmt: skip
    run = run_once(tiny, tmp_path / "runs", **paths)
    labels = (copy / "train.csv").read_text().splitlines()
    (copy / "train.csv").write_text("\n".join(labels[:-1]) + "\n")
    longer = ["trainer.num_epochs=4"]
    with pytest.raises(ConfigError, match=r"data: fingerprint .*accept-drift"):
        resume(run, checkpoint="last", overrides=longer)
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.005 in the run, 0.1 now"):
        resume(run, checkpoint="last", overrides=[*longer, "optimizer.learning_rate=0.1"])
    assert len(read_metrics(run)) == 2
    resume(run, checkpoint="last", overrides=longer, accept_drift=True)
    assert read_metadata(run)["resumes"][0]["drift"]
    assert len(read_metrics(run)) == 4


def test_workers_logging_and_length_are_no_drift(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    resume(
        run,
        checkpoint="last",
        overrides=["trainer.num_epochs=3", "logging.log_lr=true", "trainer.limit_val_batches=1"],
    )
    assert "lr=" in run.console_file.read_text().splitlines()[-2]


def test_a_run_that_is_running_is_left_alone(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    update_metadata(run, status="running", environment={"process": this_process()})
    with pytest.raises(RunError, match="a run that has ended"):
        resume(run, overrides=["trainer.num_epochs=9"])


def test_a_run_without_the_wanted_checkpoint_says_so(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    with pytest.raises(CheckpointError, match="use best, last, or a file"):
        resume(run, checkpoint=tmp_path / "absent.chkpt", overrides=["trainer.num_epochs=9"])
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    with pytest.raises(CheckpointError):
        resume(run, overrides=["trainer.num_epochs=9"])


def damaged(run, text):
    run.metrics_file.write_text(text)
    return run.metrics_file.read_bytes(), read_metadata(run)


@pytest.mark.parametrize("damage", ["half-written", "a row gone"])
def test_damaged_metrics_are_refused_before_anything_changes(tiny, tmp_path, damage):
    run = run_once(tiny, tmp_path, trainer__num_epochs=3)
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    broken = "".join(lines)[:-9] if damage == "half-written" else "".join(lines[:2] + lines[3:])
    before = damaged(run, broken)
    expected = "a whole last line" if damage == "half-written" else "none for epoch 1"
    with pytest.raises(RunError, match=expected):
        resume(run, checkpoint="last", overrides=["trainer.num_epochs=5"])
    assert (run.metrics_file.read_bytes(), read_metadata(run)) == before


def test_another_runs_checkpoint_is_refused(tiny, tmp_path):
    one, other = (run_once(tiny, tmp_path, name) for name in ("one", "other"))
    longer = ["trainer.num_epochs=4"]
    with pytest.raises(
        CheckpointError, match="expected a checkpoint of the run one, found one of another run"
    ):
        resume(one, checkpoint=other.checkpoints / "last.chkpt", overrides=longer)
    copied = shutil.copy(other.checkpoints / "last.chkpt", one.checkpoints / "mine.chkpt")
    with pytest.raises(CheckpointError, match="found one of another run"):
        resume(one, checkpoint=copied, overrides=longer)
    assert len(read_metrics(one)) == 2
    elsewhere = shutil.copy(one.checkpoints / "last.chkpt", tmp_path / "elsewhere.chkpt")
    resume(one, checkpoint=elsewhere, overrides=longer)
    assert len(read_metrics(one)) == 4


def test_checkpoints_of_earlier_versions_are_known_by_their_place(tiny, tmp_path):
    run, other = (run_once(tiny, tmp_path, name) for name in ("run", "other"))
    for each in (run, other):
        content = read_checkpoint(each.checkpoints / "last.chkpt")
        del content["run_identity"]
        torch.save(content, each.checkpoints / "last.chkpt")
    with pytest.raises(CheckpointError, match="found one of another run"):
        resume(run, checkpoint=other.checkpoints / "last.chkpt", overrides=["trainer.num_epochs=3"])
    resume(run, checkpoint="last", overrides=["trainer.num_epochs=3"])
    assert len(read_metrics(run)) == 3


def test_two_resumes_of_one_run_do_not_mix(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    before = run.metrics_file.read_bytes(), read_metadata(run)
    with held(run.path), pytest.raises(RunError, match="found one that another process is writing to"):
        resume(run, checkpoint="last", overrides=["trainer.num_epochs=4"])
    assert (run.metrics_file.read_bytes(), read_metadata(run)) == before


def test_a_graph_changed_at_equal_size_and_time_is_drift(tiny, tmp_path):
    copy = tmp_path / "graph_data"
    shutil.copytree(tiny["paths.graph"], copy)
    run = run_once(tiny, tmp_path / "runs", paths__graph=str(copy))
    file = next(iter(sorted(copy.rglob("*.pt"))))
    before, graph = file.stat(), torch.load(file, weights_only=False)
    graph.x = graph.x + 0.25
    torch.save(graph, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(ConfigError, match="data: fingerprint"):
        resume(run, checkpoint="last", overrides=["trainer.num_epochs=3"])


def test_a_fingerprint_of_an_earlier_version_is_still_known(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    update_metadata(run, data={"fingerprint": open_data(load_config(run.config_file).config).fingerprints[1]})
    resume(run, checkpoint="last", overrides=["trainer.num_epochs=3"])
    assert len(read_metrics(run)) == 3


@pytest.mark.parametrize("damage", ["removed", "edited"])
def test_metrics_lost_on_the_way_are_put_back(tiny, tmp_path, damage, monkeypatch):
    whole = run_once(tiny, tmp_path / "whole", trainer__num_epochs=4)
    start = TopoQAModule.on_train_epoch_start

    def damaging(self):
        file = tmp_path / "run" / "metrics" / "metrics.csv"
        if self.current_epoch == 2:
            file.unlink() if damage == "removed" else file.write_text("mine\n")
        start(self)

    monkeypatch.setattr(TopoQAModule, "on_train_epoch_start", damaging)
    run = run_once(tiny, tmp_path, trainer__num_epochs=4)
    assert run.metrics_file.read_bytes() == whole.metrics_file.read_bytes()
    assert "its rows were put back" in run.console_file.read_text()
    found = run.metrics_file.with_name("found_before_epoch002.csv")
    assert found.exists() is (damage == "edited") and (not found.exists() or found.read_text() == "mine\n")


def test_a_run_of_another_host_needs_force(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    update_metadata(run, status="running", environment={"process": this_process() | {"host": "far-away"}})
    longer = ["trainer.num_epochs=3"]
    with pytest.raises(RunError, match="started on far-away, whose processes .* add --force"):
        resume(run, checkpoint="last", overrides=longer)
    resume(run, checkpoint="last", overrides=longer, force=True)
    assert len(read_metrics(run)) == 3
    update_metadata(run, status="running", environment={"process": this_process()})
    with pytest.raises(RunError, match="found one that is training"):
        resume(run, checkpoint="last", overrides=["trainer.num_epochs=4"], force=True)


def test_an_early_stopped_run_has_no_epoch_left(tiny, tmp_path):
    settings = {"early_stopping__patience": 1, "trainer__num_epochs": 40, "optimizer__learning_rate": 0.1}
    run = run_once(tiny, tmp_path, **settings)
    epochs = len(read_metrics(run))
    assert epochs < 40
    with pytest.raises(RunError, match="before early stopping .early_stopping.patience 1.*accept-drift"):
        resume(run, checkpoint="last")
    assert len(read_metrics(run)) == epochs
    more = ["early_stopping.patience=2", f"trainer.num_epochs={epochs + 2}"]
    resume(run, checkpoint="last", overrides=more, accept_drift=True)
    assert len(read_metrics(run)) > epochs


def test_a_run_killed_after_its_last_epoch_is_finished_not_trained(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    rows = run.metrics_file.read_bytes()
    update_metadata(run, status="interrupted", completed=None)
    resume(run, checkpoint="last")
    assert (run.metrics_file.read_bytes(), read_metadata(run)["status"]) == (rows, "completed")
    assert "Every epoch was trained" in run.console_file.read_text()


def test_an_interrupt_before_the_first_checkpoint_names_no_file(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TopoQAModule, "on_train_epoch_start", lambda module: signal.raise_signal(signal.SIGINT))
        run_once(tiny, tmp_path)
    run = RunDirectory(tmp_path / "run")
    last = run.console_file.read_text().splitlines()[-1]
    assert last.startswith("Interrupted. No epoch was complete. Continue with: topoqa resume --run-dir ")
    whole = run_once(tiny, tmp_path / "whole")
    resume(run, checkpoint="last")
    assert_equal_runs(whole, run)
