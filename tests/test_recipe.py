"""What a recipe may ask for beyond the defaults: stops in between, fine-tunes, and what hangs on the answer of a run."""

import signal

import pandas as pd
import pytest
import torch
from conftest import in_turn
from pytorch_lightning.callbacks import LambdaCallback
from test_resume import assert_equal_runs
from test_training import run_once

from topoqa_nb.answers.export import export
from topoqa_nb.answers.models import load_models, model_files
from topoqa_nb.cli import main
from topoqa_nb.data.dataset import open_data
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import CheckpointError, ConfigError, write_json
from topoqa_nb.ground.signals import Interrupted
from topoqa_nb.network.metrics import regression_metrics
from topoqa_nb.network.weights import read_checkpoint
from topoqa_nb.runs.leaderboard import by_config, leaderboard
from topoqa_nb.runs.record import RunDirectory, read_record
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.training.module import predict_split
from topoqa_nb.training.resume import resume
from topoqa_nb.training.training import train

RECIPE = {
    "model__residual": True, "model__size_features": True, "optimizer__type": "adamw", "optimizer__weight_decay": 0.01,
    "scheduler__type": "cosine", "scheduler__warmup_epochs": 2, "checkpoint__take": "last",
}  # fmt: skip


def dotted(changes):
    return {key.replace("__", "."): value for key, value in changes.items()}


def stopped(tiny, folder, after, **changes):
    "A run that is interrupted after an epoch was saved."

    def stop(trainer, module):
        if trainer.current_epoch == after:
            raise Interrupted(signal.SIGTERM)

    loaded = load_config(None, tiny | {"paths.save_dir": str(folder)} | dotted(changes))
    with pytest.raises(Interrupted):
        train(loaded, run_name="run", callbacks=[LambdaCallback(on_train_epoch_start=stop)])
    return RunDirectory(folder / "run")


@in_turn("average, epochs, after", [("none", 4, 1), ("ema", 3, 2), ("swa", 8, 7)])
def test_a_recipe_goes_on_exactly_where_it_stopped(tiny, tmp_path, average, epochs, after):
    "Before the warm-up ends, and, for the average of the last epochs, within them."
    settings = RECIPE | {
        "trainer__num_epochs": epochs,
        "trainer__average": average,
        "early_stopping__patience": 1,
    }
    whole = run_once(tiny, tmp_path / average / "whole", **settings)
    assert len(read_metrics(whole)) == epochs, "the last epoch is the answer, so every epoch is trained"
    run = stopped(tiny, tmp_path / average, after, **settings)
    resume(run, checkpoint="last")
    assert_equal_runs(whole, run)
    if average != "none":
        kept = read_checkpoint(whole.last_checkpoint)
        assert not torch.equal(
            *(kept[name]["model.score.weight"] for name in ("state_dict", "current_model_state"))
        )


@in_turn("average, epochs", [("ema", 3), ("swa", 8)])
def test_an_epoch_is_judged_by_the_weights_that_its_checkpoint_holds(tiny, tmp_path, average, epochs):
    run = run_once(tiny, tmp_path / average, trainer__num_epochs=epochs, trainer__average=average)
    plain = run_once(tiny, tmp_path / average, "plain", trainer__num_epochs=epochs)
    assert read_metrics(run).train_loss.equals(read_metrics(plain).train_loss), "averaging changes no step"
    data, table = open_data(load_config(run.config_file).config), read_metrics(run).set_index("epoch")
    for name in ("best.ckpt", "last.chkpt"):
        file = run.checkpoints / name
        found = regression_metrics(predict_split(file, data.val), data.val.dockq.double().numpy())
        assert found["val_loss"] == pytest.approx(table.val_loss[read_checkpoint(file)["epoch"]], abs=1e-7)


def test_the_last_epoch_is_the_answer_everywhere(tiny, tmp_path):
    "Links, record, leaderboard, prediction and the parent of a fine-tune speak of one epoch."
    run = run_once(
        tiny, tmp_path, trainer__num_epochs=5, checkpoint__take="last", selection__primary_metric="val_loss"
    )
    metrics, record = read_metrics(run), read_record(run)
    assert metrics.val_loss.idxmin() != 4, "or this would prove nothing"
    last = metrics.iloc[-1]
    assert (record.selection.epoch, record.selection.score) == (4, last.val_loss)
    assert read_checkpoint(run.checkpoints / "best.ckpt")["epoch"] == 4
    assert read_checkpoint(run.checkpoints / "second_best.ckpt")["epoch"] == metrics.val_loss.idxmin()
    assert (run.checkpoints / record.checkpoints.best).samefile(run.checkpoints / "best.ckpt")
    (row,) = leaderboard(tmp_path)
    assert (row["epoch"], row["score"]) == (4, last.val_loss)
    (file,) = model_files("run", tmp_path)
    assert read_checkpoint(file)["epoch"] == 4
    child = run_once(tiny, tmp_path, "child", file, trainer__num_epochs=1)
    assert read_record(child).lineage.parent_score["val_loss"] == pytest.approx(last.val_loss, abs=1e-6)


def test_a_fine_tune_whose_answer_is_its_last_epoch_says_when_that_is_worse(tiny, tmp_path):
    parent = run_once(tiny, tmp_path, "parent", trainer__num_epochs=4)
    settings = {"trainer__num_epochs": 2, "optimizer__learning_rate": 0.5, "checkpoint__take": "last"}
    child = run_once(tiny, tmp_path, "child", parent.checkpoints / "best.ckpt", **settings)
    record = read_record(child)
    assert record.selection.epoch == 1 and record.selection.score > record.score_to_beat
    assert record.lineage.improved_on_parent is False
    assert "no better than the parent" in child.console_file.read_text()


def test_sizes_are_measured_once_and_travel_with_the_weights(tiny, tmp_path):
    "The scale is that of the training graphs; a fine-tune on others keeps it, an exported model has it."
    options = {"model__residual": True, "model__size_features": True, "trainer__num_epochs": 1}
    run = run_once(tiny, tmp_path, **options)
    data, file = open_data(load_config(run.config_file).config), run.checkpoints / "best.ckpt"
    nodes = data.train.store.node_counts[data.train.index].double()
    mean = read_checkpoint(file)["state_dict"]["model.sizes.mean"]
    assert mean[0].item() == pytest.approx(nodes.log1p().mean().item(), abs=1e-6)
    other = write_tiny_dataset(tmp_path / "other", targets=3, decoys=5, seed=9)
    places = {"paths__graph": str(other.graph_dir), "paths__train_labels": str(other.train_labels),
              "paths__val_labels": str(other.val_labels)}  # fmt: skip
    child = run_once(tiny, tmp_path, "child", file, **options, **places)
    assert torch.equal(read_checkpoint(child.last_checkpoint)["state_dict"]["model.sizes.mean"], mean)
    (exported,) = export([file], tmp_path / "model.safetensors")
    (model,) = load_models([exported])
    assert torch.equal(model.network.sizes.mean, mean)
    with pytest.raises(CheckpointError, match="set model.residual=true"):
        run_once(tiny, tmp_path, "refused", file)
    assert not (tmp_path / "refused").exists()


def test_batches_that_go_together_see_their_own_sizes(tiny, tmp_path):
    settings = RECIPE | {
        "trainer__precision": 64,
        "trainer__accumulate_grad_batches": 4,
        "trainer__num_epochs": 3,
    }
    apart, together = (
        read_metrics(run_once(tiny, tmp_path, switch, trainer__fuse_batches=switch, **settings))
        for switch in ("off", "auto")
    )
    pd.testing.assert_frame_equal(apart, together, rtol=0, atol=1e-9)


def test_seeds_of_an_earlier_version_and_of_this_one_are_one_configuration(tiny, tmp_path):
    "What an earlier version did not write had its default."
    for seed in (1, 2):
        run = run_once(tiny, tmp_path, f"seed{seed}", dataloader__seed=seed, trainer__num_epochs=1)
    text = run.metadata_file.read_text()
    for name in ('"residual": false,', '"size_features": false'):
        assert name in text
    metadata = read_record(run).written
    parameters = {
        name: dict(keys) for name, keys in metadata["training_parameters"].items() if name != "checkpoint"
    }
    for section, key in (("model", "residual"), ("model", "size_features"), ("optimizer", "type")):
        del parameters[section][key]
    write_json(run.metadata_file, {**metadata, "training_parameters": parameters})
    (row,) = by_config(leaderboard(tmp_path))
    assert row["seeds"] == [1, 2]
    assert main(["leaderboard", "--by-config", "--run-root", str(tmp_path)]) == 0


def test_a_refit_is_marked_wherever_it_goes(tiny, tmp_path, capsys):
    "Not ranked, not continued; whoever predicts, evaluates, exports or fine-tunes is told."
    settings = RECIPE | {"trainer__num_epochs": 3, "trainer__average": "ema", "scheduler__warmup_epochs": 0}
    run = run_once(tiny, tmp_path, "chosen", **settings)
    assert main(["refit", "--run-dir", str(run.path)]) == 0
    again = RunDirectory(tmp_path / "chosen_refit")
    data, note = open_data(load_config(run.config_file).config), "no validation remains"
    nodes = torch.cat([split.store.node_counts[split.index] for split in (data.train, data.val)]).double()
    mean = read_checkpoint(again.last_checkpoint)["state_dict"]["model.sizes.mean"]
    assert mean[0].item() == pytest.approx(nodes.log1p().mean().item(), abs=1e-6)
    rows = {row["run_name"]: row for row in leaderboard(tmp_path)}
    assert (rows["chosen"]["rank"], rows["chosen_refit"]["rank"]) == (1, None)
    assert "nothing is left to judge it by" in rows["chosen_refit"]["reason"]
    graphs, labels = tiny["paths.graph"], tiny["paths.train_labels"]
    capsys.readouterr()
    out = tmp_path / "scores.csv"
    assert main(["predict", "--model", str(again.path), "--graph-dir", graphs, "--out", str(out)]) == 0
    assert note in capsys.readouterr().err and note in out.with_name("scores.csv.meta.json").read_text()
    judged = [
        "evaluate",
        "--model",
        str(again.path),
        "--graph-dir",
        graphs,
        "--labels",
        labels,
        "--bootstrap",
        "0",
    ]
    assert main(judged) == 0
    assert note in capsys.readouterr().err
    (exported,) = export([again.path], tmp_path / "model.safetensors")
    assert note in str(load_models([exported])[0].to_dict()["notes"])
    child = run_once(tiny, tmp_path, "child", again.checkpoints / "best.ckpt", trainer__num_epochs=1,
                     model__residual=True, model__size_features=True)  # fmt: skip
    assert note in child.console_file.read_text()
    assert main(["resume", "--run-dir", str(again.path), "--checkpoint", "last"]) == 2
    assert "a refit, which is not continued" in capsys.readouterr().err
    assert (
        main(["summarise", "--run-dir", str(again.path)])
        == main(["report", "--run-dir", str(again.path)])
        == 0
    )


@in_turn(
    "changes, says",
    [
        ({"scheduler__warmup_epochs": 1}, "scheduler.warmup_epochs.*0 with scheduler.type reduce_on_plateau"),
        ({"scheduler__type": "cosine", "scheduler__warmup_epochs": 2}, "fewer than the 2 epochs"),
        ({"checkpoint__take": "first"}, "checkpoint.take.*'best' or 'last'"),
        ({"trainer__average": "mean"}, "trainer.average.*'none', 'ema' or 'swa'"),
        ({"trainer__average_decay": 1}, "trainer.average_decay.*less than 1"),
        ({"optimizer__type": "sgd"}, "optimizer.type.*'adam' or 'adamw'"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_leaves_no_run(tiny, tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        run_once(tiny, tmp_path / "runs", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs" / "run").exists()


def test_the_plan_of_a_recipe_is_not_stretched_unasked(tiny, tmp_path):
    settings = {"scheduler__type": "cosine", "trainer__average": "swa", "trainer__num_epochs": 2}
    run = run_once(tiny, tmp_path, **settings)
    with pytest.raises(ConfigError, match="cosine schedule.*average of the last epochs"):
        resume(run, checkpoint="last", overrides=["trainer.num_epochs=3"])
