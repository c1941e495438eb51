"""Run directories: kills, races, git, damage. What the page does not show."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
import yaml
from conftest import PATIENCE

from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import RunError, write_json, write_text
from topoqa_nb.ground.machine import git_state
from topoqa_nb.runs import runs as runs
from topoqa_nb.runs.leaderboard import best_file, leaderboard, summarise
from topoqa_nb.runs.record import RunDirectory, read_metadata, read_record, update_metadata
from topoqa_nb.runs.runs import (
    METRIC_COLUMNS,
    best_epoch,
    check_run_name,
    create_run,
    default_run_name,
    find_run,
    invent_epoch,
    list_runs,
    read_metrics,
    update_best,
)
from topoqa_nb.runs.selection import candidate, update_links
from topoqa_nb.training.devices import environment

SECTIONS = [
    "run_name", "identity", "status", "created", "completed", "reason", "ending", "command", "source_config", "overrides", "notes",
    "trial_label", "environment", "data", "training_parameters", "selection", "checkpoints", "lineage", "runtime",
    "progress", "mlflow",
]  # fmt: skip


@pytest.fixture
def loaded(tmp_path):
    return load_config(None, [f"paths.save_dir={tmp_path / 'runs'}"])


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


def entries(folder):
    "Everything in a folder, hidden or not."
    return sorted(path.name for path in folder.iterdir())


def row(epoch, val_loss=0.06, spearman=0.5, **changes):
    metrics = dict.fromkeys(METRIC_COLUMNS, 0.1) | {"epoch": epoch, "step": epoch, "val_loss": val_loss}
    return metrics | {"val_spearman_corr": spearman, "selection_metric": val_loss - spearman} | changes


def finished(root, loaded, name, *scores, status="completed", **sections):
    run = create_run(root, name, loaded, loaded.config, command=["topoqa", "run"])
    for epoch, spearman in enumerate(scores):
        invent_epoch(run, row(epoch, spearman=spearman))
    update_metadata(run, status=status, **sections)
    return run


# --- creation


def test_a_run_holds_what_the_contract_lists(root, loaded):
    run = create_run(
        root, "a", loaded, loaded.config, notes="why", trial_label="lr", command=["topoqa", "a b"]
    )
    files = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*"))
    assert files == [
        "artifacts", "config", "config/applied_overrides.yaml", "config/config.yaml", "config/original_config.yaml",
        "logs", "metrics", "model_checkpoints", "notes.txt", "run_metadata.json",
    ]  # fmt: skip
    metadata = read_metadata(run)
    assert list(metadata) == SECTIONS
    assert metadata["command"] == "topoqa 'a b'"
    assert (metadata["notes"], metadata["trial_label"], run.notes_file.read_text()) == ("why", "lr", "why\n")
    assert datetime.fromisoformat(metadata["created"]).tzinfo
    assert entries(root) == ["a", "latest"]


def test_a_run_is_repeated_from_its_directory_alone(tmp_path, root):
    write_text(
        tmp_path / "base.yaml", "optimizer: {learning_rate: 0.001}\npaths: {graph: graphs, save_dir: runs}\n"
    )
    original = "# comment\nextends: base.yaml\ntrainer: {num_epochs: 7}\n"
    write_text(tmp_path / "mine.yaml", original)
    loaded = load_config(tmp_path / "mine.yaml", ["seed=777"])
    run = create_run(root, "a", loaded, loaded.config)
    for name in ("base.yaml", "mine.yaml"):
        (tmp_path / name).unlink()
    again = load_config(run.config_file).config
    assert again == loaded.config
    assert (again.dataloader.seed, again.optimizer.learning_rate, again.paths.graph) == (
        777,
        0.001,
        tmp_path / "graphs",
    )
    assert (run.config_dir / "original_config.yaml").read_text() == original
    assert yaml.safe_load((run.config_dir / "applied_overrides.yaml").read_text()) == {"dataloader.seed": 777}
    assert read_metadata(run)["training_parameters"] == loaded.config.model_dump(mode="json")
    assert read_metadata(run)["source_config"] == str(tmp_path / "mine.yaml")


def test_latest_is_relative_and_survives_a_move(tmp_path, root, loaded):
    for name in ("a", "b"):
        create_run(root, name, loaded, loaded.config)
    assert str((root / "latest").readlink()) == "b"
    root.rename(tmp_path / "moved")
    assert find_run(tmp_path / "moved", "latest").name == "b"
    shutil.rmtree(tmp_path / "moved" / "b")
    with pytest.raises(RunError, match="no such run"):
        find_run(tmp_path / "moved", "latest")


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "../a", "/a", ".", "..", ".a", "a\\b", "a\n", "a\0b", "latest", "history"]
)
def test_names_that_are_no_folder_names(root, loaded, name):
    with pytest.raises(RunError, match="run name: expected"):
        create_run(root, name, loaded, loaded.config)
    assert not root.exists()


@pytest.mark.parametrize("where", [".", "history"])
def test_a_taken_name_is_refused_and_left_alone(root, loaded, where):
    run = create_run(root, "a", loaded, loaded.config)
    (root / "history").mkdir()
    if where == "history":
        run = RunDirectory(run.path.rename(root / "history" / "a"))
    before = run.metadata_file.read_bytes()
    with pytest.raises(RunError, match="choose another name, or move the old run away"):
        create_run(root, "a", loaded, loaded.config)
    assert run.metadata_file.read_bytes() == before


def test_default_names_of_one_second_differ(root, loaded, monkeypatch):
    class Frozen(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2025, 11, 3, 11, 3, 7)

    monkeypatch.setattr(runs, "datetime", Frozen)
    names = [create_run(root, None, loaded, loaded.config).name for _ in range(3)]
    assert names == [f"training_run_2025-11-03_11-03-07{end}" for end in ("", "_2", "_3")]
    monkeypatch.undo()
    assert re.fullmatch(r"training_run_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", default_run_name(root))


def create_and_tell(root, name, barrier, queue):
    loaded = load_config(None)
    barrier.wait()
    try:
        queue.put(create_run(root, name, loaded, loaded.config).name)
    except RunError:
        queue.put("refused")


def created_at_once(root, name):
    "What four processes are told that make a run at the same time."
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)
    arguments = (root, name, barrier, queue)
    processes = [context.Process(target=create_and_tell, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    told = sorted(queue.get(timeout=PATIENCE) for _ in processes)
    for process in processes:
        process.join()
    return told


def test_of_several_processes_one_gets_the_name(root):
    assert created_at_once(root, "same") == ["refused", "refused", "refused", "same"]
    assert entries(root) == ["latest", "same"]


def test_starts_in_one_second_take_different_names(root, monkeypatch):
    "The names are looked for at the same time, so only the making of the directory can decide."
    looked = runs.default_run_name
    found = multiprocessing.get_context("fork").Barrier(4)

    def together(save_dir):
        name = looked(save_dir)
        with contextlib.suppress(threading.BrokenBarrierError):
            found.wait(0.5)
        return name

    monkeypatch.setattr(runs, "default_run_name", together)
    names = created_at_once(root, None)
    assert len(set(names)) == 4 and "refused" not in names
    assert entries(root) == ["latest", *names]
    assert all(read_metadata(RunDirectory(root / name))["run_name"] == name for name in names)


def test_a_failure_on_the_way_leaves_nothing(root, loaded, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_json", full)
    with pytest.raises(RunError, match="No space left on device"):
        create_run(root, "a", loaded, loaded.config)
    assert entries(root) == []


def test_a_run_root_that_is_a_file(tmp_path, loaded):
    write_text(tmp_path / "file", "")
    with pytest.raises(RunError, match="expected a new run directory, found"):
        create_run(tmp_path / "file", "a", loaded, loaded.config)


# --- metadata and metrics


def test_readers_never_see_half_of_the_metadata(root, loaded):
    run = create_run(root, "a", loaded, loaded.config)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(lambda: [update_metadata(run, reason="x" * 2000 * n) for n in range(60)])
        while not writing.done():
            assert read_metadata(run)["run_name"] == "a"
        writing.result()


def test_undefined_numbers_are_null(root, loaded):
    run = create_run(root, "a", loaded, loaded.config)
    update_metadata(run, selection={"best_score": float("nan")}, data={"graph_dir": root})
    assert "NaN" not in run.metadata_file.read_text()
    assert json.loads(run.metadata_file.read_text())["data"] == {"graph_dir": str(root)}


def test_metrics_are_read_back_bit_by_bit(root, loaded):
    run = create_run(root, "a", loaded, loaded.config)
    values = [0.1 + 0.2, 1e-17, 5e-324, -0.0, 1 / 3]
    for epoch, value in enumerate(values):
        invent_epoch(
            run, row(epoch, train_loss=value, val_ranking_loss=None, val_target_spearman=float("nan"))
        )
    table = read_metrics(run)
    assert table.train_loss.tolist() == values
    assert table.val_ranking_loss.isna().all() and table.val_target_spearman.isna().all()
    assert table.epoch.tolist() == [0, 1, 2, 3, 4]
    lines = run.metrics_file.read_text().splitlines()
    assert lines[0] == ",".join(METRIC_COLUMNS) and len(lines) == 6


def test_an_epoch_is_written_once(root, loaded):
    run = finished(root, loaded, "a", 0.1, 0.2)
    before = run.metrics_file.read_bytes()
    for epoch in (0, 1):
        with pytest.raises(RunError, match="an epoch after 1"):
            invent_epoch(run, row(epoch))
    with pytest.raises(RunError, match="did you mean val_loss"):
        invent_epoch(run, row(2, val_lss=1))
    assert run.metrics_file.read_bytes() == before


@pytest.mark.parametrize("content", ["", "epoch,loss\n0,1\n", "epoch,step\n0,1,2,3\n", '"epoch\n'])
def test_damaged_metrics_name_the_file(root, loaded, content):
    run = create_run(root, "a", loaded, loaded.config)
    run.metrics_file.write_text(content)
    with pytest.raises(RunError, match="metrics.csv"):
        read_metrics(run)


def test_the_best_epoch_follows_the_metadata(root, loaded):
    run = finished(root, loaded, "a", 0.3, 0.6, 0.4)
    selection = read_metadata(run)["selection"]
    assert selection["primary_metric"] == "selection_metric"
    assert [selection[f"best_{name}"] for name in ("score", "epoch", "val_loss", "val_spearman")] == [
        0.06 - 0.6,
        1,
        0.06,
        0.6,
    ]
    assert isinstance(selection["best_epoch"], int)
    update_metadata(
        run, lineage={"parent_score": {"selection_metric": -0.9, "val_loss": 0.05, "val_spearman_corr": 0.95}}
    )
    assert update_best(run)["selection"]["best_epoch"] == -1


def test_ties_and_undefined_epochs():
    rows = [row(0, 0.07, 0.57), row(1, 0.06, 0.56), row(2, 0.06, 0.56), row(3, selection_metric=float("nan"))]
    tied = [each | {"selection_metric": -0.5} for each in rows[:3]] + rows[3:]
    assert best_epoch(tied)["best_epoch"] == 1
    assert best_epoch(tied[3:])["best_score"] is None
    assert best_epoch([])["best_epoch"] is None
    equal = {"selection_metric": -0.5, "val_loss": 0.06, "val_spearman_corr": 0.56}
    assert best_epoch(tied, parent_score=equal)["best_epoch"] == -1


# --- the machine


def test_environment_is_plain_json():
    about = environment(kernel="reference", threads=1, device="cpu")
    assert json.loads(json.dumps(about)) == about
    assert {"git", "host", "python", "packages", "device", "threads", "kernel"} <= set(about)
    assert {"torch", "torch-geometric", "pytorch-lightning"} <= set(about["packages"])


def test_git_state(tmp_path, monkeypatch):
    for name, value in {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GIT_COMMITTER_NAME", "a")
    monkeypatch.setenv("GIT_COMMITTER_EMAIL", "a@b")

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", tmp_path, *arguments], capture_output=True, text=True, check=True
        ).stdout

    package, foreign = tmp_path / "package", tmp_path / "venv"
    write_text(package / "module.py", "a = 1\n")
    write_text(foreign / "module.py", "a = 1\n")
    assert git_state(package) is None
    git("init", "-q")
    git("add", "package")
    assert git_state(package) is None  # no commit yet
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert git_state(package) == {"commit": commit, "dirty": False}
    assert git_state(foreign) is None  # inside the repository, but not part of it
    write_text(package / "module.py", "a = 2\n")
    assert git_state(package) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state(package) is None


# --- finding


def test_find_by_name_path_history_and_latest(root, loaded, monkeypatch):
    runs_made = {name: finished(root, loaded, name, 0.5) for name in ("a", "b", "old")}
    (root / "history").mkdir()
    runs_made["old"].path.rename(root / "history" / "old")
    create_run(root, "newest", loaded, loaded.config)
    assert find_run(root, "a").path == root / "a"
    assert find_run(root, "old").path == root / "history" / "old"
    assert find_run(root, "latest").path == root / "newest"
    assert find_run("elsewhere", root / "latest").path == root / "newest"
    monkeypatch.chdir(root.parent)
    assert find_run("elsewhere", "runs/b").path == root / "b"
    assert find_run("runs", "b").path == root / "b"
    assert [run.name for run in list_runs(root)] == ["a", "b", "newest", "old"]


def test_what_is_not_a_run(root, loaded):
    finished(root, loaded, "sched_boost", 0.5)
    (root / "reports").mkdir()
    (root / ".half.12.tmp").mkdir()
    write_json(root / ".half.12.tmp" / "run_metadata.json", {})
    assert [run.name for run in list_runs(root)] == ["sched_boost"]
    with pytest.raises(RunError, match="did you mean sched_boost?"):
        find_run(root, "shed_boost")
    with pytest.raises(RunError, match="without run_metadata.json"):
        find_run(root, "reports")
    with pytest.raises(RunError, match="leaderboard --run-root"):
        find_run(root, "zzz")
    assert list_runs(root / "absent") == []


# --- summary and leaderboard


@pytest.mark.parametrize("status", ["running", "failed", "interrupted", "completed"])
def test_summary_of_a_run_in_any_state(root, loaded, status):
    run = finished(root, loaded, "a", status=status, reason="why")
    summary = json.loads(json.dumps(summarise(run), allow_nan=False))
    assert (summary["status"], summary["best"]["best_score"], summary["best_checkpoint"]) == (
        status,
        None,
        None,
    )
    assert best_file(run, read_record(run)) is None
    invent_epoch(run, row(0, spearman=0.5))
    best = candidate(-0.44, 0.06, 0)
    write_text(run.checkpoints / best.filename, "weights")
    update_links(run.checkpoints, [best], None, "selection_metric")
    summary = summarise(run)
    assert summary["best"]["best_score"] == -0.44
    assert summary["best_checkpoint"] == str(run.checkpoints / best.filename)
    assert summary["config"]["trainer"]["num_epochs"] == 200


def test_summary_leaves_out_what_fills_pages(root, loaded):
    run = finished(root, loaded, "a", 0.5)
    schema = {
        "edge_schema": {"dim": 11},
        "node_schema": {"dim": 2, "columns": ["a", "b"]},
        "module_registry": {"x": 1},
    }
    write_json(run.feature_file, schema | {"schema_sha256": "ab"})
    assert summarise(run)["schema"] == {
        "edge_schema": {"dim": 11},
        "schema_sha256": "ab",
        "node_schema": {"dim": 2},
    }
    run.feature_file.write_text("{")
    with pytest.raises(RunError, match="feature_metadata.json"):
        summarise(run)


def test_metrics_are_not_mixed(root, loaded):
    by_loss = load_config(None, ["selection.primary_metric=val_loss"])
    finished(root, loaded, "good", 0.7)
    finished(root, loaded, "poor", 0.2)
    finished(root, by_loss, "loss", 0.9)
    board = leaderboard(root)
    assert [(entry["metric"], entry["rank"], entry["run_name"]) for entry in board] == [
        ("selection_metric", 1, "good"), ("selection_metric", 2, "poor"), ("val_loss", 1, "loss"),
    ]  # fmt: skip
    assert board[2]["score"] == 0.06
    assert json.loads(json.dumps(board, allow_nan=False)) == board


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\udcff"])
def test_a_damaged_run_is_named_and_the_others_listed(root, loaded, content):
    finished(root, loaded, "good", 0.7)
    damaged = finished(root, loaded, "damaged", 0.9)
    damaged.metadata_file.write_text(content, errors="surrogateescape")
    board = leaderboard(root, limit=1)
    assert [entry["run_name"] for entry in board] == ["good", "damaged"]
    assert board[1]["status"] == "unreadable" and "run_metadata.json" in board[1]["reason"]
    with pytest.raises(RunError, match="run_metadata.json"):
        summarise(damaged)


def test_foreign_metadata_do_not_break_the_board(root, loaded):
    finished(root, loaded, "good", 0.7)
    for name, content in {
        "old": {},
        "odd": {"selection": 3, "checkpoints": []},
        "text": {"selection": {"best_score": "x"}},
    }.items():
        write_json(root / name / "run_metadata.json", content)
    assert [(entry["run_name"], entry["rank"]) for entry in leaderboard(root)] == [
        ("good", 1), ("old", None), ("odd", None), ("text", None),
    ]  # fmt: skip


def test_limit_counts_each_metric(root, loaded):
    for number in range(4):
        finished(root, loaded, f"run_{number}", 0.1 * number)
    assert [entry["run_name"] for entry in leaderboard(root, limit=2)] == ["run_3", "run_2"]
    assert leaderboard(root.parent) == []
    with pytest.raises(RunError, match="no such directory"):
        leaderboard(root / "absent")


def test_names_at_the_limit(root):
    check_run_name(root, "x" * 200)
    with pytest.raises(RunError, match="at most 200 bytes"):
        check_run_name(root, "ä" * 101)
