"""Whatever writes more than one file is killed just before a change of the file system, and called again.

`make test-faults` kills at every change; `make test` at some of them.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import until
from kills import killed_at
from test_kills import EVERY
from test_pipeline import StandIn, given, guess, opened, tiny  # noqa: F401
from test_ramdisk import manifest, name, run, settings, stand_in  # noqa: F401
from test_sweep import COMPLETES, stand_ins  # noqa: F401
from test_sweep import stand_in as job_stand_in

from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import DemoPaths
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import read_json
from topoqa_nb.pipeline.final import finish
from topoqa_nb.pipeline.stages import phase1_stage, phase2_stage, sweep_stage
from topoqa_nb.ramdisk.volume import MARK, marked_processes
from topoqa_nb.runs.record import read_metadata
from topoqa_nb.runs.runs import archive, create_run, find_run, list_runs
from topoqa_nb.sweep.manifest import load_manifest, plan_jobs
from topoqa_nb.sweep.processes import ForkServer
from topoqa_nb.sweep.sweep import run_jobs


def killed_everywhere(
    folder: Path,
    begin: Callable[[Path], object],
    check: Callable[[Path], object],
    prepare: Callable[[Path], object] = Path.mkdir,
    every: int = EVERY,
) -> int:
    "Kill `begin` at its changes, call it once more, and check; the number of kills."
    prepare(folder / "count")
    total = killed_at(None, folder / "count", lambda: begin(folder / "count"))
    check(folder / "count")
    numbers = range(0, total, every)
    for number in numbers:
        place = folder / f"kill_{number}"
        prepare(place)
        killed_at(number, place, lambda place=place: begin(place))
        killed_at(None, place, lambda place=place: begin(place))
        check(place)
        left = [path for path in place.rglob("*") if re.search(r"\.tmp$|^packing-|^topoqa_", path.name)]
        assert not left, (number, left)
        shutil.rmtree(place)
    print(f"survived {len(numbers)} kills at {total} changes")
    return len(numbers)


def test_packing(demo: DemoPaths, tmp_path: Path):
    whole = open_store(demo.graph_dir, store_dir=tmp_path / "whole")

    def check(place: Path) -> None:
        store = open_store(demo.graph_dir, store_dir=place)
        assert store.digests == whole.digests and torch.equal(store.batch([1]).x, whole.batch([1]).x)

    assert killed_everywhere(tmp_path, lambda place: open_store(demo.graph_dir, store_dir=place), check)


def test_a_run_begins(tmp_path: Path):
    "Killed before there is a run; whoever makes the next one tidies up."
    loaded = load_config(None)

    def begin(place: Path) -> None:
        create_run(place, None, loaded, loaded.config)

    def check(place: Path) -> None:
        assert (place / "latest").is_dir()
        assert all(read_metadata(each)["run_name"] == each.name for each in list_runs(place))

    assert killed_everywhere(tmp_path, begin, check)


def test_archive(tmp_path: Path):
    loaded = load_config(None)
    for each in "abc":
        made = create_run(tmp_path / "template", each, loaded, loaded.config)
        (made.path / "run_metadata.json").write_text('{"status": "completed"}')

    def begin(place: Path) -> None:
        moved = archive(place, ["a", "b", "c"])
        assert [each.name for each in moved] == ["a", "b", "c"]

    def check(place: Path) -> None:
        assert sorted(path.name for path in place.iterdir()) == ["history", "latest"]
        assert (place / "latest").readlink() == Path("history/c")
        assert [each.name for each in list_runs(place)] == ["a", "b", "c"]

    def copied(place: Path) -> None:
        shutil.copytree(tmp_path / "template", place, symlinks=True)

    assert killed_everywhere(tmp_path, begin_once(begin), check, copied, every=min(EVERY, 5))


def begin_once(begin: Callable[[Path], object]) -> Callable[[Path], None]:
    "A call that is repeated after it had come to its end is refused; that is no fault."

    def again(place: Path) -> None:
        if not (place / "history" / ".archiving.json").exists() and (place / "history" / "c").exists():
            assert find_run(place, "latest").name == "c"
            return
        begin(place)

    return again


def test_whoever_looks_for_a_run_finishes_a_killed_archive(tmp_path: Path):
    loaded = load_config(None)
    for each in "ab":
        made = create_run(tmp_path / "root", each, loaded, loaded.config)
        (made.path / "run_metadata.json").write_text('{"status": "completed"}')
    total = killed_at(None, tmp_path / "copy", lambda: copy_and_archive(tmp_path))
    copying = killed_at(
        None,
        tmp_path / "other",
        lambda: shutil.copytree(tmp_path / "root", tmp_path / "other", symlinks=True),
    )
    for number in range(copying, total, min(EVERY, 3)):
        shutil.rmtree(tmp_path / "copy")
        killed_at(number, tmp_path / "copy", lambda: copy_and_archive(tmp_path))
        assert find_run(tmp_path / "copy", "latest").name == "b"
        assert len(list_runs(tmp_path / "copy")) == 2


def copy_and_archive(folder: Path) -> None:
    shutil.copytree(folder / "root", folder / "copy", symlinks=True)
    archive(folder / "copy", ["a", "b"])


def test_a_sweep(demo: DemoPaths, tmp_path: Path):
    "Three jobs; what a job completed is not trained again, and no process of the killed sweep is left."
    overrides = {"paths.graph": str(demo.graph_dir), "paths.store": str(tmp_path / "stores")}
    jobs = [{"name": each, "run_name": each} for each in "abc"]
    content = {
        "shared": {"config": "config.yaml", "output_root": "runs", "overrides": overrides},
        "jobs": jobs,
    }
    script = f"say('repeated') if (run / 'run_metadata.json').exists() else {COMPLETES}"

    def begin(place: Path) -> None:
        until(lambda: not marked_processes(str(place)))  # those of a killed sweep end by themselves
        os.environ[MARK] = str(place)
        tempfile.tempdir = str(place / "tmp")
        Path(tempfile.tempdir).mkdir(exist_ok=True)
        file = place / "manifest.yaml"
        file.write_text(yaml.safe_dump(content))
        waiting = [job for job in plan_jobs(load_manifest(file)) if not job.run.metadata_file.exists()]
        with ForkServer([]) as server:
            run_jobs(waiting, jobs=2, command=job_stand_in(script), say=lambda line: None, server=server)

    def check(place: Path) -> None:
        until(lambda: not marked_processes(str(place)))
        assert [read_json(each.metadata_file)["status"] for each in list_runs(place / "runs")] == [
            "completed"
        ] * 3

    assert killed_everywhere(tmp_path, begin, check)


def test_the_stages_of_a_pipeline(given, tmp_path: Path):  # noqa: F811
    def begin(place: Path) -> None:
        folders = {"run_root": str(place / "runs"), "reports_dir": str(place / "reports")}
        pipeline = opened(given | folders, place)
        for stage in (sweep_stage, phase1_stage, phase2_stage):
            stage(pipeline, StandIn())
        finish(pipeline, guess)

    def check(place: Path) -> None:
        summary = read_json(place / "reports" / "pipeline_summary.json")
        assert summary["status"] == "completed"
        for file in place.rglob("*.json"):
            read_json(file)

    assert killed_everywhere(tmp_path, begin, check, every=1 if EVERY == 1 else 6 * EVERY)


@pytest.fixture
def compared(run, stand_in) -> Iterator[Callable]:  # noqa: F811
    yield run


@pytest.mark.xdist_group("volumes in memory")
def test_a_comparison_with_a_ram_disk(compared, tmp_path: Path):
    def begin(place: Path) -> None:
        compared(environment={"SAFE_RAMDISK_TEST_MODE": "1"}, values={"run_root": str(place / "runs")})

    def check(place: Path) -> None:
        records = list((place / "runs" / "ramdisk_benchmarks").glob("*.json"))
        assert records and all(read_json(each)["status"] == "completed" for each in records)

    assert killed_everywhere(tmp_path, begin, check)
