"""Build, predict and score on a cluster: the bytes of one process, whoever is lost or stopped on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import a_node_lost, in_turn

from topoqa_nb.build.example import helix_pair, write_example
from topoqa_nb.cli import main

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.xdist_group("ray")

STRUCTURES = 60


@pytest.fixture(scope="module")
def decoys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Structures, two of which give no graph, and natives beside them."
    folder = tmp_path_factory.mktemp("ray") / "decoys"
    for number in range(STRUCTURES):
        target = f"T{number // 20}"
        distance = 60 if number in (7, 31) else 8.5 + number / STRUCTURES
        write_example(folder / target / f"{target}_{number:02d}.pdb", helix_pair(distance))
        write_example(folder.parent / "natives" / f"{target}.pdb")
    return folder


@pytest.fixture(scope="module")
def whole(decoys: Path) -> Path:
    "The build of one process."
    out = decoys.parent / "whole"
    assert main([*build_of(decoys, out), "--jobs", "1"]) == 1
    return out


@pytest.fixture(scope="module")
def model(whole: Path) -> Path:
    "A model that was trained for a moment."
    from topoqa_nb.ground.config import load_config
    from topoqa_nb.training.training import train

    rows = (whole / "labels.csv").read_text().splitlines(keepends=True)
    for name, target in (("train", "T0/"), ("val", "T1/")):
        (whole / f"{name}.csv").write_text(
            "".join([rows[0], *(row for row in rows if row.startswith(target))])
        )
    small = {"model.hidden_dim": 8, "model.attention_head": 2, "trainer.num_epochs": 1}
    settings = {"paths.graph": str(whole / "graph_data"), "dataloader.batch_size": 4} | small
    train(load_config(None, settings), run_name="small", output_root=whole.parent / "runs")
    return whole.parent / "runs" / "small"


def build_of(decoys: Path, out: Path) -> list[str]:
    return ["build", str(decoys), "--out", str(out), "--native", str(decoys.parent / "natives")]


def contents(out: Path) -> dict[str, bytes]:
    "Graphs, sidecar and labels of a build: what must not depend on how it went."
    files = [*(out / "graph_data").rglob("*"), out / "labels.csv"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.is_file()}


def lines_of(out: Path) -> int:
    journal = out / "build_journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_bytes_are_those_of_one_process(
    cluster: "Cluster",
    decoys: Path,
    whole: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from topoqa_nb.ground.cluster import connected

    ray, out = ["--executor", "ray"], tmp_path / "out"
    monkeypatch.setattr("topoqa_nb.answers.shards._SHARD", 8)
    monkeypatch.setattr("topoqa_nb.build.score._SHARD", 8)
    asked = ["--model", str(model), "--batch-size", "4"]
    predict = ["predict", *asked, "--graph-dir", str(whole / "graph_data"), "--out"]
    score = ["score", str(decoys), *asked, "--out"]
    with connected():
        with a_node_lost(cluster, lambda: lines_of(out) >= 8 and lines_of(out)) as done:
            assert main([*build_of(decoys, out), *ray]) == 1  # two have no graph
        assert 8 <= done[0] < 2 * STRUCTURES - 4, "it was lost in the middle"
        assert contents(out) == contents(whole)
        assert not list(out.rglob("*.tmp"))
        assert main([*predict, str(tmp_path / "there.csv"), *ray]) == 0
        assert main([*score, str(tmp_path / "scored_there.csv"), *ray]) == 1
    assert main([*predict, str(tmp_path / "here.csv")]) == 0
    assert main([*score, str(tmp_path / "scored_here.csv"), "--jobs", "1"]) == 1
    for name in ("here.csv", "scored_here.csv"):
        there = tmp_path / name.replace("here", "there")
        assert (tmp_path / name).read_bytes() == there.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_stopped_build_goes_on_elsewhere(
    cluster: "Cluster", decoys: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "topoqa_nb.cli", *build_of(decoys, out), "--executor", "ray"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while lines_of(out) < 8:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "Traceback" not in said and said.endswith("topoqa: stopped by SIGINT\n")
    assert f"of {STRUCTURES} structures are done and kept; the same command goes on from there" in said
    before = lines_of(out)
    assert main([*build_of(decoys, out), "--jobs", "1"]) == 1  # by whoever
    assert lines_of(out) > before and contents(out) == contents(whole)


@in_turn("command", ["build", "predict", "score"])
def test_without_ray_it_is_one_line(
    command: str, decoys: Path, whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = {
        "build": [*build_of(decoys, tmp_path / "out")],
        "predict": ["predict", "--model", str(model), "--graph-dir", str(whole / "graph_data")],
        "score": ["score", str(decoys), "--model", str(model)],
    }[command]
    words += [] if command == "build" else ["--out", str(tmp_path / "out.csv")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        assert main([*words, "--executor", "ray"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("topoqa: error: executor ray: expected the package ray, found none; pip install")
    assert main([*words, "--executor", "rey"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_parts_of_another_question_are_refused(
    decoys: Path, whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("ray")
    kept = tmp_path / ".out.csv.shards"
    kept.mkdir()
    (kept / "question.json").write_text("{}")
    (kept / "shard_000000.json").write_text("{}")
    words = ["predict", "--model", str(model), "--graph-dir", str(whole / "graph_data"), "--executor", "ray"]
    assert main([*words, "--out", str(tmp_path / "out.csv")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "expected parts of the same question, found a question that cannot be read; ask as before" in said
    assert (kept / "shard_000000.json").exists() and not (tmp_path / "out.csv").exists()
    assert main(["score", str(decoys), "--model", str(model), "--executor", "ray"]) == 2  # no place for parts
    assert "beside which finished parts are kept" in capsys.readouterr().err


def test_a_folder_that_a_node_does_not_see_is_refused(
    cluster: "Cluster",
    decoys: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    @contextmanager
    def elsewhere(folders: list[Path]) -> Iterator[list[tuple[Path, str]]]:
        "Marks in folders that only this machine has."
        yield [(Path("/nowhere") / folder.name, "mark") for folder in folders]

    monkeypatch.setattr("topoqa_nb.ground.cluster._marks", elsewhere)
    assert main([*build_of(decoys, tmp_path / "out"), "--executor", "ray"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"expected the folder {tmp_path} of this machine, found no such folder" in said
    assert list(tmp_path.iterdir()) == []
