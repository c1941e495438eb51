"""MLflow: stores that are down, slow, broken or shared; runs that are resumed; what must never be printed."""

import itertools
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import PATIENCE, forked, speak_into, until

pytest.importorskip("mlflow")

from mlflow import MlflowClient

from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import ConfigError, write_json, write_text
from topoqa_nb.ground.settings import MlflowConfig
from topoqa_nb.runs.record import RunDirectory, read_metadata, update_metadata
from topoqa_nb.runs.runs import METRIC_COLUMNS, create_run, invent_epoch, read_metrics
from topoqa_nb.runs.selection import candidate, update_links
from topoqa_nb.training import mlflow_store, tracking
from topoqa_nb.training.mlflow_run import PARENT_VARIABLE
from topoqa_nb.training.mlflow_store import (
    check_tracking,
    database_file,
    make_database,
    old_store_note,
    store_uri,
)
from topoqa_nb.training.mlflow_sweep import open_sweep_run
from topoqa_nb.training.tracking import open_tracker
from topoqa_nb.training.training import train

LOSSES = [0.090, 0.075, 0.066, 0.060]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    "An MLflow database, made once: it takes seconds."
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    make_database(database)
    return database


@pytest.fixture
def store(tmp_path, empty_database):
    "A folder with an empty store."
    folder = tmp_path / "mlruns"
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    return folder


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch):
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)


@pytest.fixture
def lines(caplog):
    "What the console of a run would say."
    caplog.set_level(logging.INFO, "topoqa_nb")
    return lambda: [entry.getMessage() for entry in caplog.records if entry.name == "topoqa_nb"]


def new_run(folder: Path, uri: object, name: str = "run", **changes: object) -> RunDirectory:
    settings = {
        "mlflow.enabled": True,
        "mlflow.tracking_uri": str(uri),
        "paths.save_dir": str(folder / "runs"),
    }
    loaded = load_config(None, settings | {key.replace("__", "."): value for key, value in changes.items()})
    run = create_run(folder / "runs", name, loaded, loaded.config)
    write_json(run.feature_file, {"edge_schema": {"dim": 3}})
    write_json(run.coverage_file, {"train": {"coverage": 1.0}})
    return run


def write_epoch(run: RunDirectory, epoch: int, loss: float) -> None:
    best = candidate(loss - 0.7 if loss == loss else 9.0, loss if loss == loss else 9.0, epoch)
    row = dict.fromkeys(METRIC_COLUMNS, 0.5) | {"epoch": epoch, "step": epoch + 1, "val_loss": loss}
    invent_epoch(run, row | {"selection_metric": loss - 0.7, "val_ranking_loss": None})
    write_text(run.checkpoints / best.filename, f"weights of epoch {epoch}")
    update_links(run.checkpoints, [best])
    update_metadata(run, checkpoints={"ranked": [best.filename]})


@contextmanager
def tracker_of(run: RunDirectory):
    with open_tracker(run, load_config(run.config_file).config.mlflow) as tracker:
        yield tracker


def train_epochs(run: RunDirectory, losses: list[float] = LOSSES, first: int = 0) -> None:
    with tracker_of(run) as tracker:
        for epoch in range(first, len(losses)):
            write_epoch(run, epoch, losses[epoch])
            tracker.on_train_epoch_end(None, None)


def client_of(run: RunDirectory) -> tuple[MlflowClient, str]:
    about = read_metadata(run)["mlflow"]
    return MlflowClient(about["tracking_uri"]), about["run_id"]


def copy_of(run: RunDirectory):
    client, run_id = client_of(run)
    return client.get_run(run_id)


def history(run: RunDirectory, metric: str = "val_loss") -> list[tuple[int, float]]:
    client, run_id = client_of(run)
    return [(value.step, value.value) for value in client.get_metric_history(run_id, metric)]


# --- where the store is


@pytest.mark.parametrize("name", ["my runs #1 ü", "50%25?"])
def test_a_folder_of_any_name_holds_the_database_and_the_artifacts(tmp_path, empty_database, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    run = new_run(tmp_path, folder)
    train_epochs(run)
    assert history(run) == list(enumerate(LOSSES))
    assert (folder / "artifacts" / copy_of(run).info.run_id / "artifacts" / "feature_metadata.json").is_file()
    assert database_file(store_uri(str(folder))) == folder / "mlflow.db"


@pytest.mark.parametrize(
    "uri, words",
    [
        ("htp://host:5000", ["unknown scheme htp", "did you mean http?"]),
        ("s3://bucket/mlruns", ["unknown scheme s3"]),
        ("postgrsql://host/db", ["did you mean postgresql?"]),
        ("http:/host", ["without a host"]),
        ("https://", ["without a host"]),
    ],
)
def test_a_uri_that_cannot_be_one_is_a_config_error(uri, words):
    with pytest.raises(ConfigError) as error:
        check_tracking(MlflowConfig(enabled=True, tracking_uri=uri))
    assert all(word in str(error.value) for word in ["mlflow.tracking_uri", *words])
    assert "\n" not in str(error.value)
    check_tracking(MlflowConfig(enabled=False, tracking_uri=uri))


def test_a_file_is_not_a_folder(tmp_path):
    file = write_text(tmp_path / "mlflow.db", "")
    with pytest.raises(ConfigError, match=f"write sqlite:///{file}"):
        check_tracking(MlflowConfig(enabled=True, tracking_uri=str(file)))


@pytest.mark.parametrize(
    "uri",
    [
        "mlruns",
        "/data/mlruns",
        "file:///data",
        "sqlite:///a.db",
        "mysql+pymysql://h/db",
        "databricks",
        "http://h",
    ],
)
def test_what_mlflow_knows_is_accepted(uri):
    check_tracking(MlflowConfig(enabled=True, tracking_uri=uri))


def test_an_old_file_store_is_named_with_a_command_that_exists_and_spares_the_new_store(store):
    from mlflow.cli import cli

    write_text(store / "0" / "meta.yaml", "name: Default\n")
    note = old_store_note(str(store))
    assert "mlflow migrate-filestore --source" in note and str(store) in note
    assert "migrate-filestore" in cli.commands
    assert f"sqlite:///{store}/mlflow.db" not in note  # the command writes over its target
    write_text(store / "filestore.db", "")
    assert old_store_note(str(store)) is None


def test_an_old_file_store_does_not_stop_a_run(tmp_path, store, lines):
    write_text(store / "0" / "meta.yaml", "name: Default\n")
    run = new_run(tmp_path, store)
    train_epochs(run)
    assert len([line for line in lines() if "migrate-filestore" in line]) == 1
    assert history(run) == list(enumerate(LOSSES))


def begin_and_end(run: RunDirectory, go: Path) -> None:
    "As a process: follow a run as soon as there is the file `go`; what is said goes to the run's directory."
    speak_into(*(os.open(run.path / name, os.O_WRONLY | os.O_CREAT) for name in ("out", "err")))
    (run.path / "ready").touch()
    while not go.exists():
        time.sleep(0.01)
    with tracker_of(run):
        pass


def test_processes_that_start_together_on_a_new_store_all_succeed_silently(tmp_path):
    runs = [new_run(tmp_path, tmp_path / "mlruns", f"run{number}") for number in range(3)]
    processes = [forked(begin_and_end, run, tmp_path / "go") for run in runs]
    until(lambda: all((run.path / "ready").exists() for run in runs))
    (tmp_path / "go").touch()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [(run.path / name).read_text() for run in runs for name in ("out", "err")] == [""] * 6
    assert [copy_of(run).info.status for run in runs] == ["FINISHED"] * 3
    assert len({copy_of(run).info.experiment_id for run in runs}) == 1


def test_a_process_killed_while_it_makes_the_database_leaves_none(tmp_path, monkeypatch):
    def killed(command, **options):
        Path(command[-1].removeprefix("sqlite:///")).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow_store.subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        make_database(tmp_path / "mlflow.db")
    assert list(tmp_path.iterdir()) == []


# --- never in the way


def test_tracking_that_is_off_does_not_import_mlflow(tmp_path):
    code = (
        "import sys; from pathlib import Path; from topoqa_nb.training.tracking import *; from topoqa_nb.training.mlflow_sweep import *\n"
        "from topoqa_nb.ground.settings import MlflowConfig; from topoqa_nb.runs.record import RunDirectory\n"
        "with open_tracker(RunDirectory(Path('absent')), MlflowConfig()), open_sweep_run(MlflowConfig(), 'a'): pass\n"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_mlflow_is_missing(tmp_path, monkeypatch, lines):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    run = new_run(tmp_path, tmp_path / "mlruns")
    train_epochs(run)
    assert len(lines()) == 1
    assert "pip install mlflow" in lines()[0] and str(run.path) in lines()[0]
    assert read_metrics(run).val_loss.tolist() == LOSSES


def test_a_server_that_refuses_costs_one_line_without_the_password(tmp_path, monkeypatch, lines):
    monkeypatch.setenv("MLFLOW_SERVER", "http://me:secret@127.0.0.1:9")
    run = new_run(tmp_path, "${MLFLOW_SERVER}")
    train_epochs(run)
    assert len(lines()) == 1 and "refused" in lines()[0] and "secret" not in lines()[0]
    assert "secret" not in str(read_metadata(run)["mlflow"])
    assert read_metrics(run).val_loss.tolist() == LOSSES


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    "The pauses that the test's own thread wants to make (s); it makes none."
    sleep, asked = time.sleep, []

    def pause(seconds: float) -> None:
        ours = threading.current_thread() is threading.main_thread()
        asked.append(seconds) if ours else sleep(seconds)

    monkeypatch.setattr(time, "sleep", pause)
    return asked


def test_a_server_that_never_answers_costs_seconds(tmp_path, monkeypatch, lines, pauses):
    monkeypatch.setitem(mlflow_store.BRIEF, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        run = new_run(tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        train_epochs(run)
        deaf.settimeout(0)
        requests = [
            deaf.accept()[0].close() for _ in itertools.takewhile(lambda _: is_asked(deaf), range(99))
        ]
    assert len(requests) == 4  # two at the start, two at the end
    assert sum(pauses) < 5
    assert len(lines()) == 1 and "timed out" in lines()[0]


def is_asked(server: socket.socket) -> bool:
    return bool(select.select([server], [], [], 0)[0])


@pytest.mark.parametrize("content", ["no database " * 200, None], ids=["broken", "folder"])
def test_a_broken_database_costs_one_line_and_no_retries(tmp_path, lines, pauses, content):
    folder = tmp_path / "mlruns"
    write_text(folder / "mlflow.db", content) if content else (folder / "mlflow.db").mkdir(parents=True)
    run = new_run(tmp_path, folder)
    train_epochs(run)
    assert len(lines()) == 1 and pauses == []
    assert read_metrics(run).val_loss.tolist() == LOSSES


def test_a_database_server_that_is_down_is_not_tried_for_minutes(tmp_path, monkeypatch, lines, pauses):
    monkeypatch.setenv("MLFLOW_SERVER", "postgresql://me:secret@127.0.0.1:9/mlflow")
    run = new_run(tmp_path, "${MLFLOW_SERVER}")
    train_epochs(run)
    assert len(lines()) == 1 and "secret" not in lines()[0] and pauses == []


@pytest.mark.parametrize("answer_lost", [False, True], ids=["not arrived", "answer lost"])
def test_what_failed_in_the_middle_is_there_at_the_end_and_once(
    tmp_path, store, monkeypatch, lines, answer_lost
):
    run = new_run(tmp_path, store)
    log_batch, failing = MlflowClient.log_batch, {1, 2}

    def unreliable(self, run_id, metrics=(), **values):
        fails = any(metric.step in failing for metric in metrics)
        if not fails or answer_lost:
            log_batch(self, run_id, metrics=metrics, **values)
        if fails:
            failing.discard(metrics[0].step)
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(MlflowClient, "log_batch", unreliable)
    monkeypatch.setattr(mlflow_store, "PAUSE_SECONDS", 0.0)
    train_epochs(run)
    assert history(run) == list(enumerate(LOSSES))
    assert len([line for line in lines() if "left out" in line]) == 1
    assert copy_of(run).info.status == "FINISHED"
    client, run_id = client_of(run)
    assert [found.info.run_id for found in client.search_runs([copy_of(run).info.experiment_id])] == [run_id]


def test_after_a_failure_mlflow_is_left_alone_for_a_while(tmp_path, store, monkeypatch):
    run, calls = new_run(tmp_path, store), []

    def fail(self, *arguments, **values):
        calls.append(values)
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(MlflowClient, "create_run", fail)
    train_epochs(run)
    assert len(calls) == 2  # at the start and at the end, not at the four epochs


def test_nothing_is_printed_and_the_environment_is_left_as_it_was(tmp_path, store, capfd):
    before = dict(os.environ)
    train_epochs(new_run(tmp_path, store))
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


# --- what MLflow gets


def test_everything_of_a_run_is_there(tmp_path, store):
    run = new_run(tmp_path, store, mlflow__tags={"build": "v11", "odd=name?": {"a": 1}}, seed=777)
    update_metadata(run, notes="Does it learn?", trial_label="first", data={"fingerprint": "f00"})
    train_epochs(run)
    data = copy_of(run).data
    assert data.params["dataloader.seed"] == "777" and data.params["optimizer.learning_rate"] == "0.005"
    assert set(METRIC_COLUMNS) - set(data.metrics) == {"val_ranking_loss"}  # undefined in this run
    assert data.metrics["best_selection_metric"] == pytest.approx(min(LOSSES) - 0.7)
    assert data.tags["build"] == "v11" and data.tags["odd_name_"] == '{"a": 1}'
    assert (
        data.tags["mlflow.note.content"] == "Does it learn?" and data.tags["topoqa.data_fingerprint"] == "f00"
    )
    for metric in set(METRIC_COLUMNS) - {"val_ranking_loss"}:
        assert history(run, metric) == list(zip(range(4), read_metrics(run)[metric], strict=True))


def test_the_run_name_can_be_set(tmp_path, store):
    named, unnamed = new_run(tmp_path, store, "a", mlflow__run_name="my run"), new_run(tmp_path, store, "b")
    train_epochs(named)
    train_epochs(unnamed)
    assert [copy_of(named).info.run_name, copy_of(unnamed).info.run_name] == ["my run", "b"]


def test_values_longer_than_mlflow_takes(tmp_path, store, lines):
    long = {"text": "x" * 20_000, "k" * 400: 1}
    run = new_run(
        tmp_path, store, mlflow__tags=long, edge_schema={"note": "y" * 20_000, "a/../b": 1, "z" * 400: 2}
    )
    train_epochs(run)
    assert not [line for line in lines() if "left out" in line]
    assert copy_of(run).data.params["edge_schema.note"].startswith("yyy")


def test_the_three_best_checkpoints_are_files_under_lasting_names(tmp_path, store):
    run = new_run(tmp_path, store)
    ranked = [candidate(loss - 0.7, loss, epoch) for epoch, loss in ((3, 0.060), (2, 0.066), (1, 0.075))]
    with tracker_of(run):
        for best in ranked:
            write_text(run.checkpoints / best.filename, f"weights of epoch {best.epoch}")
        update_links(run.checkpoints, ranked)
        update_metadata(run, checkpoints={"ranked": [best.filename for best in ranked]})
    kept = store / "artifacts" / copy_of(run).info.run_id / "artifacts" / "model_checkpoints"
    texts = [(kept / f"{place}best.ckpt").read_text() for place in ("", "second_", "third_")]
    assert texts == ["weights of epoch 3", "weights of epoch 2", "weights of epoch 1"]
    assert not any(file.is_symlink() for file in kept.iterdir())
    assert copy_of(run).data.tags["topoqa.best.ckpt"] == ranked[0].filename


def test_artifacts_can_be_left_out(tmp_path, store):
    run = new_run(tmp_path, store, mlflow__log_artifacts=False)
    train_epochs(run)
    assert history(run) == list(enumerate(LOSSES))
    assert not (store / "artifacts").exists() or not [
        file for file in (store / "artifacts").rglob("*") if file.is_file()
    ]


# --- how a run ends


@pytest.mark.parametrize(
    "problem, status", [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_the_status_says_how_a_run_ended(tmp_path, store, problem, status):
    run = new_run(tmp_path, store)
    with pytest.raises(problem), tracker_of(run):
        write_epoch(run, 0, 0.09)
        raise problem
    assert copy_of(run).info.status == status
    assert history(run) == [(0, 0.09)]


def test_a_signal_gets_through_a_call_to_mlflow(tmp_path, store, monkeypatch):
    run, log_batch = new_run(tmp_path, store), MlflowClient.log_batch

    def interrupted(self, run_id, metrics=(), **values):
        if metrics:
            monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
            raise KeyboardInterrupt
        log_batch(self, run_id, metrics=metrics, **values)

    monkeypatch.setattr(MlflowClient, "log_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_epochs(run)
    assert copy_of(run).info.status == "KILLED"
    assert history(run) == [(0, LOSSES[0])]


# --- a run that is resumed


def test_a_resumed_run_is_the_same_run_and_repeats_nothing(tmp_path, store, monkeypatch):
    with open_sweep_run(MlflowConfig(enabled=True, tracking_uri=str(store)), "sweep") as sweep:
        monkeypatch.setenv(PARENT_VARIABLE, sweep.environment[PARENT_VARIABLE])
        run = new_run(tmp_path, store)
        train_epochs(run, LOSSES[:2])
    monkeypatch.delenv(PARENT_VARIABLE)
    before = read_metadata(run)["mlflow"]
    train_epochs(run, first=2)
    assert read_metadata(run)["mlflow"] == before
    assert before["parent_run_id"] == sweep.environment[PARENT_VARIABLE]
    assert history(run) == list(enumerate(LOSSES))


def test_epochs_that_are_replayed_alike_are_not_sent_again(tmp_path, store):
    run = new_run(tmp_path, store)
    train_epochs(run)
    run_id = client_of(run)[1]
    kept = run.metrics_file.read_text().splitlines(keepends=True)[:3]
    write_text(run.metrics_file, "".join(kept))
    train_epochs(run, first=2)
    assert client_of(run)[1] == run_id
    assert history(run) == list(enumerate(LOSSES))


@pytest.mark.parametrize(
    "losses", [[*LOSSES[:2], 0.05, 0.04], LOSSES[:3]], ids=["other values", "fewer epochs"]
)
def test_values_that_changed_go_to_a_second_run(tmp_path, store, losses):
    run = new_run(tmp_path, store)
    train_epochs(run)
    first = client_of(run)[1]
    kept = run.metrics_file.read_text().splitlines(keepends=True)[:3]
    write_text(run.metrics_file, "".join(kept))
    train_epochs(run, losses, first=2)
    client, second = client_of(run)
    assert history(run) == list(enumerate(losses))
    assert client.get_run(second).data.tags["topoqa.replaces"] == first
    assert client.get_run(first).data.tags["topoqa.replaced_by"] == second
    assert [client.get_run(run_id).info.status for run_id in (first, second)] == ["KILLED", "FINISHED"]


def test_an_undefined_loss_is_left_out_and_its_epoch_still_counts(tmp_path, store, lines):
    run, losses = new_run(tmp_path, store), [0.09, float("nan"), 0.07]
    train_epochs(run, losses[:2])
    train_epochs(run, losses, first=2)
    assert history(run) == [(0, 0.09), (2, 0.07)]
    assert history(run, "epoch") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert not [line for line in lines() if "left out" in line]


def test_a_changed_parameter_keeps_its_first_value_and_the_new_one_is_a_tag(tmp_path, store, lines):
    run = new_run(tmp_path, store)
    train_epochs(run, LOSSES[:2])
    more = load_config(run.config_file, ["trainer.num_epochs=300"]).config
    update_metadata(run, training_parameters=more.model_dump(mode="json"))
    train_epochs(run, first=2)
    data = copy_of(run).data
    assert data.params["trainer.num_epochs"] == "200"
    assert {name: text for name, text in data.tags.items() if name.startswith("topoqa.resumed.")} == {
        "topoqa.resumed.trainer.num_epochs": "300"
    }
    assert not [line for line in lines() if "left out" in line]


def test_a_run_that_was_deleted_in_mlflow_gets_a_new_one(tmp_path, store):
    run = new_run(tmp_path, store)
    train_epochs(run, LOSSES[:2])
    client, deleted = client_of(run)
    client.delete_run(deleted)
    train_epochs(run, first=2)
    assert client_of(run)[1] != deleted
    assert history(run) == list(enumerate(LOSSES))


def test_a_fine_tune_is_a_run_of_its_own_tagged_with_its_parent(tmp_path, store):
    parent, child = new_run(tmp_path, store, "parent"), new_run(tmp_path, store, "child")
    train_epochs(parent)
    checkpoint = (parent.checkpoints / "best.ckpt").resolve()
    score = {"selection_metric": -0.65, "val_loss": 0.05}
    update_metadata(
        child, lineage={"mode": "fine-tune", "parent_checkpoint": str(checkpoint), "parent_score": score}
    )
    train_epochs(child)
    tags, parent_id = copy_of(child).data.tags, client_of(parent)[1]
    assert client_of(child)[1] != parent_id
    assert tags["topoqa.parent_checkpoint"] == str(checkpoint)
    assert tags["topoqa.parent_run_name"] == "parent" and tags["topoqa.parent_mlflow_run_id"] == parent_id
    assert copy_of(child).data.metrics["best_selection_metric"] == -0.65  # nothing beat the parent


# --- sweeps


def test_a_sweep_that_is_stopped_ends_its_run_and_the_runs_of_killed_jobs(tmp_path, store, monkeypatch):
    config = MlflowConfig(enabled=True, tracking_uri=str(store))
    lost, done = new_run(tmp_path, store, "lost"), new_run(tmp_path, store, "done")
    with suppress(KeyboardInterrupt), open_sweep_run(config, "sweep") as sweep:
        monkeypatch.setenv(PARENT_VARIABLE, sweep.environment[PARENT_VARIABLE])
        tracking.MlflowTracker(lost, config).start()
        train_epochs(done)
        raise KeyboardInterrupt
    client = MlflowClient(store_uri(str(store)))
    assert client.get_run(sweep.environment[PARENT_VARIABLE]).info.status == "KILLED"
    assert [copy_of(run).info.status for run in (lost, done)] == ["KILLED", "FINISHED"]


def test_a_parent_in_another_store_is_ignored(tmp_path, store, monkeypatch, lines):
    monkeypatch.setenv(PARENT_VARIABLE, "0" * 32)
    run = new_run(tmp_path, store)
    train_epochs(run)
    assert read_metadata(run)["mlflow"]["parent_run_id"] is None
    assert not [line for line in lines() if "left out" in line]


def test_a_sweep_goes_on_without_its_server():
    said = []
    with open_sweep_run(
        MlflowConfig(enabled=True, tracking_uri="http://127.0.0.1:9"), "sweep", said.append
    ) as sweep:
        assert sweep.environment == {}
    assert len(said) == 1


# --- a whole training


def test_a_training_is_the_same_with_and_without_mlflow(tiny, tmp_path, store):
    tracked = {"mlflow.enabled": True, "mlflow.tracking_uri": str(store)}
    plain_run = train(load_config(None, tiny | {"paths.save_dir": str(tmp_path)}), run_name="plain")
    run = train(load_config(None, tiny | tracked | {"paths.save_dir": str(tmp_path)}), run_name="tracked")
    assert run.metrics_file.read_bytes() == plain_run.metrics_file.read_bytes()
    assert history(run) == list(enumerate(read_metrics(run).val_loss))
    assert copy_of(run).info.status == "FINISHED"
    assert read_metadata(plain_run)["mlflow"] == {}
    child = train(
        load_config(None, tiny | tracked | {"paths.save_dir": str(tmp_path)}),
        run_name="child",
        parent=run.checkpoints / "best.ckpt",
    )
    assert copy_of(child).data.tags["topoqa.parent_mlflow_run_id"] == client_of(run)[1]


def test_a_training_with_a_wrong_uri_leaves_no_directory(tiny, tmp_path):
    changes = {
        "paths.save_dir": str(tmp_path / "runs"),
        "mlflow.enabled": True,
        "mlflow.tracking_uri": "htp://host",
    }
    with pytest.raises(ConfigError, match="unknown scheme htp"):
        train(load_config(None, tiny | changes))
    assert not (tmp_path / "runs").exists()


def test_a_training_that_fails_is_failed_in_mlflow_too(tiny, tmp_path, store):
    changes = {"mlflow.enabled": True, "mlflow.tracking_uri": str(store), "optimizer.learning_rate": 1e30}
    with pytest.raises(Exception, match="finite loss"):
        train(
            load_config(None, tiny | changes | {"paths.save_dir": str(tmp_path / "runs")}),
            run_name="diverged",
        )
    assert copy_of(RunDirectory(tmp_path / "runs" / "diverged")).info.status == "FAILED"
