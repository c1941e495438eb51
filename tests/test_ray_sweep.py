"""A sweep on a cluster: the numbers of one machine, whoever is lost on the way, and what is refused before it starts."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from conftest import PATIENCE, end_second_node, trained_on_second_node, with_node

from topoqa_nb.cli import main
from topoqa_nb.data.tiny import DemoPaths
from topoqa_nb.ground.cluster import Sight, connected, look_around
from topoqa_nb.ground.core import held
from topoqa_nb.runs.record import read_metadata
from topoqa_nb.sweep.manifest import Job, load_manifest, plan_jobs
from topoqa_nb.sweep.processes import PRELOADED
from topoqa_nb.sweep.ray_jobs import RayServer, alone_on_cluster
from topoqa_nb.sweep.sweep import SweepInterrupted, run_jobs

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.xdist_group("ray")

SMALL = {
    "model.hidden_dim": 8,
    "model.attention_head": 2,
    "trainer.num_epochs": 6,
    "early_stopping.patience": 99,
}


def planned(demo: DemoPaths, root: Path, **options: object) -> list[Job]:
    "The first jobs of the extended sweep, shortened."
    data = {"graph": demo.graph_dir, "train_labels": demo.train_labels, "val_labels": demo.val_labels}
    settings = SMALL | {f"paths.{key}": str(place) for key, place in data.items()}
    manifest = load_manifest("run_extended.yaml")
    return plan_jobs(manifest, overrides=settings, output_root=root, **options)


def outcome(job: Job) -> tuple[bytes, dict[str, torch.Tensor]]:
    "Every epoch, and the weights after the last one."
    content = torch.load(job.run.last_checkpoint, weights_only=False)
    return job.run.metrics_file.read_bytes(), content["state_dict"]


def assert_same(one: Job, other: Job) -> None:
    (rows, weights), (other_rows, other_weights) = outcome(one), outcome(other)
    assert rows == other_rows, one.name
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights), one.name


STANDS_STILL = """
import time
from pathlib import Path
from topoqa_nb.training.module import TopoQAModule
step = TopoQAModule.training_step
def wait_and_step(module, *batch):
    while module.current_epoch == 2 and not Path("lost").exists():
        time.sleep(0.01)
    return step(module, *batch)
TopoQAModule.training_step = wait_and_step
"""


def test_a_node_lost_in_the_middle_changes_no_number(
    cluster: "Cluster", demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stands_still.py").write_text(STANDS_STILL)
    monkeypatch.chdir(tmp_path)  # that of the nodes, too
    here, there = (
        planned(demo, tmp_path / name, limit=2, timestamp="2026-01-31_12-00-00") for name in ("here", "there")
    )
    lines, lost = [], []

    def listen(line: str) -> None:
        "The second node ends as soon as a training there has an epoch."
        lines.append(line)
        if not lost and (run := trained_on_second_node(cluster, tmp_path / "there")):
            lost.append(run)
            end_second_node(cluster)
            Path("lost").touch()

    assert run_jobs(here, jobs=2, say=lambda line: None).completed
    with RayServer([*PRELOADED, "stands_still"]) as server:
        result = run_jobs(there, executor="ray", say=listen, server=server)
    with_node(cluster)
    assert result.completed, "\n".join(lines)
    for one, other in zip(here, there, strict=True):
        assert_same(one, other)
    metadata = read_metadata(lost[0])
    assert [entry["checkpoint"] for entry in metadata["resumes"]] == ["last.chkpt"]
    assert re.fullmatch(r"lost on \S+, retry 1 of 3", metadata["resumes"][0]["because"])
    name = next(job.name for job in there if job.run.path == lost[0].path)
    assert f"{name} | {metadata['resumes'][0]['because']}" in lines
    assert lines[0] == "2 jobs, 2 at a time, on 2 nodes of a Ray cluster"
    assert not (tmp_path / "there" / ".sweep").exists()
    lines.clear()  # the driver starts once more
    again = run_jobs(
        planned(demo, tmp_path / "there", limit=2), executor="ray", skip_completed=True, say=lines.append
    )
    assert [job.reason for job in again] == [f"completed before as {job.run.name}" for job in there]
    assert (again.completed, lines) == (True, [])


STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])
def stop(signum, frame):
    (run / "run_metadata.json").write_text(json.dumps({"status": "interrupted", "reason": "by " + str(signum)}))
    sys.exit(128 + signum)
signal.signal(signal.SIGINT, stop)
run.mkdir(parents=True)
(run / "run_metadata.json").write_text(json.dumps({"status": "running"}))
print("Epoch 000 | val_loss=" + os.environ["OMP_NUM_THREADS"] + os.environ["TOPOQA_THREADS"], flush=True)
time.sleep(3600)
"""


def test_ctrl_c_stops_what_runs_and_takes_back_what_waits(
    cluster: "Cluster", demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    jobs = planned(demo, tmp_path / "runs", limit=3)
    lines = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if len([line for line in lines if "Epoch" in line]) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with RayServer(modules=[]) as server, pytest.raises(SweepInterrupted) as stopped:
        command = lambda job: ["-m", "stand_in", str(job.run.path)]  # noqa: E731
        run_jobs(jobs, executor="ray", command=command, say=interrupt, server=server)
    assert [job.status for job in stopped.value.result] == ["interrupted", "interrupted", "not started"]
    assert [job.reason for job in stopped.value.result][:2] == ["by 2", "by 2"]
    assert sum(line.endswith("| Epoch 000 | val_loss=11") for line in lines) == 2  # threads as CPUs
    assert not jobs[2].run.path.exists()


@pytest.fixture
def refused(demo: DemoPaths, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    "What a sweep on a cluster says that is not started."

    def ask(*words: str, resources: str = "") -> str:
        manifest = tmp_path / "manifest.yaml"
        data = f"paths.graph: {demo.graph_dir}, paths.train_labels: {demo.train_labels}"
        shared = (
            f"shared: {{config: config.yaml, overrides: {{{data}, paths.val_labels: {demo.val_labels}}}}}"
        )
        manifest.write_text(f"{resources}\n{shared}\njobs: [{{name: a}}]\n")
        line = [
            "batch",
            "--manifest",
            str(manifest),
            "--executor",
            "ray",
            "--run-root",
            str(tmp_path / "runs"),
        ]
        assert main([*line, *words]) == 2
        said = capsys.readouterr().err.splitlines()
        assert [line.startswith("topoqa: error: ") for line in said] == [True], said
        return said[0]

    yield ask
    assert not list((tmp_path / "runs").glob("*"))


def test_without_ray_or_a_cluster(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with monkeypatch.context() as patch:
        patch.setattr(ray, "init", lambda **options: pytest.fail("Ray itself tries for minutes"))
        assert "expected a Ray cluster at 127.0.0.1:1, found Connection refused" in refused()
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "executor ray: expected the package ray, found none; pip install 'topoqa_nb[ray]'" in refused()


def test_what_no_node_has_is_told_at_once(
    cluster: "Cluster", refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with connected():
        said = refused(resources="resources: {num_cpus: 2}")
        assert (
            "a: resources.num_cpus: expected a node with 2 CPUs, found at most 1 on the 2 of the cluster"
            in said
        )
        assert "expected a node with 1 GPU, found at most 0" in refused(resources="resources: {num_gpus: 1}")
        assert "resources.memory: expected" in refused(resources="resources: {memory: 99 TB}")
        assert "resources.num_cpu: expected a known key" in refused(resources="resources: {num_cpu: 2}")
        own = next(iter(look_around().versions.items()))
        answers = {
            f"expected {own[0]} {own[1]}, found 0.0.1": Sight({own[0]: "0.0.1"}, (True,), ()),
            f"expected the folder {tmp_path / 'runs'} of this machine": None,
        }
        for expected, sight in answers.items():
            with monkeypatch.context() as patch:
                see(patch, sight)
                assert expected in refused()


def see(patch: pytest.MonkeyPatch, sight: Sight | None) -> None:
    "Let the nodes find what they do not find here: other versions, or none of the marks."
    from topoqa_nb.ground import cluster

    def looks(nodes: list, marks: list, inputs: list) -> dict[str, Sight]:
        own = cluster.look_around(marks, inputs)
        return {node.id: sight or replace(own, marks=(False,)) for node in nodes}

    patch.setattr(cluster, "_looks", looks)


def test_a_second_sweep_in_the_same_run_root(
    cluster: "Cluster", refused: Callable[..., str], tmp_path: Path
) -> None:
    with held(tmp_path / "runs"):
        assert "runs: expected a folder for this process alone" in refused()
    (tmp_path / "runs" / ".lock").unlink()  # what is left of a sweep that was killed is not in the way


DRIVER = """
import sys, time
from pathlib import Path
from topoqa_nb.ground.cluster import connected
from topoqa_nb.sweep.ray_jobs import alone_on_cluster
with connected(), alone_on_cluster(Path(sys.argv[1])):
    print("alone", flush=True)
    time.sleep(3600)
"""


def test_without_locks_the_cluster_knows_of_another_driver(
    cluster: "Cluster", refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "runs")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "alone\n"
    monkeypatch.setattr("topoqa_nb.sweep.ray_jobs.FORGET_SECONDS", 0.1)
    said = refused()
    assert "runs: expected a run root for this sweep alone, found another driver on this cluster" in said
    other.kill()  # it has no time to say that it leaves
    other.communicate()
    monkeypatch.setattr("topoqa_nb.sweep.ray_jobs.FORGET_SECONDS", PATIENCE)
    with connected(), alone_on_cluster(tmp_path / "runs"):
        pass
