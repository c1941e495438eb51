"""Watching a run: real processes, kills, terminals, damage."""

import io
import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from conftest import PATIENCE, in_turn, until
from rich.console import Console

from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.console import duration
from topoqa_nb.ground.core import RunError
from topoqa_nb.ground.machine import this_process
from topoqa_nb.runs import monitor as page
from topoqa_nb.runs.monitor import change_line, monitor, snapshot, snapshots, view
from topoqa_nb.runs.progress import left_text
from topoqa_nb.runs.record import RunDirectory, read_metadata, update_metadata
from topoqa_nb.runs.runs import METRIC_COLUMNS, create_run, invent_epoch, read_metrics
from topoqa_nb.runs.selection import candidate, update_links

TRAINER = """
import sys, time
from topoqa_nb.ground.config import load_config
from topoqa_nb.runs.record import update_metadata
from topoqa_nb.runs.runs import invent_epoch, create_run
loaded = load_config(None, [f"paths.save_dir={sys.argv[1]}", "num_epochs=500"])
run = create_run(sys.argv[1], "live", loaded, loaded.config)
for epoch in range(int(sys.argv[2])):
    invent_epoch(run, {"epoch": epoch, "step": epoch, "val_loss": 0.1, "selection_metric": -0.1 * epoch})
    update_metadata(run, progress={"epoch": epoch}, runtime={"epoch_seconds": [60.0] * (epoch + 1)})
    time.sleep(0.2)
if sys.argv[3] == "completes":
    update_metadata(run, status="completed")
else:
    print("waits", flush=True)
    time.sleep(600)
"""
FOLLOWER = """
import sys
from topoqa_nb.runs.monitor import monitor
from topoqa_nb.runs.runs import find_run
monitor(find_run(sys.argv[1], "live"), following=True, interval=0.1, style=sys.argv[2])
"""


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def run(root):
    return new_run(root, "a")


def new_run(root, name, *overrides):
    loaded = load_config(None, [f"paths.save_dir={root}", "num_epochs=10", *overrides])
    return create_run(root, name, loaded, loaded.config)


def epochs(run, *losses, seconds=60.0):
    for loss in losses:
        epoch = len(read_metrics(run))
        invent_epoch(run, {"epoch": epoch, "step": epoch, "val_loss": loss, "selection_metric": loss - 0.5})
        update_metadata(run, progress={"epoch": epoch}, runtime={"epoch_seconds": [seconds] * (epoch + 1)})


def text(renderable, width=240):
    file = io.StringIO()
    page.show(renderable, Console(file=file, width=width, force_terminal=False, force_jupyter=False))
    return file.getvalue()


def start(script, *arguments, **options):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# --- one look


def test_looking_needs_no_torch():
    code = "import sys, topoqa_nb.runs.monitor; print([name for name in ('torch', 'pytorch_lightning') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_looking_changes_nothing(run):
    epochs(run, 0.2, 0.1)
    before = {path: path.lstat().st_mtime_ns for path in run.path.rglob("*")}
    snapshot(run, rows=5), text(view(snapshot(run, rows=5)))
    assert {path: path.lstat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_run_before_its_first_epoch(run):
    seen = snapshot(run, rows=3)
    assert (seen["best"]["best_score"], seen["best_checkpoint"], seen["metrics"]) == (None, None, [])
    assert seen["progress"]["seconds_left"] is None
    shown = text(view(seen))
    assert (
        "none yet" in shown
        and "unknown before the first epoch is done" in shown
        and "0 of 10 epochs" in shown
    )


def test_the_best_checkpoint_and_what_made_it(run):
    epochs(run, 0.2, 0.1, 0.15)
    best = candidate(-0.4, 0.1, 1)
    (run.checkpoints / best.filename).write_text("weights")
    update_links(run.checkpoints, [best])
    seen = json.loads(json.dumps(snapshot(run, rows=2), allow_nan=False))
    assert seen["best"] == {
        "metric": "selection_metric", "best_score": -0.4, "best_epoch": 1, "best_val_loss": 0.1, "best_val_spearman": None,
    }  # fmt: skip
    assert seen["best_checkpoint"] == str(run.checkpoints / best.filename)
    assert seen["parameters"]["optimizer.learning_rate"] == 0.005
    assert [row["epoch"] for row in seen["metrics"]] == [1, 2]
    assert list(seen["metrics"][0]) == list(METRIC_COLUMNS)
    assert len(snapshot(run, rows=99)["metrics"]) == 3


@pytest.mark.parametrize(
    ("overrides", "losses", "epochs_left", "to_stop"),
    [
        ([], [0.3, 0.2, 0.1], 7, 25),
        (["early_stopping.patience=4"], [0.3, 0.1, 0.2, 0.2], 6, 2),
        (["early_stopping.patience=4", "early_stopping.min_delta=0.05"], [0.3, 0.29, 0.28], 7, 2),
        (["early_stopping.patience=0"], [0.3], 9, 1),
        (["num_epochs=3"], [0.3, 0.2, 0.1], 0, 25),
    ],
)
def test_what_is_left(root, overrides, losses, epochs_left, to_stop):
    run = new_run(root, "b", *overrides)
    epochs(run, *losses)
    far = snapshot(run)["progress"]
    assert (far["epochs_left"], far["epochs_to_early_stop"]) == (epochs_left, to_stop)
    assert (far["seconds_left"], far["seconds_to_early_stop"]) == (60.0 * epochs_left, 60.0 * to_stop)
    assert ("if nothing improves" in left_text(far)) == (to_stop < epochs_left)


def test_waiting_of_early_stopping_is_that_of_lightning(tmp_path):
    import torch
    from pytorch_lightning.callbacks import EarlyStopping

    from topoqa_nb.runs.progress import idle_epochs

    generator = torch.Generator().manual_seed(0)
    for min_delta in (0.0, 0.1):
        values = torch.rand(200, generator=generator).tolist()
        stopping = EarlyStopping("loss", patience=1000, min_delta=min_delta)
        for value in values:
            stopping._evaluate_stopping_criteria(torch.tensor(value, dtype=torch.float64))
        assert idle_epochs(values, min_delta) == stopping.wait_count


def test_a_fine_tune_waits_from_its_parents_score_on(root):
    run = new_run(root, "b", "early_stopping.patience=5")
    update_metadata(run, lineage={"parent_score": {"selection_metric": -0.45, "val_loss": 0.05}})
    epochs(run, 0.2, 0.15)
    assert snapshot(run)["progress"]["epochs_to_early_stop"] == 3
    update_metadata(run, selection={"best_epoch": -1, "best_score": -0.45})
    assert "at the parent" in change_line(snapshot(run))


def test_pace_is_that_of_the_last_epochs(run):
    epochs(run, 0.2)
    update_metadata(run, runtime={"epoch_seconds": [900.0] * 20 + [10.0] * 10})
    assert snapshot(run)["progress"]["seconds_per_epoch"] == 10.0


@pytest.mark.parametrize("status", ["completed", "interrupted", "failed"])
def test_a_run_that_has_ended(run, status):
    epochs(run, 0.2)
    update_metadata(run, status=status, reason="stopped\nby SIGTERM" if status != "completed" else None)
    seen = snapshot(run)
    assert seen["ended"] and seen["process"] is None and left_text(seen["progress"]) is None
    assert len(change_line(seen).splitlines()) == 1
    assert [look["status"] for look in snapshots(run, interval=3600)] == [status]


def test_names_are_not_markup(root):
    shown = text(view(snapshot(new_run(root, "run[red]1"))))
    assert "run[red]1" in shown


@in_turn(
    "seconds, words",
    [(0, "0 s"), (59.6, "59 s"), (61, "1 min"), (7260, "2 h 1 min"), (90000, "1 d 1 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


# --- the process


@pytest.mark.parametrize(
    ("change", "state", "ended"),
    [
        ({}, "alive", False),
        ({"started": 1.0}, "gone", True),
        ({"pid": 2**22 + 1}, "gone", True),
        ({"host": "elsewhere", "pid": 1}, "unknown", False),
        ({"pid": "x"}, "unknown", False),
        ({"started": None}, "unknown", False),
    ],
)
def test_the_process_of_a_running_run(run, change, state, ended):
    update_metadata(run, environment={"process": this_process() | change})
    seen = snapshot(run)
    assert (seen["process"], seen["ended"]) == (state, ended)


def test_a_run_that_recorded_no_process_is_not_declared_dead(run):
    metadata = read_metadata(run)
    del metadata["environment"]["process"]
    run.metadata_file.write_text(json.dumps(metadata))
    assert (snapshot(run)["process"], snapshot(run)["ended"]) == ("unknown", False)
    assert "cannot be checked" in change_line(snapshot(run))


def test_a_killed_process_that_nobody_has_waited_for(run):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    import psutil

    process = this_process() | {"pid": child.pid, "started": psutil.Process(child.pid).create_time()}
    update_metadata(run, environment={"process": process})
    assert snapshot(run)["process"] == "alive"
    child.kill()
    until(lambda: snapshot(run)["process"] == "gone")
    child.wait()
    assert snapshot(run)["process"] == "gone"


# --- following


def test_follow_ends_with_the_run(root):
    trainer = start(TRAINER, root, 6, "completes")
    until(lambda: (root / "live").exists())
    follower = start(FOLLOWER, root, "table")
    out, problems = follower.communicate(timeout=PATIENCE)
    trainer.communicate(timeout=PATIENCE)
    lines = out.splitlines()
    assert problems == "" and follower.returncode == 0
    assert lines[-1].startswith("completed | 6 of 500 epochs | best selection_metric -0.50000 at epoch 5")
    assert len(lines) == len(set(lines)), "a line only when something has changed"
    assert "\x1b" not in out


def test_follow_ends_when_the_run_is_killed(root):
    trainer = start(TRAINER, root, 2, "waits")
    assert trainer.stdout.readline() == "waits\n"
    follower = start(FOLLOWER, root, "json")
    first = json.loads(follower.stdout.readline())
    assert (first["status"], first["process"], first["progress"]["epochs_done"]) == ("running", "alive", 2)
    os.kill(trainer.pid, signal.SIGKILL)
    out, problems = follower.communicate(timeout=PATIENCE)
    trainer.communicate()
    last = json.loads(out.splitlines()[-1])
    assert (last["status"], last["process"], last["ended"]) == ("running", "gone", True)
    assert follower.returncode == 0 and problems == ""


def test_ctrl_c_ends_the_watching_and_not_the_run(root):
    trainer = start(TRAINER, root, 1, "waits")
    assert trainer.stdout.readline() == "waits\n"
    follower = start(FOLLOWER, root, "table")
    assert follower.stdout.readline().startswith("running")
    follower.send_signal(signal.SIGINT)
    out, problems = follower.communicate(timeout=PATIENCE)
    assert (follower.returncode, problems) == (0, "")
    assert trainer.poll() is None
    trainer.kill()
    trainer.communicate()


def test_a_terminal_is_redrawn(root):
    run = new_run(root, "live")
    epochs(run, 0.2)
    ours, theirs = pty.openpty()
    options = {"env": os.environ | {"TERM": "xterm", "COLUMNS": "100"}}
    follower = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, str(root), "table"],
        stdout=theirs,
        stderr=theirs,
        close_fds=True,
        **options,
    )
    os.close(theirs)
    screen, begun = b"", False
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        screen += part
        if not begun and b"1 of 10 epochs" in screen:
            begun = True
            epochs(run, 0.1)
            update_metadata(run, status="completed")
    assert follower.wait(PATIENCE) == 0
    os.close(ours)
    assert b"\x1b[1A" in screen, "the cursor goes up and draws again"
    assert b"1 of 10 epochs" in screen and b"2 of 10 epochs" in screen and b"completed" in screen


def test_an_environment_that_forces_colours_does_not_draw_into_a_file(root):
    run = new_run(root, "live")
    update_metadata(run, status="completed")
    out = start(FOLLOWER, root, "table", env=os.environ | {"FORCE_COLOR": "1"}).communicate(timeout=PATIENCE)[
        0
    ]
    assert out.startswith("completed |") and "\x1b" not in out


def test_json_stands_alone_and_is_not_folded(run, capsys):
    epochs(run, 0.2)
    update_metadata(run, notes="x" * 500, source_config="/" + "y" * 300 + ".yaml")
    monitor(run, style="json", rows=1)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["source_config"] == "/" + "y" * 300 + ".yaml"
    assert printed.err == ""


# --- damage


def test_a_bad_first_look_is_an_error_at_once(run, monkeypatch):
    run.metadata_file.write_text('{"status": "runn')
    monkeypatch.setattr(page.time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(RunError, match="run_metadata.json: expected valid JSON"):
        monitor(run, following=True, interval=3600)


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_half_written_metrics(run, cut):
    epochs(run, 0.2, 0.1)
    whole = run.metrics_file.read_text()
    run.metrics_file.write_text(whole[:-cut])
    with pytest.raises(RunError, match="metrics.csv: expected a whole last line") as problem:
        snapshot(run)
    assert len(str(problem.value).splitlines()) == 1


def test_one_bad_look_is_forgiven_and_two_are_not(run, monkeypatch):
    epochs(run, 0.2)
    whole = run.metadata_file.read_text()
    contents = [whole[:40], whole, whole[:40], whole[:40]]  # at the second look, the third, ...
    monkeypatch.setattr(page.time, "sleep", lambda seconds: run.metadata_file.write_text(contents.pop(0)))
    looks = snapshots(run)
    next(looks)
    assert next(looks)["status"] == "running"
    with pytest.raises(RunError, match="expected valid JSON"):
        next(looks)
    assert contents == []


def test_a_run_that_disappears(run):
    looks = snapshots(run, interval=0.01)
    next(looks)
    run.path.rename(run.path.with_name("moved"))
    with pytest.raises(RunError, match="no such file"):
        next(looks)
    assert snapshot(RunDirectory(run.path.with_name("moved")))["run_name"] == "moved"
