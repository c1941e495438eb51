"""The command line as a job script meets it: output, exit codes, one line per mistake."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TextIO

import pytest
import typer
import yaml
from conftest import PATIENCE, forked, in_turn, speak_into

from topoqa_nb.cli import main
from topoqa_nb.data import demo as demo_module
from topoqa_nb.data.tiny import DemoPaths, write_tiny_dataset
from topoqa_nb.entry import app, joined_pairs
from topoqa_nb.ground.console import console_for
from topoqa_nb.ground.core import TrainingError
from topoqa_nb.pipeline_commands import parameter_value
from topoqa_nb.runs.record import read_metadata
from topoqa_nb.runs.runs import find_run, read_metrics

COMMANDS = [
    "run",
    "resume",
    "batch",
    "pipeline",
    "fine-tune",
    "refit",
    "ramdisk",
    "summarise",
    "leaderboard",
    "monitor",
    "archive",
    "score",
    "predict",
    "export",
    "validate",
    "cache",
    "env",
    "config",
    "demo-data",
    "families",
    "search",
]


def on_tiny_data(demo: DemoPaths) -> list[str]:
    "Overrides that make a run take a second."
    changes = {
        "paths.graph": demo.graph_dir,
        "num_epochs": 2,
        "model.hidden_dim": 8,
        "accumulate_grad_batches": 1,
    }
    return [part for key, value in changes.items() for part in ("--override", f"{key}={value}")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, demo: DemoPaths) -> Path:
    "A run root with a short run, its fine-tune, and one whose loss is not finite."
    root = tmp_path_factory.mktemp("cli") / "runs"
    common = ["run", "--config", "config.yaml", "--output-root", str(root), *on_tiny_data(demo)]
    assert (
        main([*common, "--run-name", "first", "--notes", "a note", "--trial-label", "trial", "--log-lr"]) == 0
    )
    best = root / "first" / "model_checkpoints" / "best.ckpt"
    assert main([*common, "--run-name", "child", "--resume-from", str(best)]) == 0
    diverges = ["--override", "learning_rate=1e30", "--override", "batch_size=2"]
    assert main([*common, "--run-name", "diverged", *diverges]) == 1
    return root


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    "The one line of an error; checks everything that all errors have in common."
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("topoqa: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def shell(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "topoqa_nb.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


# --- usage


@pytest.mark.parametrize("text", ["[" * 3000, "a: &a {b: *a}", "9" * 5000, '"\\ud800"', "2024-02-30"])
def test_parameters_that_hurt_yaml_are_text(text, capsys):
    assert parameter_value(text) == text
    assert len(refused(capsys, "pipeline", "-p", "jobs", text, "--dry-run")) < 1500


def test_help_and_config_do_not_load_torch():
    code = (
        "import sys; from topoqa_nb.cli import main; assert main(['--help']) == 0;"
        "assert main(['config', '--show', 'config.yaml']) == 0; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_names_every_command(capsys: pytest.CaptureFixture):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command} " in shown
    assert main([]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture):
    assert main([command, "--help"]) == 0
    assert "Usage: topoqa" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["summarize"], ["summarise"]),
        (["zzz"], ["zzz", "topoqa --help"]),
        (["--confg"], ["--confg"]),
        (["run"], ["topoqa run", "--config"]),
        (["run", "--confg", "a"], ["--confg", "--config"]),
        (["run", "--config"], ["--config"]),
        (["run", "--config", "config.yaml", "extra"], ["extra"]),
        (["batch", "--manifest", "run_core.yaml", "--limit", "x"], ["--limit", "x"]),
        (["batch", "--manifest", "run_core.yaml", "--jobs", "0"], ["--jobs", "from 1, or auto", "found 0;"]),
        (
            ["batch", "--manifest", "run_core.yaml", "--jobs", "-1"],
            ["--jobs", "from 1, or auto", "found -1;"],
        ),
        (
            ["batch", "--manifest", "run_core.yaml", "--jobs=many"],
            ["--jobs", "from 1, or auto", "found many;"],
        ),
        (["batch", "--manifest", "run_core.yaml", "--jobs", "²"], ["--jobs", "from 1, or auto", "found ²;"]),
        (["pipeline", "--jobs", "many"], ["--jobs", "from 1, or auto", "found many;"]),
        (["fine-tune", "--jobs", "1.5"], ["--jobs", "from 1, or auto", "found 1.5;"]),
        (["batch", "--manifest", "run_core.yaml", "--executor", "slurm"], ["--executor", "slurm"]),
        (["leaderboard", "--format", "xml"], ["--format", "xml"]),
        (["summarise"], ["--run-id", "--run-dir", "neither"]),
        (["summarise", "--run-id", "a", "--run-dir", "b"], ["both"]),
    ],
)
def test_wrong_usage(arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture):
    err = refused(capsys, *arguments)
    for part in parts:
        assert part in err


def test_module_and_process_exit_with_the_code():
    done = shell("config", "--show", "no_such.yaml")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no_such.yaml" in done.stderr


# --- config


def test_config_shows_what_a_run_would_use(capsys: pytest.CaptureFixture):
    assert (
        main(
            [
                "config",
                "--show",
                "sched_boost.yaml",
                "--override",
                "seed=777",
                "--override",
                "fast_dev_run=true",
            ]
        )
        == 0
    )
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["dataloader"]["seed"], shown["trainer"]["fast_dev_run"]) == (777, True)


def test_config_shows_a_flat_file_in_sections(tmp_path: Path, capsys: pytest.CaptureFixture):
    flat = tmp_path / "flat.yaml"
    flat.write_text("graph_dir: graphs\nlearning_rate: 0.1\n")
    assert main(["config", "--show", str(flat), "--override", "seed=7"]) == 0
    out, err = capsys.readouterr()
    shown = yaml.safe_load(out)
    assert (shown["optimizer"]["learning_rate"], shown["dataloader"]["seed"]) == (0.1, 7)
    assert shown["paths"]["graph"] == str(tmp_path / "graphs")
    assert "learning_rate -> optimizer.learning_rate" in err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optimizer: [", ["valid YAML"]),
        ("optimizer: {learning_rat: 1}", ["learning_rat", "learning_rate"]),
        ("optimizer: {learning_rate: fast}", ["optimizer.learning_rate", "a number", "fast"]),
    ],
)
def test_a_wrong_config_file(text: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    for command in (["config", "--show"], ["run", "--config"]):
        err = refused(capsys, *command, path)
        for part in ["own.yaml", *parts]:
            assert part in err


# --- run


def test_a_run_keeps_what_its_flags_said(root: Path):
    run = find_run(root, "first")
    metadata = read_metadata(run)
    assert (metadata["status"], metadata["notes"], metadata["trial_label"]) == (
        "completed",
        "a note",
        "trial",
    )
    assert metadata["training_parameters"]["logging"]["log_lr"] is True
    assert len(read_metrics(run)) == 2


def test_a_fine_tune_has_a_parent(root: Path):
    lineage = read_metadata(find_run(root, "child"))["lineage"]
    assert lineage["mode"] == "fine-tune"
    assert "first" in lineage["parent_checkpoint"]


def test_a_training_that_fails_is_recorded(root: Path):
    metadata = read_metadata(find_run(root, "diverged"))
    assert metadata["status"] == "failed"
    assert "finite" in metadata["reason"]


def test_flags_are_overrides(demo: DemoPaths, tmp_path: Path):
    flags = ["--fast-dev-run", "--limit-train-batches", "0.5", "--limit-val-batches", "1"]
    common = ["run", "--config", "config.yaml", "--output-root", str(tmp_path), "--run-name", "a"]
    assert main([*common, *on_tiny_data(demo), *flags]) == 0
    trainer = read_metadata(tmp_path / "a")["training_parameters"]["trainer"]
    found = [trainer[key] for key in ("fast_dev_run", "limit_train_batches", "limit_val_batches")]
    assert found == [True, 0.5, 1]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--run-name", "first"], ["first", "a run name that is free"]),
        (["--resume-from", "absent.ckpt"], ["absent.ckpt"]),
        (["--override", "paths.graph=absent_graphs"], ["absent_graphs"]),
        (["--limit-train-batches", "-1"], ["limit_train_batches"]),
        (["--override", "seed"], ["key=value"]),
    ],
)
def test_what_a_run_refuses(
    root: Path, demo: DemoPaths, arguments: list, parts: list, capsys: pytest.CaptureFixture
):
    before = sorted(path.name for path in root.iterdir())
    common = ["run", "--config", "config.yaml", "--output-root", root, *on_tiny_data(demo)]
    err = refused(capsys, *common, *arguments)
    for part in parts:
        assert part in err
    assert sorted(path.name for path in root.iterdir()) == before


@pytest.mark.parametrize(("header", "part"), [("NAME,dockq", "MODEL"), ("MODEL,quality", "dockq")])
def test_labels_without_their_columns(header: str, part: str, demo: DemoPaths, tmp_path: Path, capsys):
    labels = tmp_path / "labels.csv"
    labels.write_text(f"{header}\na,0.5\n")
    common = ["run", "--config", "config.yaml", "--output-root", tmp_path / "runs", *on_tiny_data(demo)]
    both = ["--override", f"paths.train_labels={labels}", "--override", f"paths.val_labels={labels}"]
    err = refused(capsys, *common, *both)
    assert "labels.csv" in err
    assert part in err


def speaking(arguments: list[str], folder: Path, out: int, err: int) -> None:
    "As a process: a command that works in a folder and speaks into pipes."
    speak_into(out, err)
    os.chdir(folder)
    sys.exit(main(arguments))


def start(*arguments: object, folder: Path, same_pipe: bool = False) -> tuple[ForkProcess, TextIO, TextIO]:
    "A command in a process of its own, and what it says; standard error may go where standard output goes."
    (out, said), (err, told) = os.pipe(), os.pipe()
    process = forked(speaking, [*map(str, arguments)], folder, said, said if same_pipe else told)
    os.close(said)
    os.close(told)
    return process, os.fdopen(out), os.fdopen(err)


def test_a_sigterm_ends_a_run_with_143(demo: DemoPaths, tmp_path: Path):
    long = ["--override", "num_epochs=100000", "--override", "early_stopping_patience=100000"]
    words = ["run", "--config", "config.yaml", "--run-name", "a", "--output-root", tmp_path]
    process, out, err = start(*words, *on_tiny_data(demo), *long, folder=tmp_path)
    with out, err:
        assert any(line.startswith("Epoch 000") for line in out)
        process.terminate()
        assert "Traceback" not in out.read() + err.read()
    process.join(PATIENCE)
    assert process.exitcode == 143
    assert read_metadata(tmp_path / "a")["status"] == "interrupted"


# --- how a process ends


def test_failures_of_a_training_and_surprises_exit_with_1(monkeypatch: pytest.MonkeyPatch, capsys):
    problems = [TrainingError("epoch 1", "a finite loss", "nan", "lower it"), ZeroDivisionError("surprise")]
    import topoqa_nb.training.training

    def fail(*arguments: object, **options: object) -> None:
        raise problems.pop(0)

    monkeypatch.setattr(topoqa_nb.training.training, "train", fail)
    assert main(["run", "--config", "config.yaml"]) == 1
    assert capsys.readouterr().err == "topoqa: error: epoch 1: expected a finite loss, found nan; lower it\n"
    assert main(["run", "--config", "config.yaml"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_before_a_training_began_is_130(monkeypatch: pytest.MonkeyPatch, capsys):
    import topoqa_nb.training.training

    def interrupt(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(topoqa_nb.training.training, "train", interrupt)
    assert main(["run", "--config", "config.yaml"]) == 130
    assert capsys.readouterr().err == "topoqa: stopped by SIGINT\n"


def test_a_reader_that_leaves_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "topoqa_nb.cli", "config", "--show", "config.yaml"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert set(done.stderr.splitlines()) <= {
        note for note in done.stderr.splitlines() if "shipped file" in note
    }


def commands_that_work_on() -> list[str]:
    "Those that start processes of their own."
    commands = typer.main.get_command(app).commands
    return [name for name, command in commands.items() if any(one.name == "jobs" for one in command.params)]


@pytest.mark.parametrize("command", commands_that_work_on())
def test_work_goes_on_when_nobody_reads_along(command: str, monkeypatch: pytest.MonkeyPatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with console_for(command):
            print("fold 1 of 5", flush=True)


# --- looking at runs


@pytest.mark.parametrize("style", ["id", "dir"])
def test_summarise_is_json_alone(root: Path, style: str, capsys: pytest.CaptureFixture):
    chosen = (
        ["--root", str(root), "--run-id", "first"] if style == "id" else ["--run-dir", str(root / "first")]
    )
    assert main(["summarise", *chosen]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert err == ""
    assert (summary["run_name"], summary["status"]) == ("first", "completed")
    assert Path(summary["best_checkpoint"]).exists()


def test_summarise_latest_and_unknown(root: Path, capsys: pytest.CaptureFixture):
    assert main(["summarise", "--root", str(root), "--run-id", "latest"]) == 0
    assert json.loads(capsys.readouterr().out)["run_name"] == "diverged"
    assert "did you mean first?" in refused(capsys, "summarise", "--root", root, "--run-id", "frist")


def test_leaderboard_in_three_forms(root: Path, capsys: pytest.CaptureFixture):
    said = {}
    for form in ("table", "json", "csv"):
        assert main(["leaderboard", "--root", str(root), "--format", form]) == 0
        said[form], err = capsys.readouterr()
        assert err == ""
    rows = json.loads(said["json"])
    assert [row["run_name"] for row in csv.DictReader(io.StringIO(said["csv"]))] == [
        row["run_name"] for row in rows
    ]
    lines = said["table"].splitlines()
    assert lines[0] == "ranked by selection_metric, lower is better"
    assert lines[1].split()[:3] == ["rank", "run", "status"]
    assert [line.split()[1] for line in lines[2:4]] == [row["run_name"] for row in rows[:2]]
    assert {row["run_name"] for row in rows} == {"first", "child", "diverged"}


def test_leaderboard_limit_and_empty_root(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["leaderboard", "--root", str(root), "--limit", "1", "--format", "json"]) == 0
    scored = [row for row in json.loads(capsys.readouterr().out) if row["score"] is not None]
    assert len(scored) == 1
    for form, nothing in (("json", "[]"), ("table", "no runs"), ("csv", "")):
        assert main(["leaderboard", "--root", str(tmp_path), "--format", form]) == 0
        assert capsys.readouterr().out.strip() == nothing
    refused(capsys, "leaderboard", "--root", tmp_path / "absent")


# --- batch, pipeline, fine-tune: what would run


def test_a_dry_batch_shows_the_jobs_and_starts_nothing(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["batch", "--manifest", "run_demo.yaml", "--dry-run", "--override", "seed=5", "--limit", "2"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "sched_boost_seed222: " in shown
    assert "sched_boost_lr035_seed222: " in shown
    assert "large_batch" not in shown
    assert shown.count("dataloader.seed = 5") == 2
    assert f"{tmp_path}/training_runs/sched_boost_seed222_" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "part"),
    [(None, "manifest.yaml"), ("jobs: []", "jobs"), ("jobs: [{name: a, config: no.yaml}]", "no.yaml")],
)
def test_what_a_batch_refuses(text: str | None, part: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "manifest.yaml"
    if text is not None:
        path.write_text(text)
    assert part in refused(capsys, "batch", "--manifest", path)


@pytest.mark.parametrize(("status", "code", "jobs"), [("completed", 0, 3), ("failed", 1, "auto")])
def test_a_batch_ends_with_its_table_and_a_code(
    status: str, code: int, jobs: object, tmp_path: Path, monkeypatch, capsys
):
    import topoqa_nb.sweep.sweep

    given = {}

    def pretend(planned: list, **options: object) -> topoqa_nb.sweep.sweep.SweepResult:
        given.update(options, names=[job.name for job in planned])
        return topoqa_nb.sweep.sweep.SweepResult(
            (topoqa_nb.sweep.sweep.JobResult("a", tmp_path, status, -0.25, seconds=3.0),)
        )

    monkeypatch.setattr(topoqa_nb.sweep.sweep, "run_jobs", pretend)
    words = ["--limit", "2", "--jobs", str(jobs), "--skip-completed", "--output-root", str(tmp_path)]
    assert main(["batch", "--manifest", "run_core.yaml", *words]) == code
    assert given.pop("names") == ["sched_boost_seed222", "sched_boost_lr035_seed222"]
    assert callable(given.pop("say"))
    server = given.pop("server")  # it was importing meanwhile, and is closed
    assert server.process is None or server.process.returncode is not None
    assert given == {
        "jobs": jobs,
        "watch": topoqa_nb.sweep.sweep.UNWATCHED,  # standard output is no terminal here
        "continue_on_error": False,
        "skip_completed": True,
        "executor": "local",
        "name": "run_core",
    }
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", status, "-0.25000", "3.0"]


def test_papermill_pairs():
    assert joined_pairs(["-p", "a", "b c", "-p", "d", "-1"]) == [
        "--parameter",
        "a=b c",
        "--parameter",
        "d=-1",
    ]
    assert joined_pairs(["--jobs", "2", "-p", "a"]) == ["--jobs", "2", "-p", "a"]


def test_a_dry_pipeline_starts_nothing(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["pipeline", "--dry-run", "--jobs", "2", "--override", "seed=5", "-p", "skip_fine", "true"]) == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert [job["stage"] for job in plan["jobs"]] == ["sweep"] * 3
    assert {job["dataloader.seed"] for job in plan["jobs"]} == {5}
    assert list(tmp_path.iterdir()) == []


def test_every_pipeline_parameter_is_an_option(capsys: pytest.CaptureFixture):
    from topoqa_nb.pipeline.parameters import PipelineParameters

    assert main(["pipeline", "--help"]) == 0
    shown = capsys.readouterr().out
    singular = {
        "phase2_configs": "phase2_config",
        "overrides": "override",
        "phase_overrides": "phase_override",
    }
    for name, field in PipelineParameters.model_fields.items():
        option = f"--{singular.get(name, name).replace('_', '-')}"
        assert re.search(rf"{option} .*{re.escape(field.description)}", shown), name


def test_every_option_of_the_pipeline_reaches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import topoqa_nb.pipeline.pipeline

    given = {}

    def record(values: dict) -> dict:
        given.update(values)
        final = {"checkpoint": "a", "primary_metric": "selection_metric", "score": -0.5, "run_name": "a"}
        return {"reports_dir": str(tmp_path), "run_root": str(tmp_path), "final": final}

    monkeypatch.setattr(topoqa_nb.pipeline.pipeline, "run_pipeline", record)
    names = "graph_dir train_labels val_labels test_labels manifest run_root reports_dir resume_from phase1_config"
    words = [word for name in names.split() for word in (f"--{name.replace('_', '-')}", f"{name}.x")]
    words += ["--skip-sweep", "--skip-fine", "--fast-dev-run", "--phase2-from", "sweep", "--num-workers", "2"]
    words += [
        "--jobs",
        "3",
        "--executor",
        "local",
        "--ensemble",
        "on",
        "--phase2-config",
        "a",
        "--phase2-config",
        "b",
    ]
    words += ["--override", "seed=1", "--phase-override", "seed=2", "-p", "jobs", "auto"]
    assert main(["pipeline", *words]) == 0
    assert given == {name: f"{name}.x" for name in names.split()} | {
        "skip_sweep": True,
        "skip_fine": True,
        "fast_dev_run": True,
        "phase2_from": "sweep",
        "num_workers": 2,
        "jobs": "auto",
        "executor": "local",
        "ensemble": "on",
        "phase2_configs": ["a", "b"],
        "overrides": ["seed=1"],
        "phase_overrides": ["seed=2"],
    }


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-p", "graph_dri", "x"], ["graph_dri", "did you mean graph_dir?"]),
        (["-p", "skip_sweep", "maybe"], ["skip_sweep", "maybe"]),
        (["-p", "jobs"], ["-p"]),
        (["--override", "sed=1"], ["sed", "seed"]),
        (["--manifest", "run_cor.yaml"], ["run_cor.yaml", "run_core.yaml"]),
        (["--resume-from", "absent.ckpt"], ["absent.ckpt"]),
    ],
)
def test_what_a_pipeline_refuses(arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    err = refused(capsys, "pipeline", "--dry-run", *arguments)
    for part in parts:
        assert part in err
    assert list(tmp_path.iterdir()) == []


def test_a_fine_tune_takes_its_data_from_the_run(root: Path, demo: DemoPaths, capsys: pytest.CaptureFixture):
    checkpoint = root / "first" / "model_checkpoints" / "best.ckpt"
    starts = [["--run-dir", root / "first"], ["--checkpoint", checkpoint]]
    for start in starts:
        assert main(["fine-tune", "--dry-run", "--run-root", str(root), *map(str, start)]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["data"]["paths.graph"] == str(demo.graph_dir)
        assert plan["run_root"] == str(root)
        assert [job["run_name"] for job in plan["jobs"]] == [
            "first_phase1",
            *(f"first_phase2_seed{seed}" for seed in (101, 555, 888)),
        ]


def test_a_fine_tune_without_a_start_takes_the_best_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["leaderboard", "--root", str(root), "--format", "json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]["run_name"]
    assert main(["fine-tune", "--dry-run", "--run-root", str(root)]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"][0]["run_name"] == f"{best}_phase1"
    assert "a completed run" in refused(capsys, "fine-tune", "--run-root", tmp_path)


# --- demo data


def test_demo_data_are_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(demo_module, "write_demo", partial(demo_module.write_demo, targets=2, decoys=2))
    assert main(["demo-data", "--out", str(tmp_path / "demo")]) == 0
    first = capsys.readouterr().out
    assert "ynthetic" in first
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    assert main(["demo-data", "--out", str(tmp_path / "demo")]) == 0
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*") if path.is_file()
    } == written


def test_demo_data_never_overwrite_a_folder_of_somebody_else(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "thesis.txt").write_text("mine")
    refused(capsys, "demo-data", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# --- consoles

ASCII = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


@pytest.fixture(scope="module")
def umlauts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder in which every name that a user chooses has an umlaut, but for the folder itself."
    folder = tmp_path_factory.mktemp("umlauts")
    demo = write_tiny_dataset(folder / "dätä", targets=2, decoys=4)
    changes = f"  graph: {demo.graph_dir}\n  save_dir: rüns\n"
    (folder / "c.yaml").write_text(
        f"paths:\n{changes}model: {{hidden_dim: 8}}\ntrainer: {{num_epochs: 1}}\nmlflow: {{run_name: ü}}\n",
        encoding="utf-8",
    )
    (folder / "m.yaml").write_text("jobs: [{name: jöb, config: c.yaml}]\n", encoding="utf-8")
    link = folder / "runs"
    (folder / "rüns").mkdir()
    link.symlink_to("rüns")
    (folder / "data").symlink_to("dätä")
    return folder


UMLAUTS = [
    "config --show c.yaml", "run --config c.yaml --run-name rün", "batch --manifest m.yaml",
    "batch --manifest m.yaml --dry-run", "validate --graph-dir data", "leaderboard --root runs",
    "leaderboard --root runs --format json", "leaderboard --root runs --format csv",
    "leaderboard --root runs --by-config", "summarise --run-id rün --root runs",
    "monitor --run-id rün --root runs", "monitor --run-id rün --root runs --format json",
    "demo-data --out dämo", "env --config c.yaml", "archive --run-id rün --root runs",
]  # fmt: skip


# Each command in a copy of one process, which has imported what they need.
ONE_BY_ONE = """
import os, sys
from topoqa_nb.ground.machine import fast_import
with fast_import():  # a copy ends in a moment, too
    import topoqa_nb.training.training
from topoqa_nb.cli import main
for number, command in enumerate(sys.argv[1:]):
    if (child := os.fork()) == 0:
        for descriptor in (1, 2):
            os.dup2(os.open(f"said_{number}.{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.exit(main(command.split()))
    sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])} ")
"""


@pytest.mark.parametrize("environment", ASCII, ids=["ascii", "C"])
def test_a_console_that_knows_ascii_alone_shows_everything(umlauts, environment):
    "In the locale C Python cannot open every path, either: that is one line."
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, *UMLAUTS],
        cwd=umlauts, env=os.environ | environment, capture_output=True, check=True,
    )  # fmt: skip
    codes = [int(code) for code in done.stdout.split()]
    for number, (command, code) in enumerate(zip(UMLAUTS, codes, strict=True)):
        out, err = ((umlauts / f"said_{number}.{descriptor}").read_bytes() for descriptor in (1, 2))
        told = code == 2 and err.splitlines()[-1].startswith(b"topoqa: error: ")
        assert code == 0 or (told and "LC_ALL" in environment), (command, err.decode())
        assert b"Traceback" not in err and out.isascii() and err.isascii()


@pytest.mark.parametrize("argument", [b"--run-name=\xff", b"--output-root=\xe4", b"--override=save_dir=\xe4"])
def test_bytes_that_are_no_text_are_one_line(tmp_path, argument):
    command = [sys.executable, "-m", "topoqa_nb.cli", "run", "--config", "config.yaml", argument]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "command line: expected UTF-8 text" in done.stderr
    assert not any(tmp_path.iterdir())


def read_first_line(*arguments: object, folder: Path, same_pipe: bool = False) -> tuple[int, str, str]:
    "Exit code, first line and stderr of a command whose reader leaves after one line."
    process, out, err = start(*arguments, folder=folder, same_pipe=same_pipe)
    with out:
        first = out.readline()
    with err:
        said = err.read()
    process.join()
    return process.exitcode, first, said


@in_turn("same_pipe", [False, True])
def test_a_training_goes_on_when_its_reader_leaves(demo, tmp_path, same_pipe):
    root = tmp_path / f"runs_{same_pipe}"
    arguments = ["run", "--config", "config.yaml", "--output-root", root, "--run-name", "a"]
    code, first, said = read_first_line(*arguments, *on_tiny_data(demo), folder=tmp_path, same_pipe=same_pipe)
    run = find_run(root, "a")
    assert (code, said) == (0, "") and first
    assert read_metadata(run)["status"] == "completed"
    console = run.console_file.read_text()
    assert "Epoch 001 |" in console and "Best checkpoint" in console and "Traceback" not in console


def test_a_sweep_goes_on_when_its_reader_leaves(demo, tmp_path):
    (tmp_path / "m.yaml").write_text("shared: {config: config.yaml}\njobs: [{name: a}, {name: b}]\n")
    arguments = ["batch", "--manifest", "m.yaml", "--output-root", "runs", *on_tiny_data(demo)]
    code, first, said = read_first_line(*arguments, folder=tmp_path)
    assert (code, said) == (0, "") and first
    runs = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert len(runs) == 2
    assert {read_metadata(find_run(tmp_path / "runs", path.name))["status"] for path in runs} == {"completed"}


def test_a_failure_is_told_by_the_exit_code_when_nobody_reads(demo, tmp_path):
    diverges = ["--override", "learning_rate=1e30", "--override", "batch_size=2"]
    arguments = ["run", "--config", "config.yaml", "--output-root", "runs", *on_tiny_data(demo), *diverges]
    code, _, said = read_first_line(*arguments, folder=tmp_path)
    assert code == 1 and said.count("\n") == 1 and "expected a finite loss" in said


@in_turn(
    "line",
    [
        "fine-tune --checkpoint loop.ckpt", "fine-tune -p checkpoint loop.ckpt", "pipeline --graph-dir loop.ckpt",
        "pipeline -preports_dir=loop.ckpt", "run --config config.yaml --resume-from loop.ckpt",
        "archive --run-id a --run-root loop.ckpt",
    ],
)  # fmt: skip
def test_a_link_that_leads_to_itself_is_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    if not (tmp_path / "loop.ckpt").is_symlink():
        (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("topoqa: error: ") and said.count("\n") == 1
    assert "loop.ckpt: expected access and room, found Too many levels of symbolic links" in said
    assert [path.name for path in tmp_path.iterdir()] == ["loop.ckpt"]
