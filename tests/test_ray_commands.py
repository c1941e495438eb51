"""Commands that train many runs, on a cluster: what they write is what one machine writes, whoever is lost or stopped.

`make test` tries one of them; `make test-faults` all, with nodes that are lost and Ctrl-C (TOPOQA_CLUSTER=all).
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from conftest import a_node_lost, trained_on_second_node
from test_evaluation import train_here

from topoqa_nb.cli import main
from topoqa_nb.data.tiny import DemoPaths
from topoqa_nb.ground.core import write_text
from topoqa_nb.runs.record import read_metadata, read_record
from topoqa_nb.runs.runs import list_runs

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.xdist_group("ray")

SPACE = "measure: rmse\nspace: {optimizer.learning_rate: {low: 1e-3, high: 1e-2, log: true}}\n"
MANIFEST = (
    "jobs: [{name: one, config: config.yaml}, {name: other, config: large_batch_sched_boost_seed222.yaml}]"
)
VARIES = re.compile(
    rb"\d{4}-\d\d-\d\d[T_ ]\d\d[:-]\d\d[:-]\d\d([+-]\d\d:\d\d)?|\"(seconds|executor)\": [^,\n]*"
)


def line(command: str, demo: DemoPaths, folder: Path, *more: str, epochs: int) -> list[str]:
    "A command with small trainings, all files of which go to a folder."
    settings = {"model.hidden_dim": 8, "model.attention_head": 2, "trainer.num_epochs": epochs}
    settings |= {"paths.train_labels": demo.train_labels, "paths.val_labels": demo.val_labels}
    settings |= {"early_stopping.patience": 999}
    overrides = [part for key, value in settings.items() for part in ("--override", f"{key}={value}")]
    place = ["--run-root", str(folder / "runs"), "--jobs", "3", *overrides]
    graphs = ["--override", f"paths.graph={demo.graph_dir}"]
    judged = ["--folds", "3", "--bootstrap", "20", "--out", str(folder / "out"), *graphs]
    own = {
        "cross-validate": ["--config", "config.yaml", *judged],
        "search": ["--space", str(write_text(folder / "space.yaml", SPACE)), "--trials", "2", *judged],
        "pipeline": [
            *("--graph-dir", str(demo.graph_dir), "--reports-dir", str(folder / "out")),
            *("--manifest", str(write_text(folder / "two.yaml", MANIFEST)), "--phase-override"),
            f"trainer.num_epochs={epochs}",
        ],
    }
    return [command, *own[command], *place, *more]


def told(folder: Path) -> dict[str, object]:
    "What must not depend on who trains: epochs and weights of all runs that completed, and what was found."
    found = {}
    for run in list_runs(folder / "runs"):
        if read_record(run).status == "completed":
            weights = torch.load(run.last_checkpoint, weights_only=False)["state_dict"]
            kept = {name: value.numpy().tobytes() for name, value in weights.items()}
            best = read_record(run).checkpoints.best
            found[VARIES.sub(b"", run.name.encode())] = run.metrics_file.read_bytes(), kept, best
    answers = (
        {".csv", ".yaml", ".html"} if not (folder / "out" / "pipeline_summary.json").exists() else {".json"}
    )
    for file in sorted((folder / "out").rglob("*")):
        if file.suffix in answers and file.name != "parameters.json":
            text = file.read_bytes().replace(str(folder).encode(), b"")
            found[str(file.relative_to(folder))] = VARIES.sub(b"", text)
    return found


def assert_same(here: Path, there: Path) -> None:
    one, other = told(here), told(there)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_a_search_gives_on_a_cluster_what_it_gives_here(
    cluster: "Cluster", demo: DemoPaths, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topoqa_nb.sweep.sweep.run_jobs", train_here)
        assert main(line("search", demo, tmp_path / "here", epochs=1)) == 0
    assert main(line("search", demo, tmp_path / "there", "--executor", "ray", epochs=1)) == 0
    assert_same(tmp_path / "here", tmp_path / "there")


def started(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "topoqa_nb.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def ended(words: list[str], code: int = 0) -> None:
    process = started(words)
    said, _ = process.communicate()
    assert process.returncode == code, said


def servers(cluster: "Cluster") -> list[psutil.Process]:
    "What trainings on its nodes are started by, and trainings."
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
    family, found = [each for pid in raylets for each in psutil.Process(pid).children(recursive=True)], []
    for each in family:
        with suppress(psutil.NoSuchProcess):
            found += [each] if "topoqa_nb" in " ".join(each.cmdline()) else []
    return found


@pytest.mark.skipif(os.environ.get("TOPOQA_CLUSTER") != "all", reason="takes minutes: `make test-faults`")
@pytest.mark.parametrize("command", ["cross-validate", "search", "pipeline"])
def test_a_node_is_lost_and_a_command_is_stopped_and_nothing_else_changes(
    command: str, cluster: "Cluster", demo_set: DemoPaths, tmp_path: Path
) -> None:
    here, there, stopped = (tmp_path / name for name in ("here", "there", "stopped"))
    ended(line(command, demo_set, here, epochs=12))
    with a_node_lost(cluster, lambda: trained_on_second_node(cluster, there / "runs")) as lost:
        ended(line(command, demo_set, there, "--executor", "ray", epochs=12))
    assert [entry["checkpoint"] for entry in read_metadata(lost[0])["resumes"]] == ["last.chkpt"]
    assert_same(here, there)

    words = line(command, demo_set, stopped, "--executor", "ray", epochs=12)
    process = started(words)
    while not trained_on_second_node(cluster, stopped / "runs"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate()
    assert (process.returncode, said.splitlines()[-1]) == (130, "topoqa: stopped by SIGINT"), said
    assert "Traceback" not in said
    states = [read_record(run).status for run in list_runs(stopped / "runs")]
    assert "interrupted" in states and {*states} <= {"completed", "interrupted"}
    psutil.wait_procs(servers(cluster), timeout=600)
    assert servers(cluster) == []
    assert not list(stopped.rglob("*.tmp")) and not (stopped / "runs" / ".sweep").exists()
    ended(words + ["--overwrite"] * (command == "cross-validate"))  # the others go on
    assert_same(here, stopped)
