"""Run directories of the original stack, in every form that was found, through every reader."""

import json

import pytest
from conftest import in_turn
from original_stack import (
    CORRELATIONS,
    FLAT,
    LOSSES,
    SECTIONED,
    checkpoint_names,
    logger_rows,
    run_metadata,
    write_original_run,
)

from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import RunError, TopoqaError, write_json
from topoqa_nb.runs.leaderboard import best_file, leaderboard, summarise
from topoqa_nb.runs.monitor import change_line, snapshot
from topoqa_nb.runs.original import adopt, is_original, joined_epochs, metrics_files, read_table
from topoqa_nb.runs.record import RunDirectory, read_metadata, read_record, update_metadata
from topoqa_nb.runs.runs import METRIC_COLUMNS, archive, create_run, find_run, list_runs, read_metrics

BEST = LOSSES[4] - CORRELATIONS[4]  # of one epoch's values; the name says 0.060 - 0.68


@pytest.fixture
def root(tmp_path):
    return tmp_path / "training_runs"


def tree(folder):
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


# --- the forms


@pytest.mark.parametrize("config_file", ["config/config.yaml", "config.yaml"])
@pytest.mark.parametrize("config", [FLAT, SECTIONED], ids=["flat", "sectioned"])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_configuration_and_metadata_of_every_form(root, config_file, config, with_metadata):
    write_original_run(root / "old", config=config, config_file=config_file, with_metadata=with_metadata)
    summary = json.loads(json.dumps(summarise(find_run(root, "old")), allow_nan=False))
    assert summary["status"] == ("completed" if with_metadata else "unknown")
    assert summary["best"]["best_score"] == pytest.approx(BEST)
    assert summary["config"]["dataloader"]["seed"] == 222
    assert summary["config"]["optimizer"]["learning_rate"] == 0.005
    assert summary["progress"] == {"epochs_done": 6, "epochs": 260}
    assert summary["best_checkpoint"] == str(
        root / "old" / "model_checkpoints" / checkpoint_names("signed")[0]
    )


@pytest.mark.parametrize(
    "place",
    [
        "metrics.csv",
        "metrics/metrics.csv",
        "metrics/cpu_training_version_0.csv",
        "cpu_training/version_0/metrics.csv",
        "lightning_logs/version_3/metrics.csv",
        "logs/metrics.csv",
        "logs/csv/version_0/metrics.csv",
    ],
)
@in_turn("train", ["train_mse", "train_loss", "train_loss_epoch"])
def test_metrics_wherever_the_logger_put_them(root, place, train):
    write_original_run(root / train, metrics=(place,), rows=logger_rows(train))
    table = read_metrics(find_run(root, train))
    assert tuple(table.columns) == METRIC_COLUMNS
    assert table.epoch.tolist() == [0, 1, 2, 3, 4, 5]
    assert table.val_loss.tolist() == list(LOSSES)
    assert table.train_loss.tolist() == [0.9 * loss for loss in LOSSES]
    assert table.selection_metric.tolist() == [
        loss - rank for loss, rank in zip(LOSSES, CORRELATIONS, strict=True)
    ]
    assert table.learning_rate.isna().all()


@pytest.mark.parametrize(
    ("style", "metric", "score"),
    [
        ("signed", "selection_metric", BEST),
        ("unsigned", "selection_metric", BEST),
        ("val", "val_loss", 0.060),
        ("model", "val_loss", 0.060),
    ],
)
@pytest.mark.parametrize("link", [True, False])
def test_checkpoint_names_of_every_form(root, style, metric, score, link):
    config = {name: section for name, section in SECTIONED.items() if name != "selection"}
    write_original_run(root / "old", names=style, link=link, config=config)
    metadata = read_metadata(root / "old")
    assert metadata["selection"]["primary_metric"] == metric
    assert metadata["selection"]["best_score"] == pytest.approx(score)
    assert metadata["selection"]["best_epoch"] == 4
    assert best_file(find_run(root, "old"), read_record(root / "old")).name == checkpoint_names(style)[0]


def test_the_link_decides_and_without_it_what_the_epochs_are_worth(root):
    # the names, one epoch late in the correlation, put epoch 5 before epoch 3
    write_original_run(root / "old", link=False)
    (root / "old" / "model_checkpoints" / checkpoint_names("signed")[0]).unlink()
    assert read_metadata(root / "old")["selection"]["best_epoch"] == 3
    (root / "old" / "model_checkpoints" / "best.ckpt").symlink_to(
        "/elsewhere/" + checkpoint_names("signed")[1]
    )
    assert read_metadata(root / "old")["selection"]["best_epoch"] == 5
    assert read_metadata(root / "old")["selection"]["best_score"] == pytest.approx(
        LOSSES[5] - CORRELATIONS[5]
    )
    assert best_file(find_run(root, "old"), read_record(root / "old")).name == checkpoint_names("signed")[1]


def test_the_metric_that_newer_metadata_state_wins_over_names(root):
    metadata = run_metadata("old") | {"selection": {"primary_metric": "val_loss"}}
    write_original_run(root / "old", metadata=metadata)
    assert read_metadata(root / "old")["selection"]["primary_metric"] == "val_loss"


@pytest.mark.parametrize("style", ["signed", "unsigned"])
def test_names_are_all_there_is_when_metrics_are_lost(root, style):
    write_original_run(root / "old", metrics=(), names=style, link=False)
    selection = read_metadata(root / "old")["selection"]
    assert selection["best_score"] == pytest.approx(LOSSES[4] - CORRELATIONS[3])
    assert (selection["best_epoch"], selection["best_val_spearman"]) == (4, None)
    assert len(read_metrics(find_run(root, "old"))) == 0


def test_a_loss_that_the_metrics_do_not_know(root):
    write_original_run(root / "old", names="model", metrics=())
    selection = read_metadata(root / "old")["selection"]
    assert (selection["best_score"], selection["best_epoch"]) == (0.06, None)
    assert "an unknown epoch" in change_line(snapshot(find_run(root, "old")))


def test_a_resumed_run_has_one_row_an_epoch_and_the_later_start_counts(root):
    run = write_original_run(root / "old", metrics=("cpu_training/version_2/metrics.csv",))
    later = run / "cpu_training" / "version_10" / "metrics.csv"
    later.parent.mkdir()
    later.write_text(logger_rows("train_loss", (0.059, 0.058, 0.057), start=4))
    assert [file.parent.name for file in metrics_files(run)] == ["version_2", "version_10"]
    table = adopt(run)[1]
    assert table.epoch.tolist() == list(range(7))
    assert table.val_loss.tolist()[3:] == [0.066, 0.059, 0.058, 0.057]


def test_rows_of_steps_and_an_epoch_that_is_not_validated(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(
        "epoch,step,train_loss_step,train_loss_epoch,val_loss\n0,9,0.3,,\n0,22,,,0.2\n0,22,,0.25,\n1,31,0.2,,\n"
    )
    table = joined_epochs([read_table(file)])
    assert table[["epoch", "step", "train_loss", "val_loss"]].to_dict("records") == [
        {"epoch": 0, "step": 22, "train_loss": 0.25, "val_loss": 0.2}
    ]


def test_a_value_that_the_original_ignored(root):
    write_original_run(root / "old", config=SECTIONED | {"seed": 777, "fast_dev_run": True})
    settings = read_metadata(root / "old")["training_parameters"]
    assert settings["dataloader"]["seed"] == 222
    assert settings["trainer"] == {"num_epochs": 260, "min_epochs": 1, "fast_dev_run": True}


def test_a_run_that_continued_another(root):
    write_original_run(root / "old", metadata=run_metadata("old", parent="/Volumes/Data/a.chkpt"))
    lineage = read_metadata(root / "old")["lineage"]
    assert lineage == {"mode": "resume", "parent_checkpoint": "/Volumes/Data/a.chkpt"}


# --- the readers


def test_the_recorded_environment_goes_no_further(root):
    write_original_run(root / "old")
    everything = [summarise(find_run(root, "old")), leaderboard(root), snapshot(find_run(root, "old"))]
    assert "not for others" not in json.dumps(everything)
    assert everything[0]["environment"] == {"git": {"commit": "ff6b559cb", "dirty": True}}


def test_reading_changes_nothing(root):
    write_original_run(root / "old")
    before = tree(root)
    run = find_run(root, "old")
    summarise(run), snapshot(run, rows=3), leaderboard(root)
    with pytest.raises(RunError, match="only read"):
        update_metadata(run, status="running")
    assert tree(root) == before


def test_old_and_new_in_one_leaderboard(root):
    loaded = load_config(None, [f"paths.save_dir={root}"])
    for name, score in (("better", -0.9), ("worse", -0.1)):
        run = create_run(root, name, loaded, loaded.config)
        update_metadata(run, status="completed", selection={"best_score": score, "best_val_loss": 0.1})
    write_original_run(root / "old")
    write_original_run(root / "history" / "older", names="model", config=FLAT, with_metadata=False)
    board = leaderboard(root)
    assert [(row["metric"], row["run_name"], row["status"]) for row in board] == [
        ("selection_metric", "better", "completed"),
        ("selection_metric", "worse", "completed"),
        ("selection_metric", "old", "completed"),
        ("val_loss", "older", "unknown"),
    ]
    assert [row["rank"] for row in board] == [1, 2, 1, 1]
    assert "validation data unknown" in board[2]["comparison"]
    assert [run.name for run in list_runs(root)] == ["better", "old", "older", "worse"]
    assert json.loads(json.dumps(board, allow_nan=False)) == board


def test_monitor_shows_what_made_it(root):
    write_original_run(root / "old", config=FLAT)
    seen = snapshot(find_run(root, "old"), rows=2)
    assert seen["parameters"] == {
        "optimizer.learning_rate": 0.005,
        "dataloader.batch_size": 16,
        "dataloader.seed": 222,
        "early_stopping.patience": 45,
    }
    assert (seen["ended"], [row["epoch"] for row in seen["metrics"]]) == (True, [4, 5])


def test_archived_and_found_again(root):
    write_original_run(root / "old")
    archive(root, ["old"])
    assert find_run(root, "old").path == root / "history" / "old"
    assert leaderboard(root)[0]["archived"]


# --- what is not one


def test_ours_are_ours(root):
    loaded = load_config(None, [f"paths.save_dir={root}"])
    run = create_run(root, "new", loaded, loaded.config)
    assert not is_original(run.path)
    run.metadata_file.write_text("{")
    assert not is_original(run.path), "damaged metadata may be anybody's"
    assert not RunDirectory(run.path).is_original
    for folder in (root, root / "absent", run.path / "config"):
        assert not is_original(folder)


def test_whose_run_it_is_is_decided_once(root, monkeypatch):
    write_original_run(root / "old")
    asked = []
    monkeypatch.setattr("topoqa_nb.runs.record.is_original", lambda path: not asked.append(path))
    run = RunDirectory(root / "old")
    assert read_record(run).status == "completed" and len(read_metrics(run)) == 6 and run.exists
    with pytest.raises(RunError, match="only read"):
        update_metadata(run, status="failed")
    assert len(asked) == 1


def test_relative_paths(root, monkeypatch):
    write_original_run(root / "old")
    monkeypatch.chdir(root / "old")
    assert [str(file) for file in metrics_files(".")] == ["cpu_training/version_0/metrics.csv"]
    assert find_run("elsewhere", ".").path.name == "old"


# --- damage


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run_metadata.json", '{"run_name": "ol', "expected valid JSON"),
        ("config/config.yaml", "paths: {graph", "expected valid YAML"),
        ("config/config.yaml", "- a\n", "config.yaml"),
        ("cpu_training/version_0/metrics.csv", logger_rows()[:-9], "expected a whole last line"),
        ("cpu_training/version_0/metrics.csv", logger_rows() + "6,160\n", "expected 6 cells"),
        ("cpu_training/version_0/metrics.csv", "", "metrics.csv"),
        ("cpu_training/version_0/metrics.csv", "epoch,val_loss\n0,x\n", "metrics.csv"),
    ],
)
def test_damage_is_one_line_and_the_others_are_listed(root, name, text, said):
    write_original_run(root / "good")
    write_original_run(root / "old")
    (root / "old" / name).write_text(text)
    with pytest.raises(TopoqaError, match=said) as problem:
        snapshot(find_run(root, "old"))
    assert len(str(problem.value).splitlines()) == 1
    board = leaderboard(root)
    assert [(row["run_name"], row["status"]) for row in board] == [
        ("good", "completed"),
        ("old", "unreadable"),
    ]
    assert said in board[1]["reason"]


def test_metadata_without_a_configuration_are_no_run_of_theirs(root):
    write_json(root / "odd" / "run_metadata.json", {"run_name": "odd"})
    assert not is_original(root / "odd")
    assert leaderboard(root)[0]["rank"] is None
