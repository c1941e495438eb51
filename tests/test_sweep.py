"""Sweeps with real trainings: several at once, one that dies, an interruption, and what need not be repeated."""

import fcntl
import functools
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import PATIENCE, forked, in_turn, is_running, speak_into, until

from topoqa_nb import cli
from topoqa_nb.data.dataset import locate_data
from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import DemoPaths, write_tiny_dataset
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import CheckpointError, ConfigError, DataError, RunError, write_json
from topoqa_nb.ground.machine import available_cores, this_process
from topoqa_nb.ground.signals import Interrupted
from topoqa_nb.network.weights import read_checkpoint
from topoqa_nb.runs.record import RunDirectory, read_metadata
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.sweep import sweep as sweep_page
from topoqa_nb.sweep.jobs import SweepResult, child_environment, job_slots, result_of, results_table
from topoqa_nb.sweep.manifest import Job, load_manifest, plan_jobs, training_command
from topoqa_nb.sweep.processes import PRELOADED, ForkServer
from topoqa_nb.sweep.sweep import SweepInterrupted, completed_before, run_jobs
from topoqa_nb.sweep.table import run_figures

COMPLETES = "say('completed', selection={'best_score': -0.5}, checkpoints={'best': 'a.chkpt'})"


def stand_in(*scripts: str):
    "A command for `run_jobs`: job N runs script N, or the last one."
    started = []

    def command(job: Job) -> list[str]:
        started.append(job.name)
        script = scripts[min(len(started), len(scripts)) - 1]
        return ["-m", "stand_in", str(job.run.path), script]

    return command


@pytest.fixture(scope="module", autouse=True)
def stand_ins() -> Iterator[None]:
    "Every process finds the stand-in."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    "A stand-in needs no PyTorch."
    monkeypatch.setattr("topoqa_nb.sweep.places.PRELOADED", ())


def write_manifest(folder: Path, demo: DemoPaths, **content: object) -> Path:
    "A manifest whose shared settings make a training of three short epochs."
    paths = {f"paths.{name}": str(getattr(demo, name)) for name in ("train_labels", "val_labels")}
    overrides = paths | {"paths.graph": str(demo.graph_dir), "num_epochs": 3, "accumulate_grad_batches": 1}
    shared = {
        "config": "config.yaml",
        "output_root": "runs",
        "overrides": overrides | {"model.hidden_dim": 8},
    }
    shared |= content.pop("shared", {})
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump({"shared": shared, "jobs": [{"name": "a"}]} | content))
    return path


def plan(folder: Path, demo: DemoPaths, names: str = "a", **options: object) -> list[Job]:
    manifest = write_manifest(folder, demo, jobs=[{"name": name} for name in names])
    return plan_jobs(load_manifest(manifest), **options)


# --- planning


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["manifest.yaml", "expected a file"]),
        ("jobs: [", ["manifest.yaml", "expected valid YAML"]),
        ("- a\n- b", ["manifest.yaml", "names with values"]),
        ("", ["manifest.yaml: jobs", "found nothing"]),
        ("shared: {config: config.yaml}", ["manifest.yaml: jobs", "found nothing"]),
        ("jobs: []", ["manifest.yaml: jobs", "found nothing"]),
        ("jobs: [{config: config.yaml}]", ["manifest.yaml: jobs.0.name"]),
        ("jobs: [{name: a}]\njosb: 3", ["manifest.yaml: josb", "did you mean jobs?"]),
        ("jobs: [{name: a}]\npath: x", ["manifest.yaml: path", "unknown"]),
        ("jobs: [{name: a, ovverrides: {}}]", ["jobs.0.ovverrides", "did you mean overrides?"]),
        ("shared: {resume_from: x}\njobs: [{name: a}]", ["shared.resume_from", "unknown"]),
        ("jobs: [{name: a, fast_dev_run: 2}]", ["jobs.0.fast_dev_run", "true or false"]),
        ("jobs: [{name: ../a}]", ["jobs.0.name", "names a folder"]),
        ("jobs: [{name: a}, {name: a}]", ["manifest.yaml", "different job names", "a more than once"]),
        ("continue_on_error: 1\njobs: [{name: a}]", ["continue_on_error", "true or false"]),
    ],
)
def test_a_wrong_manifest_is_one_line_with_the_place(tmp_path: Path, text: str | None, parts: list[str]):
    path = tmp_path / "manifest.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_manifest(path)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@in_turn(
    "job, error, parts",
    [
        ({}, ConfigError, ["jobs.0.config", "give the job or shared a config"]),
        ({"config": "absent_anywhere.yaml"}, ConfigError, ["jobs.0.config", "absent_anywhere.yaml"]),
        ({"config": "config.yaml", "overrides": {"sed": 3}}, ConfigError, ["jobs.0", "sed", "seed"]),
        ({"config": "config.yaml", "overrides": {"seed": "x"}}, ConfigError, ["jobs.0", "dataloader.seed"]),
        (
            {"config": "config.yaml", "limit_train_batches": -1},
            ConfigError,
            ["jobs.0", "limit_train_batches"],
        ),
        (
            {"config": "config.yaml", "resume_from": "no.ckpt"},
            CheckpointError,
            ["jobs.0.resume_from", "no.ckpt"],
        ),
    ],
)
def test_a_wrong_job_is_refused_before_anything_starts(
    tmp_path: Path, job: dict, error: type, parts: list[str]
):
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"jobs": [{"name": "a"} | job]}))
    with pytest.raises(error) as caught:
        plan_jobs(load_manifest(path))
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_an_empty_shared_section_is_no_mistake(tmp_path: Path):
    path = tmp_path / "manifest.yaml"
    path.write_text("shared:\njobs: [{name: a, config: config.yaml}]")
    assert len(plan_jobs(load_manifest(path))) == 1


def test_precedence_is_file_shared_job_command_line(tmp_path: Path):
    (tmp_path / "own.yaml").write_text(
        "dataloader: {seed: 1, batch_size: 1}\nmodel: {hidden_dim: 2, num_layers: 1}"
    )
    shared = {"config": "own.yaml", "overrides": ["batch_size=2", "model.hidden_dim=4", "model.num_layers=2"]}
    job = {"name": "a", "overrides": {"model.hidden_dim": 6, "model.num_layers": 3}}
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"shared": shared, "jobs": [job]}))
    config = plan_jobs(load_manifest(path), overrides=["model.num_layers=4"])[0].loaded.config
    found = (
        config.dataloader.seed,
        config.dataloader.batch_size,
        config.model.hidden_dim,
        config.model.num_layers,
    )
    assert found == (1, 2, 6, 4)


def test_where_a_config_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = [tmp_path / "sweeps" / "manifests", tmp_path / "sweeps", tmp_path / "here"]
    for seed, place in enumerate(places):
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.yaml").write_text(f"dataloader: {{seed: {seed}}}")
    monkeypatch.chdir(places[2])
    path = places[0] / "manifest.yaml"
    path.write_text("jobs: [{name: a, config: config.yaml}]")
    seeds = []
    for place in [*places, None]:
        seeds.append(plan_jobs(load_manifest(path))[0].loaded.config.dataloader.seed)
        if place:
            (place / "config.yaml").unlink()
    assert seeds == [0, 1, 2, 222]  # the last one is shipped


def test_paths_belong_to_whoever_wrote_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, here = tmp_path / "manifests", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    path = folder / "manifest.yaml"
    shared = {"config": "config.yaml", "output_root": "../runs", "overrides": {"graph_dir": "graphs"}}
    path.write_text(yaml.safe_dump({"shared": shared, "jobs": [{"name": "a"}]}))
    paths = plan_jobs(load_manifest(path))[0].loaded.config.paths
    assert (paths.graph, paths.save_dir) == (folder / "graphs", tmp_path / "runs")
    paths = plan_jobs(load_manifest(path), overrides=["paths.graph=mine"], output_root="out")[
        0
    ].loaded.config.paths
    assert (paths.graph, paths.save_dir) == (here / "mine", here / "out")


def test_short_keys_reach_the_configuration(tmp_path: Path, demo: DemoPaths):
    shared = {"limit_val_batches": 0.5, "log_lr": True, "notes": "shared", "trial_label": "t"}
    job = {"name": "a", "fast_dev_run": True, "limit_train_batches": 2, "notes": "own", "run_name": "mine"}
    job = plan_jobs(load_manifest(write_manifest(tmp_path, demo, shared=shared, jobs=[job])))[0]
    config = job.loaded.config
    assert config.trainer.fast_dev_run
    assert (config.trainer.limit_train_batches, config.trainer.limit_val_batches) == (2, 0.5)
    assert config.logging.log_lr
    assert (job.notes, job.trial_label, job.run_name) == ("own", "t", "mine")


def test_planning_writes_nothing(tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    plan_jobs(load_manifest("run_demo.yaml"))
    plan_jobs(load_manifest("manifests/run_core.yaml"))
    assert list(tmp_path.iterdir()) == []


@in_turn("name, count", [("core", 3), ("extended", 9), ("experiments", 1), ("demo", 3)])
def test_shipped_manifests_plan(name: str, count: int):
    jobs = plan_jobs(load_manifest(f"run_{name}.yaml"))
    assert len(jobs) == count
    assert len({job.run_name for job in jobs}) == count


def test_the_command_repeats_the_plan(tmp_path: Path, demo: DemoPaths):
    tricky = {
        "mlflow.tags": {"a": "1", "b": "x: y"},
        "paths.target_regex": "^([A-Z]+)_",
        "learning_rate": 1e-5,
    }
    tricky |= {"trainer.gradient_clip_val": None}
    manifest = write_manifest(tmp_path, demo, jobs=[{"name": "a", "overrides": tricky}])
    job = plan_jobs(load_manifest(manifest))[0]
    command = training_command(job)
    overrides = [after for before, after in zip(command, command[1:], strict=False) if before == "--override"]
    assert load_config(command[command.index("--config") + 1], overrides).config == job.loaded.config


# --- processes and threads


def test_threads_follow_the_configuration(tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr("topoqa_nb.ground.machine.available_cores", lambda: 8)
    jobs = [plan(tmp_path, demo, overrides=[f"trainer.num_threads={count}"])[0] for count in (1, 2, "auto")]
    found = [[child_environment(job, slots)["OMP_NUM_THREADS"] for job in jobs] for slots in (1, 3)]
    assert found == [["1", "2", "8"], ["1", "2", "2"]]


@in_turn("asked, slots", [("auto", 4), (1, 1), (2, 2), (9, 4)])
def test_auto_fills_the_cores_and_is_never_more_than_jobs(
    asked: object, slots: int, tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("topoqa_nb.sweep.jobs.available_cores", lambda: 3)
    assert job_slots(asked, plan(tmp_path, demo, "abcd")) == slots  # three and one would leave two cores idle
    assert job_slots(asked, plan(tmp_path, demo, "a")) == 1


@pytest.mark.usefixtures("light")
def test_a_process_learns_how_many_share_the_cores_and_its_configuration_stays(
    tmp_path: Path, demo: DemoPaths
):
    "The child's own count, its libraries' limit, and what is said are the same."
    script = (
        "from topoqa_nb.ground.machine import thread_count; import torch;"
        "found = [thread_count('auto'), int(os.environ['OMP_NUM_THREADS']), torch.get_num_threads()];"
        "say('completed', found=found)"
    )
    with ForkServer(PRELOADED) as server:
        for slots in (1, 2):
            folder, lines = tmp_path / str(slots), []
            folder.mkdir()
            jobs = plan(folder, demo, "ab"[:slots], overrides=["trainer.num_threads=auto"])
            run_jobs(jobs, jobs=slots, command=stand_in(script), say=lines.append, server=server)
            threads = max(1, available_cores() // slots)
            assert [read_metadata(job.run)["found"] for job in jobs] == [[threads] * 3] * slots
            jobs_text, threads_text = "job" + "s" * (slots > 1), "thread" + "s" * (threads > 1)
            assert lines[0] == f"{slots} {jobs_text}, {slots} at a time, {threads} {threads_text} each"
            assert "num_threads=1" not in " ".join(training_command(jobs[0]))


# --- the graphs, before the first job


def other_data(folder: Path, job: Job, damaged: bool) -> Job:
    "The job, on graphs of its own."
    paths = write_tiny_dataset(folder)
    if damaged:
        (paths.graph_dir / "cut.pt").touch()
    names = ("train_labels", "val_labels")
    overrides = {f"paths.{name}": str(getattr(paths, name)) for name in names}
    overrides |= {"paths.graph": str(paths.graph_dir), "paths.store": str(folder / "store")}
    return replace(job, loaded=load_config(job.loaded.source, job.loaded.overrides | overrides))


@pytest.mark.usefixtures("light")
def test_every_graph_directory_is_packed_once_before_the_first_job(
    tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
):
    jobs = plan(tmp_path, demo, "abc")
    jobs[1] = other_data(tmp_path / "other", jobs[1], damaged=False)
    opened = []

    def counted(graph_dir: Path, **options: object):
        assert not any(job.run.path.exists() for job in jobs)
        opened.append((graph_dir, options["store_dir"]))
        return open_store(graph_dir, **options)

    monkeypatch.setattr("topoqa_nb.sweep.sweep.open_store", counted)
    result = run_jobs(jobs, command=stand_in(COMPLETES), say=lambda line: None)
    assert result.completed
    assert opened == [
        (demo.graph_dir, None),
        (tmp_path / "other" / "graph_data", tmp_path / "other" / "store"),
    ]
    assert list((tmp_path / "other" / "store").glob("*/*/header"))


@pytest.mark.usefixtures("light")
def test_a_damaged_graph_ends_a_sweep_before_it_begins(tmp_path: Path, demo: DemoPaths):
    good, job = plan(tmp_path, demo, "ab")
    bad = other_data(tmp_path / "bad", job, damaged=True)
    for jobs, tolerant in (([good, bad], False), ([bad], True)):
        with pytest.raises(DataError, match="cut.pt"):
            run_jobs(jobs, command=stand_in(COMPLETES), continue_on_error=tolerant, say=lambda line: None)
    assert not good.run.path.exists()


@pytest.mark.usefixtures("light")
def test_with_continue_on_error_a_damaged_graph_is_the_failure_of_its_own_jobs(
    tmp_path: Path, demo: DemoPaths
):
    jobs, lines = plan(tmp_path, demo, "abc"), []
    jobs[0] = other_data(tmp_path / "bad", jobs[0], damaged=True)
    jobs[2] = replace(jobs[0], name="c", run_name="c")
    result = run_jobs(jobs, command=stand_in(COMPLETES), continue_on_error=True, say=lines.append)
    assert [job.status for job in result] == ["failed", "completed", "failed"]
    assert [line.split(":")[0] for line in lines[1:3]] == ["a | failed", "c | failed"]
    assert "cut.pt" in result.jobs[2].reason
    assert not jobs[0].run.path.exists()


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_packing_starts_nothing(
    signum: int, tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signum)
        time.sleep(5)

    monkeypatch.setattr("topoqa_nb.sweep.sweep.open_store", interrupted)
    job = plan(tmp_path, demo)[0]
    with pytest.raises(Interrupted) as caught:
        run_jobs([job], command=stand_in(COMPLETES), say=lambda line: None)
    assert caught.value.signum == signum
    assert not job.run.path.exists()


# --- running, with stand-ins


@pytest.mark.usefixtures("light")
def test_a_job_that_is_killed_is_failed_and_says_so(tmp_path: Path, demo: DemoPaths):
    killed = "say('running'); os.kill(os.getpid(), signal.SIGKILL)"
    jobs = plan(tmp_path, demo, "ab")
    result = run_jobs(
        jobs, command=stand_in(killed, COMPLETES), continue_on_error=True, say=lambda line: None
    )
    assert [job.status for job in result] == ["failed", "completed"]
    assert "SIGKILL" in result.jobs[0].reason
    assert read_metadata(jobs[0].run)["status"] == "failed"  # nobody waits for a dead run


@pytest.mark.usefixtures("light")
def test_status_comes_from_the_metadata_and_not_from_the_exit_code(tmp_path: Path, demo: DemoPaths):
    scripts = [
        f"{COMPLETES}; sys.exit(3)",
        "say('running')",
        "pass",
        "print('why', file=sys.stderr); sys.exit(2)",
    ]
    result = run_jobs(
        plan(tmp_path, demo, "abcd"),
        command=stand_in(*scripts),
        continue_on_error=True,
        say=lambda line: None,
    )
    assert [job.status for job in result] == ["completed", "failed", "failed", "failed"]
    assert "exit code 0" in result.jobs[1].reason
    assert result.jobs[3].reason == "why"


@pytest.mark.usefixtures("light")
def test_damaged_metadata_fail_their_own_job_alone(tmp_path: Path, demo: DemoPaths):
    damaged = "say('x'); (run / 'run_metadata.json').write_text('{')"
    result = run_jobs(
        plan(tmp_path, demo, "ab"),
        command=stand_in(damaged, COMPLETES),
        continue_on_error=True,
        say=lambda line: None,
    )
    assert [job.status for job in result] == ["failed", "completed"]
    assert "valid JSON" in result.jobs[0].reason


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(("goes_on", "last"), [(False, "not started"), (True, "completed")])
def test_continue_on_error(tmp_path: Path, demo: DemoPaths, goes_on: bool, last: str):
    result = run_jobs(
        plan(tmp_path, demo, "ab"),
        command=stand_in("sys.exit(1)", COMPLETES),
        continue_on_error=goes_on,
        say=lambda line: None,
    )
    assert [job.status for job in result] == ["failed", last]
    assert not result.completed


@pytest.mark.usefixtures("light")
def test_jobs_run_at_the_same_time_and_never_more_than_asked(tmp_path: Path, demo: DemoPaths):
    (tmp_path / "marks").mkdir()
    script = f"""
marks = Path({str(tmp_path / "marks")!r})
(marks / f"{{run.name}}.begun").touch()
count = lambda what: len(list(marks.glob(f"*.{{what}}")))
while count("begun") < 2:  # the first one waits for the second one
    time.sleep(0.01)
time.sleep(0.2)
seen = count("begun") - count("done")
say("completed", selection={{"best_score": seen}})
(marks / f"{{run.name}}.done").touch()
"""
    result = run_jobs(plan(tmp_path, demo, "abcd"), jobs=2, command=stand_in(script), say=lambda line: None)
    assert max(job.score for job in result) == 2


@pytest.mark.usefixtures("light")
def test_results_keep_the_order_of_the_manifest(tmp_path: Path, demo: DemoPaths):
    slow_first = stand_in(f"time.sleep(0.5); {COMPLETES}", COMPLETES)
    result = run_jobs(plan(tmp_path, demo, "zab"), jobs=3, command=slow_first, say=lambda line: None)
    assert [job.name for job in result] == ["z", "a", "b"]
    assert json.loads(json.dumps(result.to_dict()))["jobs"][0]["checkpoint"].endswith(
        "model_checkpoints/a.chkpt"
    )
    assert results_table(result).splitlines()[1].split()[:3] == ["z", "completed", "-0.50000"]


@pytest.mark.usefixtures("light")
def test_only_epoch_summaries_are_relayed_even_when_they_come_in_pieces(tmp_path: Path, demo: DemoPaths):
    script = (
        "print('Epoch 000 |  50% | train_loss=1'); print('chatter');"
        "sys.stdout.write('Epoch 000 | train_loss=1 | val_'); sys.stdout.flush(); time.sleep(0.4);"
        f"print('loss=2'); {COMPLETES}"
    )
    lines = []
    run_jobs(plan(tmp_path, demo), command=stand_in(script), say=lines.append)
    assert [line for line in lines if "Epoch" in line] == ["a | Epoch 000 | train_loss=1 | val_loss=2"]


@pytest.mark.usefixtures("light")
def test_a_taken_name_is_refused_before_anything_starts(tmp_path: Path, demo: DemoPaths):
    jobs = plan(tmp_path, demo, "ab")
    jobs[1].run.path.mkdir(parents=True)
    with pytest.raises(RunError, match="a run of this name"):
        run_jobs(jobs, command=stand_in(COMPLETES))
    assert not jobs[0].run.path.exists()


@pytest.mark.usefixtures("light")
def test_labels_that_are_missing_are_refused_before_anything_starts(tmp_path: Path, demo: DemoPaths):
    jobs = plan(
        tmp_path, demo, overrides=["paths.graph=nowhere", "paths.train_labels=null", "paths.val_labels=null"]
    )
    with pytest.raises(Exception, match="train_labels|nowhere"):
        run_jobs(jobs, command=stand_in(COMPLETES))
    assert not jobs[0].run.path.exists()


@pytest.mark.usefixtures("light")
def test_what_a_dead_job_has_started_does_not_outlive_it(tmp_path: Path, demo: DemoPaths):
    script = (
        "helper = subprocess.Popen(['sleep', '60']); say('running', pid=helper.pid);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    jobs = plan(tmp_path, demo)
    run_jobs(jobs, command=stand_in(script), say=lambda line: None)
    until(lambda: not is_running(read_metadata(jobs[0].run)["pid"]))


@pytest.mark.usefixtures("light")
def test_a_job_that_ignores_the_signal_is_killed(
    tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("topoqa_nb.sweep.sweep.STOP_SECONDS", 0.5)
    script = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('running', pid=os.getpid());"
        "print('Epoch 000 | val_loss=1', flush=True); time.sleep(600)"
    )
    jobs = plan(tmp_path, demo)

    def stop(line: str) -> None:
        if "Epoch" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SweepInterrupted) as caught:
        run_jobs(jobs, command=stand_in(script), say=stop)
    assert caught.value.signum == signal.SIGTERM
    assert caught.value.result.jobs[0].status == "interrupted"
    assert read_metadata(jobs[0].run)["status"] == "interrupted"
    assert not is_running(read_metadata(jobs[0].run)["pid"])


@pytest.mark.usefixtures("light")
def test_a_closed_pipe_leaves_no_process_behind(tmp_path: Path, demo: DemoPaths):
    script = "say('running', pid=os.getpid()); print('Epoch 000 | val_loss=1', flush=True); time.sleep(600)"
    jobs = plan(tmp_path, demo)

    def closed(line: str) -> None:
        if "Epoch" in line:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_jobs(jobs, command=stand_in(script), say=closed)
    assert not is_running(read_metadata(jobs[0].run)["pid"])
    assert read_metadata(jobs[0].run)["status"] == "interrupted"


@pytest.mark.usefixtures("light")
def test_signal_handlers_are_put_back(tmp_path: Path, demo: DemoPaths):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    run_jobs(plan(tmp_path, demo), command=stand_in(COMPLETES), say=lambda line: None)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


# --- the table in a terminal


def batch_of_stand_ins(terminal: int, script: str, arguments: list[str], environment: dict[str, str]) -> None:
    "As a process whose terminal this is: `topoqa batch`, whose jobs execute the script."
    os.login_tty(terminal)  # its Ctrl-C goes to this process
    os.environ.update(environment)
    speak_into(1, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.PRELOADED = ()  # a stand-in needs no PyTorch
    sweep_page.run_jobs = functools.partial(run_jobs, command=stand_in(script))
    sys.exit(cli.main(arguments))


# The files of a run after two of three epochs of a minute each.
TWO_EPOCHS = """
say('running', progress={'epochs': 3}, selection={'best_score': -0.61}, runtime={'epoch_seconds': [61.0, 61.0]})
from topoqa_nb.runs.runs import METRIC_COLUMNS
rows = [{'epoch': 0, 'step': 1, 'val_loss': 0.08}, {'epoch': 1, 'step': 2, 'val_loss': 0.0712, 'val_spearman_corr': 0.68}]
(run / 'metrics').mkdir()
lines = [','.join(str(row.get(name, '')) for name in METRIC_COLUMNS) for row in rows]
(run / 'metrics' / 'metrics.csv').write_text('\\n'.join([','.join(METRIC_COLUMNS), *lines]) + '\\n')
print('Epoch 001 | train_loss=0.1 | val_loss=0.0712', flush=True)
"""
SHOWN = ["2/3", "0.07120", "0.68000", "-0.61000"]


def in_terminal(
    folder: Path,
    demo: DemoPaths,
    names: str,
    script: str,
    act: Callable = lambda process, keyboard: None,
    **more: str,
) -> tuple[int, str]:
    "Exit code and raw output of a batch in a terminal; `act` is called as soon as two jobs' numbers are on the screen."
    manifest = write_manifest(folder, demo, jobs=[{"name": name} for name in names])
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    arguments = ["batch", "--manifest", str(manifest), "--jobs", "2"]
    process = forked(batch_of_stand_ins, theirs, script, arguments, {"TERM": "xterm-256color"} | more)
    os.close(theirs)
    text, acted = "", False
    try:
        while piece := _read(ours):
            text += piece
            if not acted and {"a", "b"} <= {
                line[0] for line in words(text) if line[1:6] == ["running", *SHOWN]
            }:
                acted = True
                act(process, ours)
        process.join(PATIENCE)
        return process.exitcode, text
    finally:
        process.kill()
        process.join()
        os.close(ours)


def _read(descriptor: int) -> str:
    try:
        return os.read(descriptor, 65536).decode(errors="replace")
    except OSError:  # the other side has closed it
        return ""


def words(text: str) -> list[list[str]]:
    "The words of each line, without colours and movements of the cursor."
    return [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", " ", line).split() for line in re.split(r"[\r\n]+", text)]


def assert_clean(text: str) -> None:
    "The cursor is visible in the end, and what stays on the screen was written after the table was erased."
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    left = text[text.rindex("\x1b[2K") :]
    assert "best score" in left  # of the table of results
    assert "spearman" not in left


def test_a_terminal_shows_all_jobs(tmp_path: Path, demo: DemoPaths):
    seen = tmp_path / "seen"
    script = f"{TWO_EPOCHS}\nwhile not Path({str(seen)!r}).exists(): time.sleep(0.02)\n{COMPLETES}"
    code, text = in_terminal(tmp_path, demo, "abc", script, lambda process, keyboard: seen.touch())
    assert code == 0, text
    lines = words(text)
    assert lines[0] == ["3", "jobs,", "2", "at", "a", "time,", "1", "thread", "each"]
    running = [line for line in lines if line[:2] == ["a", "running"] and line[2:6] == SHOWN]
    assert running, "the last epoch of the first job was never shown"
    assert running[-1][-1] == "0:01:01"  # one epoch is left
    assert re.fullmatch(r"0:\d\d:\d\d", running[-1][-2])
    assert ["c", "waiting"] in lines
    assert ["2", "running,", "1", "waiting"] in lines
    assert any(line[:2] == ["a", "completed"] for line in lines)
    assert [line[:2] for line in lines[-4:-1]] == [[name, "completed"] for name in "abc"]
    assert "| Epoch" not in text
    assert text.count("| started") == 3
    assert_clean(text)


@pytest.mark.parametrize("key", ["ctrl-c", "SIGTERM"])
def test_a_terminal_is_left_clean_after_an_interruption(key: str, tmp_path: Path, demo: DemoPaths):
    def stop(process: ForkProcess, keyboard: int) -> None:
        os.write(keyboard, b"\x03") if key == "ctrl-c" else process.terminate()

    handler = "def stop(signum, frame): say('interrupted', reason=signal.Signals(signum).name); sys.exit(1)\n"
    handler += "signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)"
    code, text = in_terminal(tmp_path, demo, "abc", f"{handler}\n{TWO_EPOCHS}\ntime.sleep(600)", stop)
    signum = signal.SIGINT if key == "ctrl-c" else signal.SIGTERM
    assert code == 128 + signum, text
    assert "Traceback" not in text
    assert [line[:2] for line in words(text)[-5:-2]] == [
        ["a", "interrupted"],
        ["b", "interrupted"],
        ["c", "not"],
    ]
    assert f"stopped by {signum.name}" in text.splitlines()[-1]
    assert_clean(text)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path: Path, demo: DemoPaths):
    code, text = in_terminal(tmp_path, demo, "a", f"{TWO_EPOCHS}\n{COMPLETES}", TERM="dumb")
    assert code == 0, text
    assert "\x1b" not in text
    assert "a | Epoch 001 | train_loss=0.1 | val_loss=0.0712" in text


@pytest.mark.usefixtures("light")
def test_a_table_that_cannot_be_drawn_leaves_no_process_behind(tmp_path: Path, demo: DemoPaths):
    "As when the window is closed: writing to it fails."
    script = "say('running', pid=os.getpid()); time.sleep(600)"
    jobs = plan(tmp_path, demo)

    def closed(crew: object) -> None:
        if jobs[0].run.metadata_file.exists():
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        run_jobs(jobs, command=stand_in(script), say=lambda line: None, watch=nullcontext(closed))
    assert not is_running(read_metadata(jobs[0].run)["pid"])
    assert read_metadata(jobs[0].run)["status"] == "interrupted"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start plain processes")
def test_the_death_of_the_fork_server_is_that_of_the_jobs_that_run(tmp_path: Path, demo: DemoPaths):
    "The others go on, with a new server."
    script = "say('running', pid=os.getpid()); time.sleep(600)"
    jobs = plan(tmp_path, demo, "abc")

    def kill_the_server(line: str) -> None:
        if line.startswith("b | started"):
            server.process.kill()

    with ForkServer([]) as server:
        result = run_jobs(
            jobs,
            command=stand_in(COMPLETES, script, COMPLETES),
            continue_on_error=True,
            say=kill_the_server,
            server=server,
        )
    assert [job.status for job in result] == ["completed", "failed", "completed"]
    assert result.jobs[1].reason == "killed by SIGKILL (out of memory?)"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start plain processes")
def test_a_sweep_can_be_stopped_while_the_server_imports(tmp_path: Path, demo: DemoPaths, monkeypatch):
    (tmp_path / "endless_module.py").write_text("import time; time.sleep(600)")
    monkeypatch.chdir(tmp_path)

    def ask(server: ForkServer) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return is_ready(server)

    is_ready = ForkServer.is_ready
    monkeypatch.setattr(ForkServer, "is_ready", ask)
    with ForkServer(["endless_module"]) as server, pytest.raises(SweepInterrupted) as stopped:
        run_jobs(plan(tmp_path, demo), command=stand_in(COMPLETES), say=lambda line: None, server=server)
    assert [job.status for job in stopped.value.result] == ["not started"]


# --- real trainings


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, demo: DemoPaths) -> tuple[list[Job], object, list[str]]:
    "Two trainings at a time; the second job's loss is not finite."
    jobs = [
        {"name": "fine", "notes": "kept", "overrides": {"trainer.num_threads": "auto"}},
        {"name": "diverges", "overrides": {"learning_rate": 1.0e30, "batch_size": 2}},
    ]
    manifest = write_manifest(tmp_path_factory.mktemp("sweep"), demo, jobs=jobs)
    planned, lines = plan_jobs(load_manifest(manifest)), []
    return planned, run_jobs(planned, jobs=2, continue_on_error=True, say=lines.append), lines


def test_real_trainings_end_with_their_status(sweep):
    planned, result, lines = sweep
    fine, diverges = result
    assert (fine.status, diverges.status) == ("completed", "failed"), result
    assert fine.score == read_metrics(planned[0].run).selection_metric.min()
    assert fine.checkpoint.is_file()
    assert "finite" in diverges.reason
    assert sum(line.startswith("fine | Epoch") for line in lines) == 3


def test_a_real_run_keeps_its_console_and_its_plan(sweep):
    planned, _, _ = sweep
    run = planned[0].run
    assert "Epoch 002" in run.console_file.read_text()
    assert (run.path / "notes.txt").read_text().strip() == "kept"
    metadata = read_metadata(run)
    assert metadata["training_parameters"] == planned[0].loaded.config.model_dump(mode="json")
    assert metadata["overrides"]["trainer.num_epochs"] == 3


def test_a_run_records_the_setting_and_the_threads_that_it_had(sweep):
    metadata = read_metadata(sweep[0][0].run)
    assert metadata["training_parameters"]["trainer"]["num_threads"] == "auto"
    assert metadata["environment"]["threads"] == max(1, available_cores() // 2)


def test_figures_come_from_the_files_of_a_run(sweep, tmp_path: Path):
    run, metrics = sweep[0][0].run, read_metrics(sweep[0][0].run)
    last = metrics.iloc[-1]
    found = run_figures(run)
    assert found == {
        "epochs": "3/3",
        "val_loss": last.val_loss,
        "val_spearman": last.val_spearman_corr,
        "score": metrics.selection_metric.min(),
        "seconds_left": None,
    }
    assert run_figures(RunDirectory(tmp_path / "absent")) == {}
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "damaged", symlinks=True))
    copy.metrics_file.write_text("epoch\n1,")
    assert run_figures(copy) == {}


def test_a_completed_job_is_not_repeated(sweep):
    planned, result, _ = sweep
    again = [replace(job, run_name=f"{job.name}_2030-01-01_00-00-00") for job in planned]
    earlier = completed_before(again)
    assert list(earlier) == ["fine"]
    assert earlier["fine"].checkpoint == result.jobs[0].checkpoint
    assert planned[0].run_name in earlier["fine"].reason
    lines = []
    result = run_jobs(
        again[:1], skip_completed=True, command=stand_in("sys.exit('started')"), say=lines.append
    )
    assert result.completed
    assert lines == []  # nothing waits


def test_other_settings_other_data_or_another_name_are_repeated(sweep, demo: DemoPaths, tmp_path: Path):
    job = sweep[0][0]
    changed = load_config(job.loaded.source, job.loaded.overrides | {"dataloader.seed": 5})
    labels = tmp_path / "train.csv"
    labels.write_text("\n".join(demo.train_labels.read_text().splitlines()[:-1]) + "\n")
    other_data = load_config(job.loaded.source, job.loaded.overrides | {"paths.train_labels": labels})
    assert completed_before([replace(job, loaded=changed)]) == {}
    assert completed_before([replace(job, loaded=other_data)]) == {}
    assert completed_before([replace(job, name="other", run_name="other")]) == {}
    assert completed_before([replace(job, resume_from=sweep[1].jobs[0].checkpoint)]) == {}


def test_changed_labels_in_the_same_file_are_repeated(sweep, demo: DemoPaths):
    job, before = sweep[0][0], demo.train_labels.read_text()
    lines = before.splitlines()
    try:
        demo.train_labels.write_text("\n".join(lines[:-1]) + "\n")
        assert completed_before([job]) == {}
    finally:
        demo.train_labels.write_text(before)
    assert list(completed_before([job])) == ["fine"]


@pytest.fixture
def endless_sweep(tmp_path: Path, demo: DemoPaths) -> Iterator[tuple[subprocess.Popen, Path]]:
    "`topoqa batch` with two trainings that would take hours, started as a shell starts it."
    shared = {"overrides": {"graph_dir": str(demo.graph_dir), "num_epochs": 100_000, "model.hidden_dim": 8}}
    shared["overrides"] |= {"early_stopping.patience": 100_000}
    manifest = write_manifest(tmp_path, demo, shared=shared, jobs=[{"name": name} for name in "abc"])
    command = [sys.executable, "-m", "topoqa_nb.cli", "batch", "--manifest", str(manifest), "--jobs", "2"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    yield process, tmp_path
    process.kill()
    process.wait()


def test_an_interrupted_sweep_leaves_no_process_and_says_how_every_run_ended(endless_sweep):
    "By Ctrl-C; what SIGTERM does is seen in a terminal, and by a sweep that is killed."
    (process, folder), signum = endless_sweep, signal.SIGINT
    until(lambda: process.poll() is not None or (folder / "out").read_text().count("Epoch 000") >= 2)
    process.send_signal(signum)
    code = process.wait(PATIENCE)
    text = (folder / "out").read_text()
    assert code == 128 + signum, text
    assert "Traceback" not in text
    runs = sorted(path for path in (folder / "runs").iterdir() if not path.is_symlink())
    assert [read_metadata(run)["status"] for run in runs] == ["interrupted", "interrupted"]
    assert "3 jobs, 2 at a time, 1 thread each" in text.splitlines()
    assert "\x1b" not in text  # a file is no terminal
    assert text.count(" interrupted ") >= 2
    assert "not started" in text
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(folder / "runs") not in processes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start plain processes")
def test_a_sweep_that_is_killed_leaves_interrupted_runs_and_no_process(tmp_path: Path, demo: DemoPaths):
    "One of the trainings has processes that load its data, the other has none."
    shared = {"overrides": {"graph_dir": str(demo.graph_dir), "num_epochs": 100_000, "model.hidden_dim": 8}}
    shared["overrides"] |= {"early_stopping.patience": 100_000}
    jobs = [{"name": "a"}, {"name": "b", "overrides": {"dataloader.num_workers": 1}}]
    manifest = write_manifest(tmp_path, demo, shared=shared, jobs=jobs)
    command = [sys.executable, "-m", "topoqa_nb.cli", "batch", "--manifest", str(manifest), "--jobs", "2"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    until(lambda: process.poll() is not None or (tmp_path / "out").read_text().count("Epoch 000") >= 2)
    assert process.poll() is None, (tmp_path / "out").read_text()
    others = psutil.Process(process.pid).children(recursive=True)
    assert len(others) >= 4  # the server, two trainings, and one that loads
    process.kill()
    process.wait()
    until(lambda: not any(is_running(other.pid) for other in others))
    for run in (path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()):
        metadata, rows = read_metadata(run), read_metrics(RunDirectory(run))
        assert (metadata["status"], metadata["reason"]) == ("interrupted", "stopped by SIGTERM")
        assert metadata["completed"]
        last = read_checkpoint(run / "model_checkpoints" / "last.chkpt")
        assert len(rows) - 1 <= last["epoch_row"]["epoch"] + 1
        assert (run / "model_checkpoints" / "best.ckpt").resolve().is_file()


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("skip_completed", [False, True])
def test_a_job_that_a_living_process_trains_is_not_started_beside_it(
    tmp_path: Path, demo: DemoPaths, skip_completed: bool
):
    "The other jobs run. A dead process, other settings or another name are no obstacle."
    jobs, lines = plan(tmp_path, demo, "abcd", timestamp="2030-01-01_00-00-00"), []

    def earlier(job: Job, name: str, process: dict[str, object], **changes: object) -> Path:
        settings = locate_data(job.loaded.config)[0].model_dump(mode="json") | changes
        metadata = {"status": "running", "environment": {"process": process}}
        path = job.run.path.parent / f"{name}_2029-01-01_00-00-00"
        write_json(path / "run_metadata.json", metadata | {"training_parameters": settings})
        return path

    alive = earlier(jobs[0], "a", this_process())
    earlier(jobs[1], "b", this_process() | {"started": 1.0})
    earlier(jobs[2], "c", this_process(), model={"hidden_dim": 16})
    earlier(jobs[3], "e", this_process())
    found = run_jobs(jobs, command=stand_in(COMPLETES), skip_completed=skip_completed, say=lines.append)
    assert [job.status for job in found] == ["not started", *["completed"] * 3]
    reason = f"{alive.name} trains the same, process {os.getpid()}; wait for it, or stop it"
    assert found.jobs[0].reason == reason
    assert f"a | not started: {reason}" in lines
    assert not jobs[0].run.path.exists() and not found.completed


def test_metadata_without_a_score_make_a_row(tmp_path: Path, demo: DemoPaths):
    job = plan(tmp_path, demo)[0]
    write_json(
        job.run.metadata_file, {"status": "completed", "selection": None, "checkpoints": {"best": None}}
    )
    assert "completed" in results_table(SweepResult((result_of("a", job.run),)))
