"""A search from the command line with real trainings, and one that is killed at its changes of the file system."""

import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_evaluation import train_here
from test_kills import EVERY
from test_kills_of_commands import killed_everywhere

from topoqa_nb.cli import main
from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import DemoPaths, write_tiny_dataset
from topoqa_nb.ground.core import write_text
from topoqa_nb.ground.signals import Interrupted
from topoqa_nb.sweep.jobs import JobResult, SweepResult
from topoqa_nb.sweep.search import finish_search, plan_search, run_search

SPACE = """
overrides: {trainer.fast_dev_run: true, model.hidden_dim: 8, model.attention_head: 2}
measure: rmse
space: {optimizer.learning_rate: {low: 1e-3, high: 1e-2, log: true}, model.pooling_type: [mean, max]}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A folder with a space."
    monkeypatch.chdir(tmp_path)
    write_text("space.yaml", SPACE)
    return tmp_path


def test_a_search_is_interrupted_and_goes_on(demo: DemoPaths, place: Path, monkeypatch, capsys):
    calls = []

    def train(
        planned: list, *, jobs: object, server: object, skip_completed: bool, **rest: object
    ) -> SweepResult:
        calls.extend(job.name for job in planned)
        if len(calls) == 5:
            raise Interrupted(signal.SIGINT)
        return train_here(planned, jobs=jobs, **rest)

    monkeypatch.setattr("topoqa_nb.sweep.sweep.run_jobs", train)
    monkeypatch.setattr("topoqa_nb.sweep.processes.ForkServer", lambda modules: nullcontext())
    line = ["search", "--space", "space.yaml", "--out", "found", "--run-root", "runs", "--bootstrap", "50"]
    line += ["--winner", "best.yaml", "--override", f"paths.graph={demo.graph_dir}"]
    assert main([*line, "--folds", "3", "--trials", "2"]) == 130
    assert not Path("best.yaml").exists()
    assert main([*line, "--folds", "3", "--trials", "2"]) == 0
    said = capsys.readouterr()
    assert "goes on after 1 trials" in said.out and "the default" in said.out.splitlines()[-1]
    expected = [f"space_trial{trial:03}_fold{fold}" for trial in (0, 1) for fold in (1, 2, 3)]
    assert calls == sorted([*expected, "space_trial001_fold2"])  # the one that was under way is repeated
    assert len(pd.read_csv("found/answer/trials.csv")) == 2
    assert main(["config", "--show", "best.yaml"]) == 0
    assert main([*line, "--folds", "3", "--trials", "2"]) == 0  # nothing is left to do
    assert len(calls) == 7
    assert main([*line, "--folds", "3", "--seed", "1"]) == 2
    assert "found seed 0, now 1; ask for the same" in capsys.readouterr().err
    write_text("best.yaml", "seed: 7\n")
    assert main([*line, "--folds", "3", "--trials", "3"]) == 2
    assert "--winner best.yaml: expected a name that is free" in capsys.readouterr().err
    assert Path("best.yaml").read_text() == "seed: 7\n"


def made_up_runs(jobs: list) -> SweepResult:
    "Runs whose checkpoint says how far their learning rate is from 0.004."
    rates = [job.loaded.config.optimizer.learning_rate for job in jobs]
    found = zip(jobs, rates, strict=True)
    return SweepResult(
        tuple(
            JobResult(job.name, job.run.path, "completed", checkpoint=Path(f"{abs(rate - 0.004):.6f}"))
            for job, rate in found
        )
    )


def made_up_scores(checkpoint: Path, labels: Path, paths: object) -> pd.DataFrame:
    "Labels, with an error that grows with the distance."
    table = pd.read_csv(labels)
    noise = np.random.default_rng(0).normal(0, 100 * float(checkpoint.name), len(table))
    return table.assign(target=table.MODEL.str.split("/").str[0], prediction=table.dockq + noise)


def test_a_search_that_is_killed_anywhere_ends_as_if_it_had_not_been(place: Path):
    tiny = write_tiny_dataset(place / "data", targets=6, decoys=2)
    open_store(tiny.graph_dir, store_dir=place / "packed")
    overrides = [f"paths.graph={tiny.graph_dir}", f"paths.store={place / 'packed'}"]
    known = []

    def begin(folder: Path) -> None:
        given = {"folds": 3, "overrides": overrides, "output_root": place / "runs"}
        search = plan_search(place / "space.yaml", folder / "found", **given)
        found = run_search(search, 2, train=made_up_runs, score=made_up_scores, say=str)
        finish_search(search, found, bootstrap=20)

    def check(folder: Path) -> None:
        names = ("answer/trials.csv", "winner.yaml")
        known.append([(folder / "found" / name).read_text() for name in names])
        assert known[-1] == known[0]

    begin(place / "warm")  # copies of this process import nothing
    assert killed_everywhere(place, begin, check, every=4 * EVERY - 3) > 1
