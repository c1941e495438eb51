"""Whole training runs: stops, kills, accumulation, schema of another build. What a page cannot show."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import PATIENCE, forked, in_turn, until

from topoqa_nb.data.dataset import open_data
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import CheckpointError, ConfigError, DataError, TrainingError
from topoqa_nb.ground.signals import Interrupted
from topoqa_nb.network.metrics import spearman
from topoqa_nb.network.model import build_model
from topoqa_nb.network.weights import read_checkpoint
from topoqa_nb.runs.leaderboard import summarise
from topoqa_nb.runs.monitor import change_line, snapshot
from topoqa_nb.runs.record import RunDirectory, read_metadata, read_record
from topoqa_nb.runs.runs import METRIC_COLUMNS, read_metrics
from topoqa_nb.runs.selection import METRICS, as_loss, other_metric, parse_checkpoint_name
from topoqa_nb.training.module import TopoQAModule, predict_split
from topoqa_nb.training.resume import resume
from topoqa_nb.training.training import train
from topoqa_nb.training.validation import check_batch_limits


def run_once(tiny, folder, name="run", resume_from=None, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    loaded = load_config(None, tiny | {"paths.save_dir": str(folder)} | changes)
    return train(loaded, run_name=name, parent=resume_from)


def test_a_run_leaves_what_the_contract_names(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    expected = {
        "config/original_config.yaml", "config/config.yaml", "config/applied_overrides.yaml", "run_metadata.json",
        "feature_metadata.json", "dataset_coverage.json", "metrics/metrics.csv", "logs/training.log",
        "logs/training_console.log", "model_checkpoints/last.chkpt", "model_checkpoints/best.ckpt",
        "model_checkpoints/second_best.ckpt", "model_checkpoints/val_loss_best.ckpt",
    }  # fmt: skip
    found = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    assert expected <= found
    assert list(pd.read_csv(run.metrics_file).columns) == list(METRIC_COLUMNS)
    assert [read_metadata(run)[name] for name in ("status", "ending")] == ["completed", "all 2 epochs"]
    assert (tmp_path / "latest").resolve() == run.path.resolve()


def test_a_run_can_be_repeated_from_its_own_directory(tiny, tmp_path):
    first = run_once(tiny, tmp_path / "a")
    again = train(load_config(first.config_file), run_name="again", output_root=tmp_path / "b")
    assert first.metrics_file.read_bytes() == again.metrics_file.read_bytes()


def test_fast_dev_run_is_one_epoch_of_one_batch_with_checkpoints(tiny, tmp_path):
    run = run_once(tiny, tmp_path, trainer__fast_dev_run=True)
    metrics = read_metrics(run)
    assert len(metrics) == 1
    assert metrics.step.tolist() == [1]
    assert (run.checkpoints / "best.ckpt").exists()


@pytest.mark.parametrize("primary", METRICS)
def test_best_checkpoint_follows_the_primary_metric(tiny, tmp_path, primary):
    run = run_once(tiny, tmp_path, trainer__num_epochs=4, selection__primary_metric=primary)
    metrics = read_metrics(run)
    order = metrics.assign(judged=metrics[primary].map(lambda value: as_loss(value, primary)))
    best = order.sort_values(["judged", "val_loss", "epoch"]).epoch.iloc[0]
    checkpoint = run.checkpoints / "best.ckpt"
    assert read_checkpoint(checkpoint)["epoch"] == best == read_metadata(run)["selection"]["best_epoch"]
    other = other_metric(primary)
    assert read_checkpoint(run.checkpoints / f"{other}_best.ckpt")["epoch"] == metrics[other].idxmin()
    score = read_metadata(run)["selection"]["best_score"]
    assert score == metrics[primary][best]
    named = parse_checkpoint_name(checkpoint.resolve().name)
    assert named.value(primary) == pytest.approx(score, abs=1e-5)


def test_a_fine_tune_and_a_resume_keep_to_a_metric_of_which_more_is_better(tiny, tmp_path):
    by = {"selection__primary_metric": "val_pearson_corr"}
    parent = run_once(tiny, tmp_path, "parent", trainer__num_epochs=3, **by)
    best = read_metadata(parent)["selection"]["best_score"]
    start = parent.checkpoints / "best.ckpt"
    child = run_once(tiny, tmp_path, "child", start, optimizer__learning_rate=1e-9, **by)
    story = read_metadata(child)
    assert story["lineage"]["parent_score"]["val_pearson_corr"] == pytest.approx(best, abs=1e-6)
    assert story["selection"]["best_score"] >= story["lineage"]["parent_score"]["val_pearson_corr"]

    stopped = run_once(tiny, tmp_path, "stopped", trainer__num_epochs=6, early_stopping__patience=1, **by)
    scores = read_metrics(stopped).val_pearson_corr.tolist()
    fallen = [epoch for epoch in range(1, len(scores)) if scores[epoch] <= max(scores[:epoch])]
    assert fallen == ([] if len(scores) == 6 and scores[-1] > max(scores[:-1]) else [len(scores) - 1])

    whole = run_once(tiny, tmp_path, "whole", trainer__num_epochs=5, **by)
    resume(parent, checkpoint="last", overrides={"trainer.num_epochs": 5})
    assert parent.metrics_file.read_bytes() == whole.metrics_file.read_bytes()
    names = [sorted(path.name for path in run.checkpoints.iterdir()) for run in (parent, whole)]
    assert names[0] == names[1]
    changed = {"selection.primary_metric": "val_loss", "trainer.num_epochs": 6}
    with pytest.raises(ConfigError, match="the metric by which its checkpoints are ranked"):
        resume(parent, checkpoint="last", overrides=changed, accept_drift=True)


@in_turn("metric", ["val_ranking_loss", "val_target_spearman"])
def test_a_metric_that_no_epoch_can_have_leaves_no_run(tiny, tmp_path, metric):
    labels = pd.read_csv(tiny["paths.val_labels"])
    labels.head(1).to_csv(tmp_path / "one.csv", index=False)
    changes = {"paths__val_labels": str(tmp_path / "one.csv"), "selection__primary_metric": metric}
    with pytest.raises(ConfigError, match=f"targets of two decoys for {metric}"):
        run_once(tiny, tmp_path / "runs", **changes)
    assert not (tmp_path / "runs").exists()


def test_the_last_accumulation_window_is_a_mean_over_itself(tiny, tmp_path):
    "One epoch of Adam steps by hand, batch by batch, with windows of 3 and 1 batches, gives the same weights."
    window_of_three = {"trainer__accumulate_grad_batches": 3, "model__dropout": 0.0}
    run = run_once(tiny, tmp_path, trainer__num_epochs=1, trainer__precision=64, **window_of_three)
    config = load_config(run.config_file).config
    data = open_data(config)
    from topoqa_nb.data.batches import make_loader

    torch.manual_seed(config.dataloader.seed)
    model = build_model(data.schema, config.model).train().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.learning_rate)
    loader = make_loader(data.train, batch_size=2, shuffle=True, seed=config.dataloader.seed)
    batches = [batch.apply(lambda x: x.double() if x.is_floating_point() else x) for batch in loader]
    assert len(batches) % 3, "the case needs a short last window"
    for start in range(0, len(batches), 3):
        window = batches[start : start + 3]
        optimizer.zero_grad()
        for batch in window:
            (F.mse_loss(model(batch), batch.y) / len(window)).backward()
        optimizer.step()
    saved = read_checkpoint(run.checkpoints / "last.chkpt")["state_dict"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[f"model.{name}"], value, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_loads_weights_only_and_describes_itself(tiny, tmp_path):
    run = run_once(tiny, tmp_path)
    content = torch.load(run.checkpoints / "best.ckpt", weights_only=True)
    assert {"state_dict", "feature_metadata", "config", "rng", "epoch_row"} <= set(content)
    assert content["config"]["model"]["hidden_dim"] == 8


def test_fine_tune_keeps_nothing_of_its_parent_but_the_weights(tiny, tmp_path):
    parent = run_once(tiny, tmp_path, "parent", trainer__num_epochs=6, optimizer__learning_rate=0.02)
    best = parent.checkpoints / "best.ckpt"
    child = run_once(
        tiny, tmp_path, "child", resume_from=best, optimizer__learning_rate=1e-3, trainer__num_epochs=3
    )
    assert read_metrics(child).learning_rate.tolist() == [1e-3] * 3
    assert read_metrics(child).epoch.tolist() == [0, 1, 2]
    score = read_metadata(child)["lineage"]["parent_score"]
    assert score["selection_metric"] == pytest.approx(read_metrics(parent).selection_metric.min(), abs=1e-6)


def test_a_child_that_is_its_parent_has_its_score_on_the_same_batches_and_data(tiny, tmp_path, monkeypatch):
    "With a limit on validation batches and without data of its own; at a rate of nothing no epoch is better."
    many = write_tiny_dataset(tmp_path / "many", targets=10, decoys=10)
    swapped = {"train_labels": many.val_labels, "val_labels": many.train_labels}  # two validation batches
    paths = {f"paths__{name}": str(path) for name, path in (swapped | {"graph": many.graph_dir}).items()}
    parent = run_once(tiny, tmp_path, "parent", trainer__num_epochs=1, **paths)
    monkeypatch.chdir(tmp_path)
    unnamed = {key: value for key, value in tiny.items() if not key.startswith("paths.")}
    limits = {"trainer__limit_val_batches": 1, "trainer__num_epochs": 1, "optimizer__learning_rate": 1e-12}
    best = parent.checkpoints / "best.ckpt"
    child = run_once(unnamed, tmp_path, "child", resume_from=best, **limits)
    known, (row,) = read_record(child), read_metrics(child).to_dict("records")
    assert row["val_loss"] == pytest.approx(known.lineage.parent_score["val_loss"], rel=1e-6)
    assert known.data.decoys == 64 and known.data.validation != read_record(parent).data.validation
    assert known.training_parameters.paths["val_labels"] == str(many.train_labels)
    assert not (tmp_path / "demo_data").exists()
    with pytest.raises(ConfigError, match="lies in no run that names them"):
        run_once(unnamed, tmp_path, "orphan", resume_from=shutil.copy(best, tmp_path / "alone.ckpt"))
    assert not (tmp_path / "orphan").exists() and not (tmp_path / "demo_data").exists()


def test_early_stopping_knows_the_parents_score(tiny, tmp_path):
    "A child that never beats its parent stops after `patience` epochs, not after patience + 1."
    parent = run_once(tiny, tmp_path, "parent", trainer__num_epochs=6)
    child = run_once(
        tiny, tmp_path, "child", resume_from=parent.checkpoints / "best.ckpt",
        optimizer__learning_rate=0.5, trainer__num_epochs=30, early_stopping__patience=3,
    )  # fmt: skip
    assert len(read_metrics(child)) == 3
    assert read_metadata(child)["lineage"]["improved_on_parent"] is False
    said = "early stopping after 3 of 30 epochs (early_stopping.patience 3)"
    assert [read_metadata(child)["ending"], summarise(child)["ending"]] == [said, said]
    rate = "optimizer.learning_rate"
    assert snapshot(child)["parameters"][rate] == snapshot(parent)["parameters"][rate] != 0.5
    assert said in change_line(snapshot(child))
    assert (child.checkpoints / "best.ckpt").readlink().name.endswith("_epoch-01.chkpt")


def test_another_build_trains_without_any_change(tiny, tmp_path):
    "Edge width 24, node width 52, no sidecar."
    wide = write_tiny_dataset(tmp_path / "wide", node_width=52, edge_width=24)
    run = run_once(
        tiny, tmp_path / "runs", paths__graph=str(wide.graph_dir),
        paths__train_labels=str(wide.train_labels), paths__val_labels=str(wide.val_labels),
    )  # fmt: skip
    content = read_checkpoint(run.checkpoints / "best.ckpt")["feature_metadata"]
    assert (content["edge_schema"]["dim"], content["node_schema"]["dim"]) == (24, 52)


@pytest.mark.parametrize("precision", ["64", "bf16-mixed"])
def test_other_precisions_train_on_the_cpu(tiny, tmp_path, precision):
    options = {"model__residual": True, "model__size_features": True}
    run = run_once(tiny, tmp_path, trainer__precision=precision, trainer__num_epochs=1, **options)
    assert np.isfinite(read_metrics(run).val_loss).all()


def test_a_loss_that_is_not_finite_names_epoch_and_batch(tiny, tmp_path):
    with pytest.raises(TrainingError, match=r"epoch 0, batch \d+: expected a finite loss"):
        run_once(tiny, tmp_path, "diverged", optimizer__learning_rate=1e30)
    metadata = read_metadata(RunDirectory(tmp_path / "diverged"))
    assert metadata["status"] == "failed"
    assert "finite loss" in metadata["reason"]


def test_a_validation_loss_that_is_not_finite_fails_the_run(tiny, tmp_path):
    "One batch an epoch: its loss is finite, the weights after its step are not."
    with pytest.raises(TrainingError, match="epoch 0, validation: expected a finite loss"):
        run_once(tiny, tmp_path, "diverged", optimizer__learning_rate=1e30, dataloader__batch_size=16)
    assert read_metadata(RunDirectory(tmp_path / "diverged"))["status"] == "failed"


def test_a_run_that_cannot_start_leaves_nothing(tiny, tmp_path):
    with pytest.raises(DataError):
        run_once(tiny, tmp_path / "runs", paths__train_labels=str(tmp_path / "absent.csv"))
    with pytest.raises(ConfigError, match="edge_schema.dim"):
        run_once(tiny, tmp_path / "runs", edge_schema__dim=99)
    assert not (tmp_path / "runs").exists()


# A slow training in a process of its own, to be stopped from outside.


def train_slowly(tiny, folder: Path, changes: dict[str, object]) -> None:
    "As a process; it ends as the command line would."
    step = TopoQAModule.training_step
    TopoQAModule.training_step = lambda self, *batch: (time.sleep(0.03), step(self, *batch))[1]
    try:
        run_once(tiny, folder, "slow", trainer__num_epochs=500, early_stopping__patience=500, **changes)
    except Interrupted as stop:
        sys.exit(128 + stop.signum)


def epochs_of(folder: Path) -> int:
    metrics = folder / "slow" / "metrics" / "metrics.csv"
    return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0


def wait_for_epochs(process: ForkProcess, folder: Path, epochs: int) -> None:
    until(lambda: epochs_of(folder) >= epochs or not process.is_alive())
    assert process.is_alive(), "the run ended by itself"


def start_slow_run(tiny, folder: Path, **changes: object) -> ForkProcess:
    "Start it and wait until two epochs are recorded."
    process = forked(train_slowly, tiny, folder, changes)
    wait_for_epochs(process, folder, 2)
    return process


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "interrupted"), (signal.SIGKILL, "running")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_stopped_run_keeps_its_best_checkpoint(tiny, tmp_path, signum, status):
    process = start_slow_run(tiny, tmp_path)
    os.kill(process.pid, signum)
    process.join(PATIENCE)
    assert process.exitcode == (-9 if signum == signal.SIGKILL else 128 + signum)
    run = RunDirectory(tmp_path / "slow")
    assert read_metadata(run)["status"] == status
    metrics = read_metrics(run)
    assert metrics.epoch.tolist() == list(range(len(metrics)))
    last = read_checkpoint(run.checkpoints / "last.chkpt")["epoch"]
    assert last in (len(metrics) - 1, len(metrics) - 2), (
        "the row of an epoch is written before its checkpoint"
    )
    best = read_checkpoint(run.checkpoints / "best.ckpt")
    saved = metrics[metrics.epoch <= max(last, best["epoch"])]  # the best one is written before the last one
    assert best["epoch_row"]["selection_metric"] == pytest.approx(saved.selection_metric.min())
    assert not list(run.path.rglob("*.tmp")) or signum == signal.SIGKILL


def test_a_run_stops_on_the_signals_that_it_chose(tiny, tmp_path):
    process = start_slow_run(tiny, tmp_path, trainer__stop_signals=["SIGUSR1"])
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        os.kill(process.pid, signum)
    wait_for_epochs(process, tmp_path, epochs_of(tmp_path) + 2)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(PATIENCE)
    assert process.exitcode == 128 + signal.SIGUSR1
    record = read_record(tmp_path / "slow")
    assert (record.status, record.reason) == ("interrupted", "stopped by SIGUSR1")
    assert read_checkpoint(tmp_path / "slow/model_checkpoints/last.chkpt")["epoch"] >= 2


# Is there something to learn, and is it learnt?


def demo_spearman(demo_set, train_labels, folder):
    changes = {
        "paths.graph": demo_set.graph_dir, "paths.train_labels": train_labels, "paths.val_labels": demo_set.val_labels,
        "paths.save_dir": folder, "trainer.num_epochs": 12, "trainer.accumulate_grad_batches": 1,
    }  # fmt: skip
    run = train(load_config("config.yaml", changes), run_name="run")
    config = load_config(run.config_file).config
    val = open_data(config).val
    last = predict_split(run.checkpoints / "last.chkpt", val)
    return spearman(last, val.dockq.numpy())


def test_the_demo_is_learnt_and_shuffled_labels_are_not(demo_set, tmp_path):
    "Judged by the last epoch: the best of many epochs would flatter a model that learnt nothing."
    assert demo_spearman(demo_set, demo_set.train_labels, tmp_path / "true") > 0.5
    table, shuffled = pd.read_csv(demo_set.train_labels), []
    for seed in range(4):  # six validation targets scatter, with a standard deviation of 0.20 to 0.24
        labels = table.assign(dockq=np.random.default_rng(seed).permutation(table["dockq"]))
        labels.to_csv(tmp_path / f"shuffled_{seed}.csv", index=False)
        shuffled.append(
            demo_spearman(demo_set, tmp_path / f"shuffled_{seed}.csv", tmp_path / f"false_{seed}")
        )
    assert abs(np.mean(shuffled)) < 0.3, shuffled  # more than two standard errors of the mean of four


# Values that no training can use, refused before there is a run.


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("trainer.limit_val_batches", 0.25, "0.25 of 1, which hold 64 graphs each; write a number of batches (1 to 1), a fraction from 1, or null"),
        ("trainer.limit_train_batches", 0.001, "0.001 of 4, which hold 2 graphs each; write a number of batches (1 to 4), a fraction from 0.25"),
        ("trainer.strategy", "foo", "trainer.strategy: expected auto or ddp, found foo"),
        ("trainer.devices", 2, "trainer.devices: expected 1 or auto without trainer.strategy=ddp, found 2; set trainer.devices=1, or trainer.strategy=ddp"),
    ],
)  # fmt: skip
def test_what_lightning_would_refuse_leaves_no_run(tiny, tmp_path, key, value, says):
    with pytest.raises(ConfigError) as caught:
        run_once(tiny, tmp_path / "runs", **{key: value})
    assert says in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_variables_of_a_scheduler_change_nothing(tiny, tmp_path):
    "The third of several tasks, as Slurm and torchrun would say it; nobody asked for several processes."
    slurm = {"JOB_ID": "1", "NTASKS": "8", "JOB_NAME": "sweep", "PROCID": "2", "LOCALID": "2", "NODEID": "1"}
    elastic = {
        "RANK": "2",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "8",
        "GROUP_RANK": "1",
        "TORCHELASTIC_RUN_ID": "a",
    }
    variables = {f"SLURM_{name}": value for name, value in slurm.items()} | elastic | {"NODE_RANK": "1"}
    plain = run_once(tiny, tmp_path, "plain")
    overrides = [
        part
        for key, value in (tiny | {"paths.save_dir": tmp_path}).items()
        for part in ("--override", f"{key}={value}")
    ]
    command = [sys.executable, "-m", "topoqa_nb.cli", "run", "--config", "config.yaml", "--run-name", "task"]
    done = subprocess.run(
        [*command, *overrides], env=os.environ | variables, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    task = RunDirectory(tmp_path / "task")
    assert task.metrics_file.read_bytes() == plain.metrics_file.read_bytes()
    assert sorted(path.name for path in task.checkpoints.iterdir()) == sorted(
        path.name for path in plain.checkpoints.iterdir()
    )


def test_a_fraction_that_leaves_a_batch_trains(tiny, tmp_path):
    run = run_once(tiny, tmp_path, trainer__limit_train_batches=0.25, trainer__limit_val_batches=1.0)
    assert read_metadata(run)["status"] == "completed"
    quick = run_once(tiny, tmp_path, "quick", trainer__limit_val_batches=0.25, trainer__fast_dev_run=True)
    assert read_metadata(quick)["status"] == "completed"


@in_turn("batches", [1, 2, 3, 7, 49, 125, 999, 1000, 4999])
def test_the_fraction_that_an_error_names_works(batches):
    told = {"dataloader.batch_size": 1, "trainer.fuse_batches": "off"}
    config = load_config(None, told | {"trainer.limit_train_batches": 1e-9}).config
    data = SimpleNamespace(train=range(batches), val=range(64))
    with pytest.raises(ConfigError) as caught:
        check_batch_limits(config, data)
    fraction = float(re.search(r"a fraction from ([\d.]+)", str(caught.value))[1])
    check_batch_limits(load_config(None, told | {"trainer.limit_train_batches": fraction}).config, data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parent_whose_weights_are_not_finite_leaves_no_run(tiny, tmp_path, value):
    first = run_once(tiny, tmp_path / "first")
    checkpoint = first.checkpoints / "last.chkpt"
    content = read_checkpoint(checkpoint)
    next(iter(content["state_dict"].values())).view(-1)[0] = value
    torch.save(content, checkpoint)
    with pytest.raises(
        CheckpointError, match="last.chkpt: expected finite weights, found NaN or infinity in "
    ):
        run_once(tiny, tmp_path / "second", resume_from=checkpoint)
    assert not (tmp_path / "second").exists()
    before = first.metadata_file.read_bytes()
    with pytest.raises(CheckpointError, match="expected finite weights"):
        resume(first, checkpoint="last", overrides=["num_epochs=4"])
    assert first.metadata_file.read_bytes() == before


def test_a_parent_whose_scores_overflow_leaves_no_run(tiny, tmp_path):
    checkpoint = run_once(tiny, tmp_path / "first").checkpoints / "last.chkpt"
    content = read_checkpoint(checkpoint)
    for weights in content["state_dict"].values():
        weights.fill_(3e38)
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match="expected finite scores of the validation split"):
        run_once(tiny, tmp_path / "second", resume_from=checkpoint)
    assert not (tmp_path / "second").exists()


def test_the_largest_numbers_train_or_are_one_line(tiny, tmp_path):
    "At the limits of the configuration nothing overflows inside of torch or Lightning."
    large = {
        "optimizer.weight_decay": 1e30, "selection.spearman_weight": 1e30, "early_stopping.min_delta": 1e30,
        "trainer.gradient_clip_val": 1e30, "dataloader.batch_size": 2**32 - 1, "early_stopping.patience": 2**32 - 1,
        "trainer.accumulate_grad_batches": 2**32 - 1, "scheduler.patience": 2**32 - 1,
        "logging.log_every_n_steps": 2**32 - 1,
    }  # fmt: skip
    assert read_metadata(run_once(tiny, tmp_path, "large", **large))["status"] == "completed"
    with pytest.raises(TrainingError, match="expected a finite loss"):
        run_once(tiny, tmp_path, "rate", optimizer__learning_rate=1e30)
