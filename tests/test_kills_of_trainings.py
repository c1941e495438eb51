"""Commands with real trainings, killed just before a change of the file system in any of their processes, and called again.

`make test` kills at one or two changes, `make test-faults` at every fifth, seventh or sixtieth, beginning with number FIRST:
calls with FIRST=0, 1, 2, ... kill at all of them in the end.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kills import killed_at, killed_below
from test_kills import EVERY, assert_same, state
from test_pipeline import opened

from topoqa_nb.cli import main
from topoqa_nb.data.tiny import DemoPaths
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import read_json
from topoqa_nb.network.weights import read_checkpoint
from topoqa_nb.pipeline.final import finish
from topoqa_nb.pipeline.stages import phase1_stage, phase2_stage, sweep_stage
from topoqa_nb.runs.record import RunDirectory, read_metadata
from topoqa_nb.runs.runs import list_runs, read_metrics
from topoqa_nb.sweep.jobs import SweepResult, result_of
from topoqa_nb.sweep.manifest import Job
from topoqa_nb.sweep.sweep import in_training
from topoqa_nb.training.resume import resume
from topoqa_nb.training.training import train

FIRST = int(os.environ.get("TOPOQA_KILL_FIRST", "0"))
SETTINGS = {"trainer.num_epochs": 2, "trainer.accumulate_grad_batches": 1, "model.hidden_dim": 8, "model.attention_head": 2}  # fmt: skip


def small(demo: DemoPaths, place: Path) -> list[str]:
    "Overrides of a run that takes a moment, on graphs that are packed beside it."
    paths = {"graph": demo.graph_dir, "train_labels": demo.train_labels, "val_labels": demo.val_labels}
    told = {f"paths.{name}": path for name, path in paths.items()} | {"paths.store": place / "stores"}
    return [f"{key}={value}" for key, value in (told | SETTINGS).items()]


def commanded(place: Path, *words: object) -> None:
    "A command, with a folder of its own for temporary files; it must end well."
    tempfile.tempdir = os.environ["TMPDIR"] = str(place / "tmp")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    assert main([str(word) for word in words]) == 0


def assert_sound(place: Path) -> None:
    "Whatever lies there can be read, and nothing of it is temporary."
    for file in place.rglob("*.json"):
        read_json(file)
    for file in [*place.rglob("*.chkpt"), *place.rglob("*.ckpt")]:
        read_checkpoint(file)
    for run in list_runs(place / "runs"):
        assert not run.metrics_file.exists() or len(read_metrics(run)) <= 2
    temporary = re.compile(r"\.tmp$|^packing-|^topoqa_|^tmp.|^kernel-")
    left = [path for path in place.rglob("*") if temporary.search(path.name)]
    assert not left, left


def struck_everywhere(
    folder: Path,
    begin: Callable[[Path], object],
    check: Callable[[Path], object],
    short: tuple[int, ...],  # at which changes `make test` kills
    every: int,  # at which ones `make test-faults` does
) -> int:
    "Kill all processes of a command or, each second time, its leader alone; call it once more, and check."
    numbers = short
    if EVERY == 1:
        (folder / "count").mkdir()
        total = killed_below(None, folder / "count", lambda: begin(folder / "count"))
        check(folder / "count")
        numbers = range(FIRST % every, total, every)
    for turn, number in enumerate(numbers):
        place = folder / f"kill_{number}"
        place.mkdir()
        reached = killed_below(number, place, lambda place=place: begin(place), leader_alone=turn % 2 == 1)
        killed_below(None, place, lambda place=place: begin(place))
        check(place)
        assert reached > number or EVERY == 1, reached
        shutil.rmtree(place)
    print(f"survived {len(numbers)} kills")
    return len(numbers)


# --- a sweep, as a command ---


def runs_of(place: Path, status: str) -> list[RunDirectory]:
    return [run for run in list_runs(place / "runs") if read_metadata(run)["status"] == status]


def test_a_sweep_of_real_trainings(demo: DemoPaths, tmp_path: Path):
    "The command skips what is completed; a run that was killed can be resumed."
    seeds = {"a": 1, "b": 2, "c": 3}
    jobs = [{"name": name, "overrides": {"seed": seed}} for name, seed in seeds.items()]
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"shared": {"config": "config.yaml"}, "jobs": jobs}))
    expected = {}
    for name, seed in seeds.items():
        told = [*small(demo, tmp_path), f"seed={seed}", f"paths.save_dir={tmp_path / 'alone'}"]
        expected[name] = state(train(load_config(None, told), run_name=name))

    def begin(place: Path) -> None:
        told = [f"--override={each}" for each in small(demo, place)]
        told += ["--jobs", 2, "--skip-completed", "--run-root", place / "runs"]
        commanded(place, "batch", "--manifest", manifest, *told)

    def check(place: Path) -> None:
        assert sorted(run.name[0] for run in runs_of(place, "completed")) == ["a", "b", "c"]
        assert_sound(place)
        for run in list_runs(place / "runs"):
            if read_metadata(run)["status"] != "completed":
                resume(run, checkpoint="last")
            assert_same(state(run), expected[run.name[0]])

    assert struck_everywhere(tmp_path, begin, check, short=(70,), every=5)


# --- a pipeline: its stages in one process, and as a command with its notebooks, kernels and trainings ---

MANIFEST = """
shared: {config: config.yaml}
jobs: [{name: a, run_name: a, overrides: {seed: 1}}, {name: b, run_name: b, overrides: {seed: 2}}]
"""


def one_after_the_other(waiting: Sequence[Job], **options: object) -> SweepResult:
    "As `run_jobs`, without processes of their own."
    assert not in_training(waiting)
    for job in waiting:
        train(job.loaded, run_name=job.run_name, parent=job.resume_from)
    return SweepResult(tuple(result_of(job.name, job.run) for job in waiting))


def values_of(demo: DemoPaths, place: Path, manifest: Path) -> dict[str, object]:
    "Parameters of a pipeline, by name."
    settings = [f"{key}={value}" for key, value in (SETTINGS | {"paths.store": place / "stores"}).items()]
    labels = {"train_labels": str(demo.train_labels), "val_labels": str(demo.val_labels)}
    folders = {"run_root": str(place / "runs"), "reports_dir": str(place / "reports")}
    return (
        labels
        | folders
        | {"graph_dir": str(demo.graph_dir), "manifest": str(manifest), "overrides": settings}
    )


def answer(place: Path) -> list[dict]:
    "The runs that stand for the jobs of the three stages."
    assert read_json(place / "reports" / "pipeline_summary.json")["status"] == "completed"
    records = [read_json(place / "reports" / f"{stage}.json") for stage in ("sweep", "phase1", "phase2")]
    names = [job["run_name"] for record in records for job in record["jobs"]]
    assert len(names) == len(runs_of(place, "completed"))  # none was trained twice
    return [state(RunDirectory(place / "runs" / name)) for name in names]


@pytest.fixture
def pipeline(demo: DemoPaths, tmp_path: Path) -> SimpleNamespace:
    "A pipeline of six trainings, in one process or as a command, and a check of what it leaves."
    (tmp_path / "two.yaml").write_text(MANIFEST)

    def in_process(place: Path) -> None:
        tempfile.tempdir = str(place)
        given = opened(values_of(demo, place, tmp_path / "two.yaml"), place)
        for stage in (sweep_stage, phase1_stage, phase2_stage):
            stage(given, one_after_the_other)
        finish(given)

    def command(place: Path) -> None:
        told = values_of(demo, place, tmp_path / "two.yaml") | {"jobs": 2}
        settings = [f"--override={each}" for each in told.pop("overrides")]
        pairs = [part for name, value in told.items() for part in ("-p", f"{name}={value}")]
        commanded(place, "pipeline", *settings, *pairs)

    (tmp_path / "whole").mkdir()
    killed_at(None, tmp_path / "whole", lambda: in_process(tmp_path / "whole"))
    expected = answer(tmp_path / "whole")

    def check(place: Path) -> None:
        for found, run in zip(answer(place), expected, strict=True):
            assert_same(found, run)
        assert_sound(place)

    return SimpleNamespace(in_process=in_process, command=command, check=check)


def test_the_stages_of_a_pipeline_with_real_trainings(pipeline: SimpleNamespace, tmp_path: Path):
    numbers = ["b_phase1/model_checkpoints/.last.chkpt"]
    if EVERY == 1:
        (tmp_path / "count").mkdir()
        total = killed_at(None, tmp_path / "count", lambda: pipeline.in_process(tmp_path / "count"))
        numbers = range(FIRST % 7, total, 7)
    for turn, number in enumerate(numbers):
        place = tmp_path / f"kill_{turn}"
        place.mkdir()
        killed_at(number, place, lambda place=place: pipeline.in_process(place))
        killed_at(None, place, lambda place=place: pipeline.in_process(place))
        pipeline.check(place)
        shutil.rmtree(place)
    print(f"survived {len(numbers)} kills")


@pytest.mark.skipif(EVERY != 1, reason="takes a minute for each kill: `make test-faults`")
def test_a_pipeline_as_a_command(pipeline: SimpleNamespace, tmp_path: Path):
    assert struck_everywhere(tmp_path, pipeline.command, pipeline.check, short=(), every=60)
