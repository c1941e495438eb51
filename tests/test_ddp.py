"""One training on several processes: the same numbers as one process, and an end for every way to die."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import forked, is_running
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data

from topoqa_nb.cli import main
from topoqa_nb.data.batches import Coverage, Split, make_loader
from topoqa_nb.data.dataset import open_data
from topoqa_nb.data.schema import EdgeSchema, FeatureSchema, NodeSchema
from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.entry import exit_code
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import ConfigError, TrainingError
from topoqa_nb.ground.signals import Interrupted
from topoqa_nb.network.kernels import find_numba
from topoqa_nb.network.metrics import regression_metrics
from topoqa_nb.network.model import TopoQANet, build_model
from topoqa_nb.network.weights import read_checkpoint
from topoqa_nb.runs.record import RunDirectory, read_metadata
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.training.module import TopoQAModule
from topoqa_nb.training.resume import resume
from topoqa_nb.training.training import train

EXACT = {"trainer.precision": 64, "model.dropout": 0.0}
TWO = {"trainer.devices": 2, "trainer.strategy": "ddp"}
SCHEMA = FeatureSchema(EdgeSchema(3), NodeSchema(5))  # of the tiny graphs
MANY = 500  # epochs, more than a test waits for


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, object]:
    "21 decoys to train on: of the last batch of 4 one is left, and one rank of two has none."
    tiny = write_tiny_dataset(tmp_path_factory.mktemp("data"), targets=4, decoys=7)
    return {
        "paths.graph": tiny.graph_dir, "paths.train_labels": tiny.train_labels, "paths.val_labels": tiny.val_labels,
        "trainer.accumulate_grad_batches": 2, "dataloader.batch_size": 2, "trainer.num_epochs": 2,
        "model.hidden_dim": 8, "model.attention_head": 2, "early_stopping.patience": MANY,
    }  # fmt: skip


def start(data: dict, folder, name: str, **more: object) -> RunDirectory:
    return train(load_config(None, data | {"paths.save_dir": folder}), run_name=name, **more)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> RunDirectory:
    "On two processes, in 64 bit and without dropout."
    return start(data | EXACT | TWO, tmp_path_factory.mktemp("two"), "two")


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> RunDirectory:
    "The same on one process, with batches as large as those of both."
    return start(data | EXACT | {"dataloader.batch_size": 4}, tmp_path_factory.mktemp("one"), "one")


# --- the same numbers ---


def test_two_processes_train_as_one(one, two):
    ours, theirs = read_metrics(two), read_metrics(one)
    assert len(ours) == 2
    assert abs(ours - theirs).max().max() < 1e-9  # val_loss, correlations, train_loss, step, ...
    mine, other = (read_checkpoint(run.last_checkpoint)["state_dict"] for run in (two, one))
    assert max((mine[name] - other[name]).abs().max().item() for name in other) < 1e-9


def test_every_rank_has_the_metrics_of_all_decoys_in_their_order(two):
    (rank,) = two.log_file.parent.glob("rank_*.log")
    rows = [json.loads(line) for line in rank.read_text().splitlines()]
    written = read_metrics(two).to_dict("records")
    assert [{name: row[name] for name in written[0]} for row in rows] == written
    found = validated(two)
    assert max(abs(found[name] - written[-1][name]) for name in found) < 1e-6


def validated(run: RunDirectory) -> dict[str, float]:
    "The validation metrics of the last weights of a run, in one process and in 64 bit."
    config = load_config(run.config_file).config
    split = open_data(config).val
    assert len(split) % 2 == 1  # the parts of two ranks are of different size
    model = build_model(SCHEMA, config.model).double().eval()
    weights = read_checkpoint(run.last_checkpoint)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    with torch.inference_mode():
        (batch,) = make_loader(split, batch_size=len(split), shuffle=False, seed=0)
        scores = model(batch.apply(lambda each: each.double() if each.is_floating_point() else each))
    return regression_metrics(scores.numpy(), split.dockq.double().numpy(), split.targets)


def test_the_record_says_how_many_and_how_large_a_step_is(one, two):
    about = [read_metadata(run)["environment"] for run in (one, two)]
    assert [[each[name] for name in ("ranks", "nodes", "effective_batch")] for each in about] == [
        [1, 1, 8],
        [2, 1, 8],
    ]
    assert "2 ranks on 1 machine; effective batch 2 x 2 x 2 = 8 graphs" in two.console_file.read_text()
    assert "ranks" not in one.console_file.read_text()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 21),
    batch_size=st.integers(1, 5),
    ranks=st.integers(2, 4),
    together=st.integers(1, 3),
    limit=st.sampled_from([None, 1, 0.7]),
)
def test_the_mean_gradient_of_the_ranks_is_that_of_one_process(
    data, count, batch_size, ranks, together, limit
):
    split = first_of(data, count)
    whole = gradients(split, batch_size * ranks, together, limit)
    parts = [gradients(split, batch_size, together, limit, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(whole)}  # equally many steps
    for step, of_ranks in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(of_ranks).mean(0), step, rtol=1e-9, atol=1e-12)


def first_of(data: dict, count: int) -> Split:
    store = open_store(data["paths.graph"])
    return Split(
        "train", store, torch.arange(count), torch.linspace(0, 1, count), [None] * count,
        Coverage(count, count, [], 0),
    )  # fmt: skip


def gradients(split, batch_size, together, limit, **rank) -> list[torch.Tensor]:
    "Of every optimizer step of an epoch."
    torch.manual_seed(3)
    config = load_config(
        None, {"model.hidden_dim": 4, "model.attention_head": 2, "model.dropout": 0.0}
    ).config
    model = build_model(SCHEMA, config.model)
    module = TopoQAModule(model, config, SCHEMA, split.targets).double()
    loader = make_loader(
        split, batch_size=batch_size, shuffle=True, seed=5, together=together, limit=limit, **rank
    )
    module._trainer = SimpleNamespace(train_dataloader=loader, accumulate_grad_batches=1, current_epoch=0)
    module.on_train_epoch_start()
    found = []
    for number, batch in enumerate(loader):
        module.training_step(module.on_after_batch_transfer(batch, 0), number).backward()
        assert all(
            weight.grad is not None for weight in model.parameters()
        )  # DDP waits for every one of them
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        model.zero_grad()
    return found


@pytest.mark.parametrize("kernel", ["reference", "torch", *(["numba"] if find_numba() else [])])
def test_every_weight_has_a_gradient_also_where_no_graph_has_an_edge(kernel, monkeypatch):
    "DDP waits for a gradient of every weight, in every rank; a graph without edges must not leave some out."
    monkeypatch.setenv("TOPOQA_KERNEL", kernel)
    for pooling, layers, sized in itertools.product(("mean", "max", "add"), (1, 2), (False, True)):
        model = TopoQANet(
            SCHEMA,
            hidden_dim=4,
            attention_head=2,
            pooling_type=pooling,
            num_layers=layers,
            size_features=sized,
        )
        batch = Batch.from_data_list(
            [Data(torch.randn(3, 5), torch.empty(2, 0, dtype=torch.int64), torch.empty(0, 3))]
        )
        model.train()(batch).sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())


# --- every way to die ---


def when(run: RunDirectory, epoch: int, action) -> threading.Thread:
    "Do something as soon as an epoch is in metrics.csv."

    def wait() -> None:
        while not (run.metrics_file.is_file() and f"\n{epoch}," in run.metrics_file.read_text()):
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def followers(leader: int) -> list[psutil.Process]:
    return [each for each in psutil.Process(leader).children() if "rank" in each.cmdline()]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=600)[1] or not any(
        is_running(each.pid) for each in processes
    )


def test_a_run_survives_the_end_of_any_of_its_processes(data, tmp_path):
    endless, run = data | TWO | {"trainer.num_epochs": MANY}, RunDirectory(tmp_path / "run")

    leader = forked(start, endless, tmp_path, "run")  # rank 0 is killed
    left: list[psutil.Process] = []
    when(run, 1, lambda: left.extend(followers(leader.pid))).join()
    os.kill(leader.pid, signal.SIGKILL)
    leader.join()
    assert len(left) == 1
    assert gone(left)
    assert read_metadata(run)["status"] == "running"  # nobody was left to write another one

    epoch = last_epoch(run)
    when(run, epoch + 2, lambda: followers(os.getpid())[0].kill())  # rank 1 is killed
    with pytest.raises(TrainingError, match="rank 1: expected a process that trains to the end") as failure:
        resume(run, checkpoint="last")
    about = read_metadata(run)
    assert about["status"] == "failed"
    assert "rank 1" in about["reason"]
    assert "ended by SIGKILL" in about["reason"]
    assert exit_code(failure.value, []) == 1
    assert followers(os.getpid()) == []

    epoch = last_epoch(run)
    when(run, epoch + 2, lambda: os.kill(os.getpid(), signal.SIGTERM))  # rank 0 is asked to stop
    with pytest.raises(Interrupted) as stop:
        resume(run, checkpoint="last")
    assert exit_code(stop.value, []) == 128 + signal.SIGTERM
    assert [read_metadata(run)[name] for name in ("status", "reason")] == [
        "interrupted",
        "stopped by SIGTERM",
    ]
    assert followers(os.getpid()) == []

    epochs = last_epoch(run) + 2
    resume(run, checkpoint="last", overrides={"trainer.num_epochs": epochs})
    assert [entry["ranks"] for entry in read_metadata(run)["resumes"]] == [2, 2, 2]
    whole = on_two_machines(data | {"trainer.num_epochs": epochs}, tmp_path)
    assert run.metrics_file.read_bytes() == whole.metrics_file.read_bytes()

    resume(run, checkpoint="last", overrides={"trainer.num_epochs": epochs + 1, "trainer.devices": 1})
    assert read_metadata(run)["resumes"][-1]["ranks"] == 1
    assert (
        "the run had 2 ranks (effective batch 8) and goes on with 1 (effective batch 4)"
        in run.console_file.read_text()
    )


def last_epoch(run: RunDirectory) -> int:
    return read_checkpoint(run.last_checkpoint)["epoch"]


def on_two_machines(data: dict, folder) -> RunDirectory:
    "The same training by two commands that were started as on two machines; dropout is that of two ranks, too."
    nodes = {"trainer.num_nodes": 2, "trainer.strategy": "ddp", "paths.save_dir": folder}
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    overrides = [part for key, value in (data | nodes).items() for part in ("--override", f"{key}={value}")]
    command = [sys.executable, "-m", "topoqa_nb.cli", "run", "--config", "config.yaml", "--run-name", "whole"]
    second = subprocess.Popen(
        [*command, *overrides], env=os.environ | variables | {"NODE_RANK": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (variables | {"SLURM_NODEID": "0"}).items():
            patch.setenv(name, value)
        run = start(data | nodes, folder, "whole")
    said = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert f"Rank 1 of 2 follows 127.0.0.1:{variables['MASTER_PORT']} in the run {run.path}" in said[1]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "run", "whole"]
    assert read_metadata(run)["environment"]["nodes"] == 2
    return run


def free_port() -> int:
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        return ours.getsockname()[1]


# --- what is refused ---


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("trainer.devices=2", "trainer.devices: expected 1 or auto without trainer.strategy=ddp, found 2"),
        ("trainer.num_nodes=2", "trainer.num_nodes: expected 1 without trainer.strategy=ddp, found 2"),
        ("trainer.devices=2 trainer.strategy=ddp_spawn", "trainer.strategy: expected auto or ddp, found ddp_spawn"),
        ("trainer.devices=1024 trainer.strategy=ddp", "of free memory for each process, found 1024"),
        ("trainer.num_nodes=2 trainer.strategy=ddp", "NODE_RANK or SLURM_NODEID: expected a value"),
    ],
)  # fmt: skip
def test_what_nobody_could_start_is_refused(data, tmp_path, capsys, monkeypatch, overrides, says):
    monkeypatch.setattr("topoqa_nb.training.devices.free_memory", lambda: 10**9)
    asked = [f"{key}={value}" for key, value in (data | {"paths.save_dir": tmp_path / "runs"}).items()]
    arguments = [part for each in [*asked, *overrides.split()] for part in ("--override", each)]
    assert main(["run", "--config", "config.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_callbacks_of_a_caller_are_for_one_process(data, tmp_path):
    with pytest.raises(ConfigError, match="callbacks: expected none with 2 processes"):
        start(data | TWO, tmp_path / "runs", "run", callbacks=[object()])
    assert not (tmp_path / "runs").exists()
