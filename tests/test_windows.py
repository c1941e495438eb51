"""Batches of one optimizer step go through the network together, and the step is the same."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data

from topoqa_nb.data.batches import Coverage, Split, make_loader
from topoqa_nb.data.schema import EdgeSchema, FeatureSchema, NodeSchema
from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import save_graph, write_tiny_dataset
from topoqa_nb.ground.config import load_config
from topoqa_nb.network.kernels import find_numba
from topoqa_nb.network.model import TopoQANet
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.training.module import TopoQAModule
from topoqa_nb.training.training import train

KERNELS = ["reference", "torch", *(["numba"] if find_numba() else [])]
GRAPHS = 23


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Graphs of odd sizes; every fifth has no edges, one has a single node."
    folder, generator = tmp_path_factory.mktemp("odd"), torch.Generator().manual_seed(7)
    for number in range(GRAPHS):
        nodes = 1 if number == 3 else 2 + number % 6
        edges = 0 if number % 5 == 0 else 1 + 3 * number % 17
        save_graph(
            Data(
                x=torch.randn(nodes, 4, generator=generator),
                edge_index=torch.randint(nodes, (2, edges), generator=generator),
                edge_attr=torch.randn(edges, 2, generator=generator),
            ),
            folder / f"{number:02}.pt",
        )
    return open_store(folder, store_dir=folder.parent / "store")


def split_of(store, count):
    dockq = torch.linspace(0, 1, count)
    return Split("train", store, torch.arange(count), dockq, [None] * count, Coverage(count, count, [], 0))


def steps_of(split, batch_size, window, together, limit=None):
    "The gradient of every optimizer step of two epochs, as Lightning adds them up, and the mean losses."
    torch.manual_seed(3)
    model = TopoQANet(
        FeatureSchema(EdgeSchema(2), NodeSchema(4)), hidden_dim=4, attention_head=2, dropout=0.3
    ).train()
    module = TopoQAModule(model, load_config(None, {}).config, SimpleNamespace(), split.targets).double()
    loader = make_loader(split, batch_size=batch_size, shuffle=True, seed=5, together=together, limit=limit)
    passes, gradients, means = window // together, [], []
    module._trainer = SimpleNamespace(
        train_dataloader=loader, accumulate_grad_batches=passes, current_epoch=0
    )
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        module.on_train_epoch_start()
        for number, batch in enumerate(loader):
            loss = module.training_step(module.on_after_batch_transfer(batch, 0), number)
            (loss / passes).backward()
            if (number + 1) % passes == 0 or number + 1 == len(loader):
                gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
                model.zero_grad()
        means.append(module.train_loss())
    return gradients, means


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=12)
@given(
    count=st.integers(1, GRAPHS),
    batch_size=st.integers(1, 6),
    passes=st.integers(1, 3),
    together=st.integers(2, 4),
    limit=st.sampled_from([None, 3, 0.6]),
)
def test_a_step_is_the_same_whatever_goes_together(kernel, store, count, batch_size, passes, together, limit):
    if isinstance(limit, float) and int(-(-count // batch_size) * limit) < 1:
        limit = None
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TOPOQA_KERNEL", kernel)
        split, window = split_of(store, count), passes * together
        wanted, found = (steps_of(split, batch_size, window, each, limit) for each in (1, together))
    assert found[1] == pytest.approx(wanted[1], rel=1e-12)
    for ours, theirs in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    demo = write_tiny_dataset(tmp_path_factory.mktemp("tiny") / "set", targets=6, decoys=5)
    return {
        "paths.graph": str(demo.graph_dir),
        "paths.train_labels": str(demo.train_labels),
        "paths.val_labels": str(demo.val_labels),
        "dataloader.batch_size": 4,
        "trainer.accumulate_grad_batches": 4,
        "trainer.num_epochs": 3,
        "trainer.precision": 64,
    }


def test_three_epochs_are_equal_to_rounding_and_from_run_to_run_bit_for_bit(tiny, tmp_path):
    runs = [
        train(load_config(None, tiny | {"paths.save_dir": str(tmp_path), "trainer.fuse_batches": switch}))
        for switch in ("off", "auto", "auto")
    ]
    apart, together, again = map(read_metrics, runs)
    assert (apart - together).abs().max().max() < 1e-9
    assert list(apart["step"]) == list(together["step"]) == [2, 4, 6]
    assert runs[1].metrics_file.read_bytes() == runs[2].metrics_file.read_bytes()
    assert not together.equals(apart) or again.equals(together)


def test_progress_and_limits_count_batches_and_not_passes(tiny, tmp_path):
    changes = {"trainer.limit_train_batches": 3, "trainer.num_epochs": 1, "paths.save_dir": str(tmp_path)}
    run = train(load_config(None, tiny | changes | {"trainer.accumulate_grad_batches": 2}))
    lines = [line for line in run.console_file.read_text().splitlines() if line.startswith("Epoch 000 |  ")]
    assert [line.split("|")[1].strip() for line in lines] == ["67%"]
    assert list(read_metrics(run)["step"]) == [2]
