"""The published network's answers, reproduced from its own weights by every kernel."""

import json

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from topoqa_nb.network.kernels import KERNELS, find_numba
from topoqa_nb.network.weights import load_foreign_weights, published_names

VARIANTS = {"linear_11d_h8": "mean", "mlp_11d_h8": "mean", "mlp_24d_h4": "add"}


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request, monkeypatch):
    "Every test runs with each kernel that is there."
    if request.param == "numba" and find_numba() is None:
        pytest.skip("numba is not installed")
    monkeypatch.setenv("TOPOQA_KERNEL", request.param)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def fixture(request, shared_dir):
    "One variant: its weights file, its batch of graphs, and what is expected."
    folder = shared_dir / "parity" / request.param
    expected = json.loads((folder / "expected.json").read_text())
    with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
        graphs = [torch.load(folder / name, weights_only=True) for name in expected["graphs"]]
    return folder / "weights.ckpt", Batch.from_data_list(graphs), expected, VARIANTS[request.param]


def in_float64(batch):
    batch = batch.clone()
    batch.x, batch.edge_attr = batch.x.double(), batch.edge_attr.double()
    return batch


def test_scores_in_float64(fixture):
    path, batch, expected, pooling = fixture
    model = load_foreign_weights(path, pooling_type=pooling).double().eval()
    wanted = torch.tensor(expected["scores_float64"], dtype=torch.float64)
    torch.testing.assert_close(model(in_float64(batch)), wanted, rtol=0, atol=1e-9)


def test_scores_in_float32(fixture):
    path, batch, expected, pooling = fixture
    model = load_foreign_weights(path, pooling_type=pooling).eval()
    wanted = torch.tensor(expected["scores_float32"])
    torch.testing.assert_close(model(batch), wanted, rtol=0, atol=5e-5)


def test_each_graph_alone(fixture):
    path, batch, expected, pooling = fixture
    model = load_foreign_weights(path, pooling_type=pooling).double().eval()
    scores = torch.cat([model(graph) for graph in in_float64(batch).to_data_list()])
    wanted = torch.tensor(expected["scores_float64"], dtype=torch.float64)
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-9)


def test_gradient_norms(fixture):
    path, batch, expected, pooling = fixture
    model = load_foreign_weights(path, pooling_type=pooling).double().eval()
    target = torch.tensor(expected["target"], dtype=torch.float64)
    loss = torch.nn.functional.mse_loss(model(in_float64(batch)), target)
    assert loss.item() == pytest.approx(expected["mse_loss_float64"], rel=1e-10)
    loss.backward()
    names = published_names(model)
    found = {names[own]: parameter.grad.norm().item() for own, parameter in model.named_parameters()}
    assert found == pytest.approx(expected["grad_norm_float64"], rel=1e-9)


def test_the_file_tells_its_pooling(fixture):
    path, _, _, pooling = fixture
    model = load_foreign_weights(path)
    assert model.pooling_type == pooling
    assert any("third convolution" in note for note in model.notes)
