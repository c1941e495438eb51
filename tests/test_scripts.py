"The entry points of scripts/: the command lines they make, and each of them run for real."

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import in_turn

from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.ground.core import write_text
from topoqa_nb.ground.machine import filesystem_type
from topoqa_nb.ramdisk.volume import MEMORY_FILESYSTEMS, SHM

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = REPOSITORY / "scripts"
NAMES = [
    "model_train_topoqa_cpu.py",
    "monitor_best_model.py",
    "ramdisk_run_pipeline.sh",
    "run_all.sh",
    "run_fine_tune_only.sh",
    "run_full_pipeline.sh",
    "run_manifest_sweep.sh",
    "run_training.sh",
]
VARIABLES = (
    "SKIP_SWEEP",
    "SKIP_FINE",
    "RESUME_FROM",
    "GRAPH_DIR",
    "PIPELINE_MANIFEST",
    "NUM_WORKERS_OVERRIDE",
    "TRAIN_LABELS",
    "VAL_LABELS",
    "SAFE_RAMDISK_TEST_MODE",
)
RECORDER = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([os.getcwd(), *sys.argv[1:]]))
"""
BASE = {name: value for name, value in os.environ.items() if name not in VARIABLES}
TOOLS = "/usr/bin:/bin"  # a path with a shell and its tools, and no topoqa


def start(
    name: str, *arguments: str, folder: Path, path: str, **variables: str
) -> subprocess.CompletedProcess:
    "A script, as a user starts it from some folder."
    environment = BASE | {"PATH": path} | variables
    command = [sys.executable] if name.endswith(".py") else []
    command += [str(SCRIPTS / name), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., list[str]]:
    "What a script asks of topoqa; a program of that name on the path writes it down."
    recorder = write_text(tmp_path / "bin" / "topoqa", RECORDER)
    recorder.chmod(0o755)
    folder = tmp_path / "some folder"
    folder.mkdir()

    def asked(name: str, *arguments: str, **variables: str) -> list[str]:
        done = start(name, *arguments, folder=folder, path=f"{recorder.parent}:{TOOLS}", **variables)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        directory, *words = json.loads(done.stdout)
        assert Path(directory) == folder, "relative paths of the caller must stay right"
        return words

    return asked


def test_every_script_is_listed_here_and_can_be_executed():
    found = {path.name for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".py")}
    assert found == {*NAMES, "common.sh", "find_topoqa.py", "train_cli.py"}
    assert all(os.access(SCRIPTS / name, os.X_OK) for name in NAMES)
    assert all((SCRIPTS / name).read_text().startswith("#!/usr/bin/env ") for name in NAMES)


def test_shell_scripts_are_clean():
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("needs shellcheck on the path")
    files = sorted(path.name for path in SCRIPTS.glob("*.sh"))
    checked = subprocess.run([program, "-x", *files], cwd=SCRIPTS, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


# --- command lines

CONFIG = ["--config", "config.yaml"]
CORE = ["--manifest", "manifests/run_core.yaml"]


@pytest.mark.parametrize("name", ["run_training.sh", "model_train_topoqa_cpu.py"])
@in_turn(
    "given, expected",
    [
        ([], CONFIG),
        (
            ["--run-name", "a b", "--override", "seed=7"],
            [*CONFIG, "--run-name", "a b", "--override", "seed=7"],
        ),
        (["--config", "my config.yaml"], ["--config", "my config.yaml"]),
        (["--config=mine.yaml", "--notes", "x"], ["--config=mine.yaml", "--notes", "x"]),
        (["--help"], ["--help"]),
    ],
)
def test_one_training(asked, name, given, expected):
    assert asked(name, *given) == ["run", *expected]


def test_the_core_sweep(asked):
    assert asked("run_all.sh") == ["batch", *CORE]
    assert asked("run_all.sh", "--limit", "2") == ["batch", *CORE, "--limit", "2"]


def test_monitor_and_fine_tune_hand_on_what_they_get(asked):
    assert asked("monitor_best_model.py", "--run-id", "a b", "--follow") == [
        "monitor",
        "--run-id",
        "a b",
        "--follow",
    ]
    assert asked("run_fine_tune_only.sh") == ["fine-tune"]
    words = ["--checkpoint", "runs/a b.chkpt", "--run-dir", "best"]
    assert asked("run_fine_tune_only.sh", *words) == ["fine-tune", *words]


@in_turn(
    "given, expected",
    [
        ([], CORE),
        (["--bundle", "core"], CORE),
        (["--bundle", "extended"], ["--manifest", "manifests/run_extended.yaml"]),
        (["--bundle=experiments"], ["--manifest", "manifests/run_experiments.yaml"]),
        (["--manifest", "my sweep.yaml"], ["--manifest", "my sweep.yaml"]),
        (["--manifest=mine.yaml", "--bundle", "extended"], ["--manifest", "mine.yaml"]),
        (["--fast-dev"], [*CORE, "--override", "fast_dev_run=true"]),
        (["--", "--limit", "2", "--notes", "a b"], [*CORE, "--limit", "2", "--notes", "a b"]),
        (
            ["--fast-dev", "--bundle", "extended", "--", "--limit", "2"],
            ["--manifest", "manifests/run_extended.yaml", "--override", "fast_dev_run=true", "--limit", "2"],
        ),
    ],
)
def test_manifest_sweep(asked, given, expected):
    assert asked("run_manifest_sweep.sh", *given) == ["batch", *expected]


def test_the_data_variables_reach_every_script(asked):
    named = {"GRAPH_DIR": "my graphs", "TRAIN_LABELS": "t.csv", "VAL_LABELS": "v.csv"}
    pairs = [("graph", "my graphs"), ("train_labels", "t.csv"), ("val_labels", "v.csv")]
    overrides = [word for key, value in pairs for word in ("--override", f"paths.{key}={value}")]
    assert asked("run_all.sh", "--limit", "1", **named) == ["batch", *CORE, *overrides, "--limit", "1"]
    assert asked("run_manifest_sweep.sh", **named) == ["batch", *CORE, *overrides]
    assert asked("run_training.sh", "--notes", "x", **named) == ["run", *CONFIG, *overrides, "--notes", "x"]
    words = ["-p", "graph_dir", "my graphs", "-p", "train_labels", "t.csv", "-p", "val_labels", "v.csv"]
    assert asked("run_fine_tune_only.sh", "--dry-run", **named) == ["fine-tune", *words, "--dry-run"]


PIPELINE_VARIABLES = {
    "SKIP_SWEEP": ("1", ["--skip-sweep"]),
    "SKIP_FINE": ("1", ["--skip-fine"]),
    "RESUME_FROM": ("runs/a b.chkpt", ["--resume-from", "runs/a b.chkpt"]),
    "TRAIN_LABELS": ("my train.csv", ["--train-labels", "my train.csv"]),
    "VAL_LABELS": ("val.csv", ["--val-labels", "val.csv"]),
}
OTHER_VARIABLES = {
    "GRAPH_DIR": ("my graphs", ["--graph-dir", "my graphs"]),
    "PIPELINE_MANIFEST": ("sweep.yaml", ["--manifest", "sweep.yaml"]),
    "NUM_WORKERS_OVERRIDE": ("0", ["--num-workers", "0"]),
}


def test_full_pipeline_without_variables(asked):
    assert asked("run_full_pipeline.sh") == ["pipeline"]


@in_turn("name", [*PIPELINE_VARIABLES, *OTHER_VARIABLES])
def test_full_pipeline_with_one_variable(asked, name):
    value, expected = (PIPELINE_VARIABLES | OTHER_VARIABLES)[name]
    assert asked("run_full_pipeline.sh", **{name: value}) == ["pipeline", *expected]


def test_full_pipeline_with_all_variables_and_an_option_that_wins(asked):
    both = OTHER_VARIABLES | PIPELINE_VARIABLES
    given = {name: value for name, (value, _) in both.items()}
    words = [word for _, (_, words) in both.items() for word in words]
    manifest = ["--manifest", "manifests/run_extended.yaml"]
    assert asked("run_full_pipeline.sh", *manifest, **given) == ["pipeline", *words, *manifest]


@in_turn("value", ["0", "false", "no", ""])
def test_a_variable_that_is_switched_off(asked, value):
    assert asked("run_full_pipeline.sh", SKIP_SWEEP=value, SKIP_FINE=value, RESUME_FROM="") == ["pipeline"]


@in_turn("name", PIPELINE_VARIABLES)
def test_ramdisk_hands_the_pipelines_variables_to_the_pipeline(asked, name):
    value, expected = PIPELINE_VARIABLES[name]
    assert asked("ramdisk_run_pipeline.sh", **{name: value}) == ["ramdisk", "--", *expected]


def test_ramdisk_options_and_pipeline_options(asked):
    own = [
        "--graph-dir",
        "my graphs",
        "--baseline-num-workers",
        "0",
        "--ram-num-workers",
        "2",
        "--skip-baseline",
    ]
    assert asked("ramdisk_run_pipeline.sh", *own) == ["ramdisk", *own, "--"]
    given = [*own, "--", "--fast-dev-run", "--override", "seed=7"]
    expected = ["ramdisk", *own, "--", "--skip-fine", "--fast-dev-run", "--override", "seed=7"]
    assert asked("ramdisk_run_pipeline.sh", *given, SKIP_FINE="1") == expected


def test_ramdisk_variables_of_its_own(asked):
    words = asked(
        "ramdisk_run_pipeline.sh", PIPELINE_MANIFEST="a.yaml", NUM_WORKERS_OVERRIDE="3", GRAPH_DIR="g"
    )
    workers = ["--baseline-num-workers", "3", "--ram-num-workers", "3"]
    assert words == ["ramdisk", "--manifest", "a.yaml", *workers, "--"]  # topoqa reads GRAPH_DIR itself


# --- mistakes


@in_turn(
    "name, given, variables, words",
    [
        (
            "run_manifest_sweep.sh",
            ["--bundle", "small"],
            {},
            "--bundle: expected core, extended or experiments, found small",
        ),
        ("run_manifest_sweep.sh", ["--bundle"], {}, "--bundle: expected a value, found none"),
        ("run_manifest_sweep.sh", ["--limit", "2"], {}, "--limit: expected"),
        ("run_full_pipeline.sh", [], {"SKIP_SWEEP": "maybe"}, "SKIP_SWEEP: expected 1 or 0, found maybe"),
        ("ramdisk_run_pipeline.sh", [], {"SKIP_FINE": "2"}, "SKIP_FINE: expected 1 or 0, found 2"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, name, given, variables, words):
    write_text(tmp_path / "topoqa", RECORDER).chmod(0o755)
    done = start(name, *given, folder=tmp_path, path=f"{tmp_path}:{TOOLS}", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}: error: {words}")
    assert len(done.stderr.splitlines()) == 1


def copy_of_scripts(folder: Path) -> Path:
    "The scripts in a repository without an environment."
    return Path(
        shutil.copytree(
            SCRIPTS, folder / "repository" / "scripts", ignore=shutil.ignore_patterns("__pycache__")
        )
    )


def bare_python(folder: Path) -> str:
    "A Python beside which there is no topoqa."
    links = folder / "python"
    links.mkdir()
    (links / "python3").symlink_to(Path(sys.executable).resolve())
    return str(links)


@pytest.mark.parametrize("name", NAMES)
def test_without_topoqa_there_is_one_line(tmp_path, name):
    scripts = copy_of_scripts(tmp_path)
    environment = BASE | {"PATH": f"{bare_python(tmp_path)}:{TOOLS}"}
    if shutil.which("topoqa", path=str(Path(sys.executable).resolve().parent)):
        pytest.skip("needs a Python without topoqa beside it")
    done = subprocess.run([scripts / name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: error: topoqa: expected on the path or in the repository's .venv")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_of_the_repository_is_found_also_through_a_link(tmp_path, name):
    scripts = copy_of_scripts(tmp_path)
    write_text(scripts.parent / ".venv" / "bin" / "topoqa", RECORDER).chmod(0o755)
    (tmp_path / "linked").symlink_to(scripts / name)
    path = f"{bare_python(tmp_path)}:{TOOLS}"
    done = subprocess.run(
        [tmp_path / "linked"], cwd=tmp_path, env=BASE | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0] == str(tmp_path)


# --- for real


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    "Run a script with the real topoqa, in a folder with a tiny data set and a completed run; its stdout."
    folder = tmp_path_factory.mktemp("real")
    write_tiny_dataset(folder / "data")
    write_text(folder / "one.yaml", "jobs: [{name: one, config: sched_boost_seed222.yaml}]\n")
    program = f'#!/bin/sh\nexec "{sys.executable}" -m topoqa_nb.cli "$@"\n'
    write_text(folder / "bin" / "topoqa", program).chmod(0o755)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{BASE['PATH']}"
    library = os.pathsep.join([str(REPOSITORY), BASE.get("PYTHONPATH", "")])

    def real(name: str, *arguments: str, **variables: str) -> str:
        done = start(name, *arguments, folder=folder, path=path, PYTHONPATH=library, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    real.folder = folder
    real(
        "run_training.sh",
        "--run-name",
        "first",
        "--fast-dev-run",
        "--override",
        "paths.graph=data/graph_data",
    )
    return real


def test_run_training_leaves_a_run(real):
    assert (
        json.loads((real.folder / "training_runs" / "first" / "run_metadata.json").read_text())["status"]
        == "completed"
    )


def test_model_train_topoqa_cpu_leaves_a_run(real):
    options = ["--run-name", "second", "--fast-dev-run", "--override", "paths.graph=data/graph_data"]
    real("model_train_topoqa_cpu.py", *options)
    assert (real.folder / "training_runs" / "second" / "model_checkpoints" / "best.ckpt").exists()


def test_monitor_best_model_names_the_checkpoint(real):
    shown = real("monitor_best_model.py", "--run-id", "first", "--format", "json")
    assert "checkpoint.sel-" in shown and json.loads(shown)


def test_run_all_and_run_manifest_sweep_know_their_jobs(real):
    assert "large_batch_sched_boost_seed222" in real("run_all.sh", "--dry-run")
    assert "sched_boost_seed1337" in real("run_manifest_sweep.sh", "--bundle", "extended", "--", "--dry-run")


def test_run_full_pipeline_with_skip_sweep_and_resume_from(real):
    checkpoint = "training_runs/first/model_checkpoints/best.ckpt"
    variables = {"SKIP_SWEEP": "1", "RESUME_FROM": checkpoint, "GRAPH_DIR": "data/graph_data"}
    plan = json.loads(real("run_full_pipeline.sh", "--dry-run", **variables))
    assert [job["stage"] for job in plan["jobs"]] == ["phase1", "phase2", "phase2", "phase2"]
    assert plan["jobs"][0]["run_name"] == "first_phase1"
    assert plan["data"]["paths.graph"] == str(real.folder / "data" / "graph_data")


def test_run_fine_tune_only_starts_from_the_best_run(real):
    shown = real("run_fine_tune_only.sh", "--run-dir", "first", "--dry-run")
    assert [job["run_name"] for job in json.loads(shown)["jobs"]][0] == "first_phase1"


def test_ramdisk_run_pipeline_compares_two_real_pipelines(real):
    if filesystem_type(SHM) not in MEMORY_FILESYSTEMS or not os.access(SHM, os.W_OK):
        pytest.skip("needs a /dev/shm in memory that can be written")
    name = f"tq-{os.getpid()}"
    options = ["--manifest", "one.yaml", "--name", name, "--headroom", "16M", "--size", "64M"]
    variables = {"GRAPH_DIR": "data/graph_data", "SKIP_FINE": "1", "SAFE_RAMDISK_TEST_MODE": "0"}
    shown = real("ramdisk_run_pipeline.sh", *options, "--", "--fast-dev-run", **variables)
    (file,) = (real.folder / "training_runs" / "ramdisk_benchmarks").glob("*.json")
    record, page = json.loads(file.read_text()), file.with_suffix(".html")
    assert f"report:  {page}" in shown
    assert [each["mode"] for each in record["measurements"]] == ["baseline", "ramdisk"]
    assert len({each["score"] for each in record["measurements"]}) == 1, (
        "where the graphs lie changes no number"
    )
    for each in record["measurements"]:
        assert min(each[f"{name}_seconds"] for name in ("first_epoch", "packing", "opening")) > 0
    assert not list(SHM.glob(f"{name}*"))
    cells = nbformat.read(page.with_suffix(".ipynb"), 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [each for each in outputs if each.output_type == "error" or each.get("name") == "stderr"]
    assert [each for each in outputs if "image/png" in each.get("data", {})]
    assert "first opening" in page.read_text(encoding="utf-8")


# --- python -m train_cli


def test_train_cli_is_the_command_line(tmp_path):
    environment = BASE | {"PYTHONPATH": f"{SCRIPTS}:{REPOSITORY}"}
    command = [sys.executable, "-m", "train_cli", "config", "--show", "config.yaml", "--override", "seed=7"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert yaml.safe_load(shown.stdout)["dataloader"]["seed"] == 7
    wrong = subprocess.run(
        [*command[:3], "confg"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("topoqa: error: ")


def test_train_cli_is_installed_with_the_package():
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["py-modules"] == ["train_cli"]
    assert setuptools["package-dir"][""] == "scripts"
