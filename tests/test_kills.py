"""Runs that are killed just before a change of the file system, and resumed: nothing is lost, nothing differs.

`make test-faults` kills at every change; `make test` at some of them.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from kills import killed_at
from test_training import run_once

from topoqa_nb.network.weights import read_checkpoint
from topoqa_nb.runs.record import RunDirectory, read_metadata
from topoqa_nb.training.resume import resume

EVERY = int(os.environ.get("TOPOQA_KILL_EVERY", "29"))  # 1: at every change


def state(run: RunDirectory) -> dict:
    "What must not depend on whether a run was killed."
    last = read_checkpoint(run.checkpoints / "last.chkpt")
    links = {link.name: link.readlink().name for link in run.checkpoints.iterdir() if link.is_symlink()}
    best = read_checkpoint(run.checkpoints / "best.ckpt")
    return {
        "metrics": run.metrics_file.read_text(),
        "files": sorted(path.name for path in run.checkpoints.iterdir()),
        "links": links,
        "last": last["state_dict"],
        "best": best["state_dict"],
        "status": read_metadata(run)["status"],
        "selection": read_metadata(run)["selection"],
        "checkpoints": read_metadata(run)["checkpoints"],
        "progress": read_metadata(run)["progress"],
        "epochs timed": len(read_metadata(run)["runtime"]["epoch_seconds"]),
    }


def assert_same(found: dict, expected: dict) -> None:
    for part in ("last", "best"):
        assert all(torch.equal(found[part][name], value) for name, value in expected[part].items()), part
    plain = [name for name in expected if name not in ("last", "best")]
    assert {name: found[name] for name in plain} == {name: expected[name] for name in plain}


def kill_everywhere(folder: Path, begin, go_on, expected: dict, first: int = 0) -> int:
    "How many kills were survived; a run that had not begun is begun again."
    total = killed_at(None, folder / "count", lambda: begin(folder / "count"))
    assert total > 20
    kills = range(first, total, EVERY)
    for number in kills:
        place = folder / f"kill_{number}"
        killed_at(number, place, lambda place=place: begin(place))
        run = RunDirectory(place / "run")
        killed_at(None, place, lambda run=run, place=place: go_on(run) if run.path.exists() else begin(place))
        assert_same(state(run), expected)
        assert not list(run.path.rglob("unfinished.json"))
        shutil.rmtree(place)
    print(f"survived {len(kills)} kills at {total} changes")
    return len(kills)


@pytest.mark.parametrize("mode", ["fresh", "fine-tune", "fine-tune that beats nothing"])
def test_a_run_killed_anywhere_and_resumed_is_as_if_it_had_not_been(tiny, tmp_path, mode):
    parent = run_once(tiny, tmp_path / "parents", trainer__num_epochs=3) if mode != "fresh" else None
    settings = {"trainer__num_epochs": 4, "resume_from": parent and parent.checkpoints / "best.ckpt"}
    if mode == "fine-tune that beats nothing":
        settings["optimizer__learning_rate"] = 0.3

    def begin(place: Path) -> None:
        run_once(tiny, place, **settings)

    begin(tmp_path / "whole")
    expected = state(RunDirectory(tmp_path / "whole" / "run"))
    assert kill_everywhere(tmp_path, begin, lambda run: go_on(run, "last"), expected)


def go_on(run: RunDirectory, checkpoint: object) -> None:
    "Resume, unless there is nothing left to do."
    if read_metadata(run)["status"] != "completed":
        resume(run, checkpoint=checkpoint)


def test_a_resume_that_goes_back_is_safe_as_well(tiny, tmp_path):
    "The kill falls into the resume; the next one, from `last`, ends as the resume would have."
    source = run_once(tiny, tmp_path / "source", trainer__num_epochs=6)
    files = [path for path in source.checkpoints.glob("checkpoint*") if not path.is_symlink()]
    earliest = min(files, key=lambda path: read_checkpoint(path)["epoch"]).name

    def begin(place: Path) -> None:
        shutil.copytree(source.path, place / "run", symlinks=True)
        run = RunDirectory(place / "run")
        resume(run, checkpoint=run.checkpoints / earliest, overrides=["trainer.num_epochs=7"])

    begin(tmp_path / "whole")
    expected = state(RunDirectory(tmp_path / "whole" / "run"))
    copying = killed_at(
        None,
        tmp_path / "copy",
        lambda: shutil.copytree(source.path, tmp_path / "copy" / "run", symlinks=True),
    )

    def finish(run: RunDirectory) -> None:
        if read_metadata(run)["status"] == "completed" and len(run.metrics_file.read_text().splitlines()) < 8:
            resume(run, checkpoint="last", overrides=["trainer.num_epochs=7"])  # as far as it was asked for
        elif read_metadata(run)["status"] != "completed":
            resume(run, checkpoint="last", overrides=["trainer.num_epochs=7"])

    assert kill_everywhere(tmp_path, begin, finish, expected, first=copying)
