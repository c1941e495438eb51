"""What the network promises on graphs of every kind, and on files that are not what they should be."""

import math
import random
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_turn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GATv2Conv

from topoqa_nb.data.schema import EdgeSchema, FeatureSchema, NodeSchema
from topoqa_nb.ground.core import CheckpointError, ConfigError, SchemaError
from topoqa_nb.network.kernels import KERNELS as ALL_KERNELS
from topoqa_nb.network.kernels import find_numba
from topoqa_nb.network.layer import EdgeUpdate
from topoqa_nb.network.model import TopoQANet, pool
from topoqa_nb.network.weights import load_foreign_weights, load_weights, published_names, read_checkpoint

NODE_WIDTH, EDGE_WIDTH = 5, 3
SCHEMA = FeatureSchema(EdgeSchema(EDGE_WIDTH), NodeSchema(NODE_WIDTH))
KERNELS = [kernel for kernel in ALL_KERNELS if kernel != "numba" or find_numba()]
POOLINGS = ("mean", "add", "max")


def make_graph(nodes: int, edges: int, seed: int = 0, edge_width: int = EDGE_WIDTH, **extra) -> Data:
    "A random graph in 64 bit; edges in no order, repeated pairs and self pairs included."
    generator = torch.Generator().manual_seed(seed)
    return Data(
        x=torch.randn(nodes, NODE_WIDTH, generator=generator, dtype=torch.float64),
        edge_index=torch.randint(nodes, (2, edges), generator=generator),
        edge_attr=torch.randn(edges, edge_width, generator=generator, dtype=torch.float64),
        **extra,
    )


def make_model(
    seed: int = 0, edge_width: int = EDGE_WIDTH, use_layer_norm: bool = True, **options
) -> TopoQANet:
    "A small network with random weights, its last layer scaled so that scores spread over (0, 1)."
    torch.manual_seed(seed)
    sizes = {"hidden_dim": 8, "attention_head": 2} | options
    edge = EdgeSchema(edge_width, use_layer_norm=use_layer_norm)
    model = TopoQANet(FeatureSchema(edge, NodeSchema(NODE_WIDTH)), **sizes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn_like(parameter) * (2 / fan_in) ** 0.5)
        model.score.weight /= 1000
        model.score.bias.zero_()
        graphs = [make_graph(6, 18, seed, edge_width=edge_width) for seed in range(100, 120)]
        logits = torch.cat([torch.logit(model(graph)) for graph in graphs])
        model.score.weight /= logits.std()
        model.score.bias -= logits.mean() / logits.std()
    return model


def test_the_test_networks_tell_graphs_apart():
    "Saturated or constant scores would make every comparison below pass."
    for pooling_type in POOLINGS:
        model = make_model(pooling_type=pooling_type)
        scores = torch.cat([model(make_graph(6, 18, seed)) for seed in range(10)])
        assert scores.std() > 0.05


def relabelled(graph: Data, seed: int) -> Data:
    "The same graph with its nodes and its edges in another order."
    generator = torch.Generator().manual_seed(seed)
    old_of_new = torch.randperm(graph.num_nodes, generator=generator)
    new_of_old = torch.argsort(old_of_new)
    order = torch.randperm(graph.num_edges, generator=generator)
    edge_index = new_of_old[graph.edge_index][:, order]
    return Data(x=graph.x[old_of_new], edge_index=edge_index, edge_attr=graph.edge_attr[order])


# The formulas of the model page, written node by node and edge by edge.


def attention_by_hand(conv: GATv2Conv, nodes, edge_index, edges):
    heads, width = conv.att.shape[1:]
    new = conv.bias.expand(len(nodes), -1).clone()
    for i in range(len(nodes)):
        incoming = [e for e in range(edge_index.shape[1]) if edge_index[1, e] == i]
        for k in range(heads) if incoming else ():
            rows = slice(k * width, (k + 1) * width)
            x_l = [
                conv.lin_l.weight[rows] @ nodes[edge_index[0, e]] + conv.lin_l.bias[rows] for e in incoming
            ]
            x_r = conv.lin_r.weight[rows] @ nodes[i] + conv.lin_r.bias[rows]
            sums = [
                own + x_r + conv.lin_edge.weight[rows] @ edges[e]
                for own, e in zip(x_l, incoming, strict=True)
            ]
            scores = torch.stack([conv.att[0, k] @ torch.where(z > 0, z, 0.2 * z) for z in sums])
            alpha = torch.exp(scores - scores.max())
            alpha = alpha / alpha.sum()
            new[i] += sum(a * own for a, own in zip(alpha, x_l, strict=True)) / heads
    return new


def edge_update_by_hand(update: EdgeUpdate, nodes, edge_index, edges):
    triples = torch.cat([nodes[edge_index[0]], nodes[edge_index[1]], edges], dim=1)
    return (triples @ update.weight.T + update.bias).unflatten(1, (update.heads, -1)).mean(1)


def score_by_hand(model: TopoQANet, graph: Data):
    nodes, edges = model.node_embedding(graph.x), model.edge_embedding(graph.edge_attr)
    for layer in model.layers:
        before = nodes, edges
        if layer.node_norm is not None:
            nodes, edges = layer.node_norm(nodes), layer.edge_norm(edges)
        nodes = attention_by_hand(layer.attention, nodes, graph.edge_index, edges)
        edges = edge_update_by_hand(layer.edge_update, nodes, graph.edge_index, edges)
        nodes, edges = (torch.where(z > 0, z, torch.expm1(z)) for z in (nodes, edges))
        if layer.node_norm is not None:
            nodes, edges = (old + new for old, new in zip(before, (nodes, edges), strict=True))
    summary = {"mean": lambda z: z.mean(0), "add": lambda z: z.sum(0), "max": lambda z: z.max(0).values}
    pooled = [summary[model.pooling_type](z) if len(z) else z.new_zeros(z.shape[1]) for z in (nodes, edges)]
    hidden = torch.cat([pooled[0], model.edge_readout(pooled[1])])
    if model.sizes is not None:
        counts = graph.num_nodes, graph.num_edges
        numbers = torch.tensor([math.log1p(counts[0]), math.log1p(counts[1]), counts[1] / counts[0]])
        hidden = torch.cat([hidden, (numbers.double() - model.sizes.mean) / model.sizes.scale])
    hidden = model.second_hidden(model.first_hidden(hidden).clamp(min=0)).clamp(min=0)
    return 1 / (1 + torch.exp(-model.score(hidden)))


@in_turn("pooling_type", POOLINGS)
@in_turn("edge_encoder", ["mlp", "linear"])
@in_turn("heads", [1, 3])
def test_the_formulas_of_the_page(pooling_type, edge_encoder, heads):
    model = make_model(pooling_type=pooling_type, edge_encoder=edge_encoder, attention_head=heads)
    for graph in (make_graph(6, 15), make_graph(4, 0), make_graph(1, 0), make_graph(1, 2)):
        torch.testing.assert_close(model(graph), score_by_hand(model, graph), rtol=0, atol=1e-12)


OPTIONS = ({"residual": True}, {"size_features": True}, {"residual": True, "size_features": True})


def make_optional(**options) -> TopoQANet:
    model = make_model(**options)
    if model.sizes is not None:
        model.sizes.measure(torch.tensor([3, 6, 9]), torch.tensor([8, 20, 31]))
    return model


@in_turn("options", OPTIONS)
def test_the_formulas_of_what_may_be_added(options):
    "Values by every kernel, alone and in a batch; gradients by hand."
    graphs = [make_graph(6, 15), make_graph(4, 0), make_graph(1, 0), make_graph(1, 2), make_graph(5, 9)]
    model = make_optional(**options, pooling_type="add")
    by_hand = torch.cat([score_by_hand(model, graph) for graph in graphs])
    expected = torch.autograd.grad(by_hand.sum(), list(model.parameters()))
    for kernel in KERNELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TOPOQA_KERNEL", kernel)
            scores = model(Batch.from_data_list(graphs))
            alone = torch.cat([model(graph) for graph in graphs])
            gradients = torch.autograd.grad(scores.sum(), list(model.parameters()))
        torch.testing.assert_close(scores, by_hand, rtol=0, atol=1e-6)  # sizes are counted in 32 bit
        torch.testing.assert_close(alone, scores, rtol=0, atol=1e-6)
        for ours, reference in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_a_network_without_options_has_the_parts_it_had():
    "In their order: optimizer states and seeds go by it."
    first = list(make_seeded(3).state_dict())
    assert first[:2] == ["node_embedding.weight", "node_embedding.bias"]
    assert not [name for name in first if "norm" in name or "sizes" in name]
    for options in OPTIONS:
        torch.manual_seed(3)
        names = list(TopoQANet(SCHEMA, **options).state_dict())
        assert [name for name in names if name in first] == first


# Symmetries.


@settings(max_examples=25)
@given(
    nodes=st.integers(1, 12),
    edges=st.integers(0, 30),
    seed=st.integers(0, 1000),
    pooling_type=st.sampled_from(POOLINGS),
)
def test_the_order_of_nodes_and_edges_does_not_matter(nodes, edges, seed, pooling_type):
    model, graph = make_model(seed % 5, pooling_type=pooling_type), make_graph(nodes, edges, seed)
    torch.testing.assert_close(model(relabelled(graph, seed)), model(graph), rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=6),
    pooling_type=st.sampled_from(POOLINGS),
)
def test_a_graph_scores_the_same_alone_and_in_any_batch(sizes, pooling_type):
    model = make_model(pooling_type=pooling_type)
    graphs = [make_graph(*size, seed=seed) for seed, size in enumerate(sizes)]
    alone = torch.cat([model(graph) for graph in graphs])
    torch.testing.assert_close(model(Batch.from_data_list(graphs)), alone, rtol=0, atol=1e-12)
    order = random.Random(0).sample(range(len(graphs)), len(graphs))
    shuffled = model(Batch.from_data_list([graphs[i] for i in order]))
    torch.testing.assert_close(shuffled, alone[order], rtol=0, atol=1e-12)


def test_the_direction_of_an_edge_matters():
    model, graph = make_model(), make_graph(5, 12)
    turned = graph.clone()
    turned.edge_index = graph.edge_index.flip(0)
    assert (model(graph) - model(turned)).abs() > 1e-6


def test_the_edge_features_matter():
    model, graph = make_model(), make_graph(5, 12)
    other = graph.clone()
    other.edge_attr = graph.edge_attr + 1.0
    assert (model(graph) - model(other)).abs() > 1e-6


# Graphs at the border.


@in_turn("pooling_type", POOLINGS)
def test_a_batch_in_which_no_graph_has_an_edge(pooling_type):
    model = make_model(pooling_type=pooling_type)
    scores = model(Batch.from_data_list([make_graph(3, 0), make_graph(1, 0, seed=1)]))
    assert scores.shape == (2,) and torch.isfinite(scores).all()
    scores.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@in_turn("pooling_type", POOLINGS)
@in_turn("place", ["first", "middle", "last"])
def test_a_graph_without_edges_pools_zeros_wherever_it_stands(pooling_type, place):
    rows, graph_of_row = (
        torch.tensor([[-2.0], [-4.0], [-6.0]]),
        {"first": [1, 1, 2], "middle": [0, 2, 2], "last": [0, 0, 1]},
    )
    pooled = pool(rows, torch.tensor(graph_of_row[place]), 3, pooling_type)
    empty = {"first": 0, "middle": 1, "last": 2}[place]
    assert pooled.shape == (3, 1)
    assert pooled[empty] == 0
    assert (pooled[[graph for graph in range(3) if graph != empty]] < 0).all()


def test_an_isolated_node_takes_part_in_node_pooling_only():
    model, graph = make_model(pooling_type="add"), make_graph(5, 12)
    larger = graph.clone()
    larger.x = torch.cat([graph.x, torch.ones(1, NODE_WIDTH, dtype=torch.float64)])
    torch.testing.assert_close(model(larger), score_by_hand(model, larger).reshape(1), rtol=0, atol=1e-12)
    assert (model(larger) - model(graph)).abs() > 1e-9


@in_turn("pooling_type", POOLINGS)
def test_pooling_returns_one_tensor(pooling_type):
    pooled = pool(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), 2, pooling_type)
    assert isinstance(pooled, torch.Tensor) and pooled.shape == (2, 2)


def test_one_graph_gives_a_vector_of_one_score():
    assert make_model()(Batch.from_data_list([make_graph(4, 6)])).shape == (1,)


def test_edge_features_without_a_second_dimension_are_one_column():
    model, graph = make_model(edge_width=1), make_graph(4, 6)
    graph.edge_attr = graph.edge_attr[:, 0]
    flat = model(graph)
    graph.edge_attr = graph.edge_attr.unsqueeze(1)
    assert torch.equal(flat, model(graph))


@in_turn("kind", [torch.bfloat16, torch.float16])
def test_many_edges_are_pooled_correctly_in_half_precision(kind):
    "A sum of ones stops at 256 in bf16 and at 2048 in fp16."
    rows = torch.cat([torch.zeros(3000, 1), torch.ones(3000, 1)]).to(kind)
    graph_of_row = torch.zeros(6000, dtype=torch.long)
    assert pool(rows, graph_of_row, 1, "mean").item() == 0.5
    assert pool(rows, graph_of_row, 1, "add").item() == 3000


def test_mixed_precision_runs_forward_and_backward(monkeypatch):
    monkeypatch.delenv("TOPOQA_KERNEL", raising=False)  # a forced kernel may not fit
    model = make_model().float().train()
    graph = make_graph(6, 20).to("cpu")
    graph.x, graph.edge_attr = graph.x.float(), graph.edge_attr.float()
    exact = model.eval()(graph)
    with torch.autocast("cpu", torch.bfloat16):
        score = model(graph)
    assert (score.float() - exact).abs() < 0.05
    score.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# Parameters.


@in_turn("pooling_type", POOLINGS)
@in_turn("num_layers", [1, 2, 4])
def test_every_parameter_is_used(pooling_type, num_layers):
    "An unused one stops a training on several processes."
    model = make_model(pooling_type=pooling_type, num_layers=num_layers)
    model(Batch.from_data_list([make_graph(6, 20), make_graph(5, 9, seed=1)])).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradients_are_those_of_the_unfolded_edge_update():
    model, graph = make_model(), make_graph(6, 20)
    folded = torch.autograd.grad(model(graph).sum(), list(model.parameters()))
    by_hand = torch.autograd.grad(score_by_hand(model, graph).sum(), list(model.parameters()))
    for ours, reference in zip(folded, by_hand, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_dropout_acts_in_training_only():
    model, graph = make_model(dropout=0.5), make_graph(6, 20)
    assert torch.equal(model(graph), model(graph))
    model.train()
    assert not torch.equal(model(graph), model(graph))


def test_one_seed_gives_one_set_of_weights():
    first, second, other = (
        [p.detach().clone() for p in make_seeded(seed).parameters()] for seed in (3, 3, 4)
    )
    assert all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first, other))


def make_seeded(seed: int) -> TopoQANet:
    torch.manual_seed(seed)
    return TopoQANet(SCHEMA)


def test_the_schema_decides_about_layer_norm():
    kinds = {
        use: [type(step).__name__ for step in make_model(use_layer_norm=use).edge_embedding]
        for use in (True, False)
    }
    assert kinds == {True: ["Linear", "LayerNorm", "ReLU", "Linear"], False: ["Linear", "ReLU", "Linear"]}


@in_turn("key, value", [("pooling_type", "median"), ("edge_encoder", "transformer")])
def test_unknown_settings_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"model.{key}.*found {value}"):
        TopoQANet(SCHEMA, **{key: value})


# Batches of another build.


def refuses_before_the_first_layer(model: TopoQANet, batch: Data) -> str:
    "The message; fails if any layer ran."
    ran = []
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(SchemaError) as caught:
        model(batch)
    assert not ran
    assert "\n" not in str(caught.value)
    return str(caught.value)


@dataclass
class LazyBatch:
    "A batch as a store hands it out: it knows positions, not names."

    x: torch.Tensor
    edge_index: torch.Tensor
    edge_attr: torch.Tensor
    graph_index: torch.Tensor


def test_another_edge_width_is_refused_with_both_numbers_and_the_name():
    batch = Batch.from_data_list(
        [make_graph(4, 6, name="1ACB/1ACB_03"), make_graph(3, 2, name="1ACB/1ACB_04")]
    )
    message = refuses_before_the_first_layer(make_model(edge_width=EDGE_WIDTH + 4), batch)
    assert "1ACB/1ACB_03" in message
    assert "edge_attr with 7 columns" in message and "found 3 columns" in message


def test_another_node_width_is_refused():
    graph = make_graph(4, 6, name="2AYO/2AYO_00")
    graph.x = graph.x[:, :2]
    message = refuses_before_the_first_layer(make_model(), graph)
    assert "2AYO/2AYO_00" in message
    assert "x with 5 columns" in message and "found 2 columns" in message


def test_a_graph_without_edges_of_another_width_is_refused():
    graph = make_graph(4, 0)
    graph.edge_attr = graph.edge_attr.new_zeros(0, EDGE_WIDTH + 1)
    assert "found 4 columns" in refuses_before_the_first_layer(make_model(), graph)


def test_a_batch_of_a_store_is_named_by_position():
    graph = make_graph(4, 6)
    batch = LazyBatch(graph.x, graph.edge_index, graph.edge_attr[:, :1], torch.tensor([41, 42]))
    assert "graph number 41" in refuses_before_the_first_layer(make_model(), batch)


def test_edges_without_features_are_refused():
    "PyG's attention would run and leave the edges out."
    graph = make_graph(4, 6)
    plain = GATv2Conv(NODE_WIDTH, 4, edge_dim=EDGE_WIDTH, add_self_loops=False).double()
    assert torch.isfinite(plain(graph.x, graph.edge_index)).all(), "the trap is still there"
    graph.edge_attr = None
    assert "found no edge_attr" in refuses_before_the_first_layer(make_model(), graph)


def test_every_attention_knows_its_edges():
    "PyG's attention without `edge_dim` fails on edge features with an empty message."
    assert all(layer.attention.lin_edge is not None for layer in make_model(num_layers=3).layers)


# Files.


class Foreign:
    "An object of a class that no checkpoint should hold."


class Attack:
    "A pickle of this class runs a command when it is opened carelessly."

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def one_line(path: Path, read=read_checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ") and "\n" not in message
    return message


def test_a_checkpoint_never_runs_code(tmp_path):
    torch.save({"state_dict": {}, "hook": Attack(f"touch {tmp_path / 'ran'}")}, tmp_path / "bad.ckpt")
    assert "system" in one_line(tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_foreign_class_is_named(tmp_path):
    torch.save({"callback": Foreign()}, tmp_path / "bad.ckpt")
    assert "Foreign" in one_line(tmp_path / "bad.ckpt")


def test_settings_of_other_tools_are_read(tmp_path):
    "Paths, NumPy values and namespaces stop `weights_only=True` unless they are allowed."
    settings = {
        "save_dir": Path("runs"), "rate": np.float32(0.5), "epochs": np.int64(3), "flag": np.bool_(True),
        "curve": np.arange(3.0), "args": Namespace(seed=1),
    }  # fmt: skip
    torch.save({"hyper_parameters": settings}, tmp_path / "good.ckpt")
    read = read_checkpoint(tmp_path / "good.ckpt")["hyper_parameters"]
    assert read["save_dir"] == Path("runs") and read["args"].seed == 1
    assert (read["rate"], read["epochs"], bool(read["flag"])) == (0.5, 3, True)
    assert read["curve"].tolist() == [0.0, 1.0, 2.0]


def test_damaged_files_give_one_line(tmp_path):
    "Every cut and many random bytes; whatever PyTorch raises, the reader sees one line."
    path = tmp_path / "whole.ckpt"
    for new_format in (True, False):
        torch.save({"state_dict": make_model().state_dict()}, path, _use_new_zipfile_serialization=new_format)
        whole = path.read_bytes()
        for part in (0, 1, 10, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut.ckpt").write_bytes(whole[:part])
            one_line(tmp_path / "cut.ckpt")
    generator = random.Random(0)
    for _ in range(50):
        (tmp_path / "noise.ckpt").write_bytes(generator.randbytes(generator.randrange(200)))
        one_line(tmp_path / "noise.ckpt")


def test_missing_files_folders_and_other_content(tmp_path):
    assert "no such file" in one_line(tmp_path / "gone.ckpt")
    assert "a directory" in one_line(tmp_path)
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "found list" in one_line(tmp_path / "list.ckpt")
    (tmp_path / "text.ckpt").write_text("epoch,loss\n1,0.5\n")
    one_line(tmp_path / "text.ckpt")


# Weights in the published layout.


def published_state(model: TopoQANet, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + published: model.state_dict()[own] for own, published in published_names(model).items()}


@in_turn("edge_encoder, use_layer_norm", [("mlp", True), ("mlp", False), ("linear", True)])
@in_turn("prefix", ["", "model.", "net.module."])
@in_turn("in_lightning_file", [True, False])
def test_a_published_file_gives_the_same_network(
    tmp_path, edge_encoder, use_layer_norm, prefix, in_lightning_file
):
    model = make_model(
        edge_encoder=edge_encoder, use_layer_norm=use_layer_norm, attention_head=3, pooling_type="add"
    )
    state = published_state(model, prefix)
    torch.save({"state_dict": state, "epoch": 3} if in_lightning_file else state, tmp_path / "theirs.ckpt")
    received = load_foreign_weights(tmp_path / "theirs.ckpt", pooling_type="add").double().eval()
    graph = make_graph(6, 20)
    torch.testing.assert_close(received(graph), model(graph), rtol=0, atol=1e-6)
    assert len(received.notes) == 1 and "as asked for" in received.notes[0]


def test_the_third_convolution_is_noted_and_left_out(tmp_path):
    model = make_model()
    state = published_state(model) | {"conv3.0.att": torch.zeros(1, 2, 8), "conv3.0.bias": torch.zeros(8)}
    torch.save(state, tmp_path / "theirs.ckpt")
    received = load_foreign_weights(tmp_path / "theirs.ckpt")
    assert any("third convolution" in note for note in received.notes)
    assert not any("conv3" in name for name in received.state_dict())


def test_dropout_and_pooling_reach_the_network(tmp_path):
    torch.save({"state_dict": published_state(make_model())}, tmp_path / "theirs.ckpt")
    received = load_foreign_weights(tmp_path / "theirs.ckpt", pooling_type="max", dropout=0.4)
    assert received.pooling_type == "max"
    assert {layer.attention.dropout for layer in received.layers} == {0.4}
    with pytest.raises(ConfigError, match="median"):
        load_foreign_weights(tmp_path / "theirs.ckpt", pooling_type="median")


def without(state, key):
    return {name: item for name, item in state.items() if name != key}


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda state: without(state, "out.bias"), "out.bias is missing"),
        (lambda state: state | {"gru.weight": torch.ones(2)}, "gru.weight is unknown"),
        (lambda state: state | {"fc1.weight": torch.ones(2, 2)}, r"fc1.weight has shape \(2, 2\) instead of"),
        (lambda state: without(state, "embed.0.weight"), "embed.0.weight and the others"),
        (lambda state: without(state, "conv1.0.att"), "conv1.0.att"),
        (lambda state: state | {"conv1.0.att": torch.ones(3)}, "ValueError"),
        (lambda state: without(state, "edge_embed.0.0.weight"), "edge_embed.0.0.weight"),
        (lambda state: {"weights": list(state.values())}, "published layout"),
        (lambda state: {}, "published layout"),
        (lambda state: {"state_dict": None}, "published layout"),
    ],
)
def test_files_in_another_layout_are_refused_in_one_line(tmp_path, change, said):
    torch.save(change(published_state(make_model())), tmp_path / "theirs.ckpt")
    message = one_line(tmp_path / "theirs.ckpt", load_foreign_weights)
    assert re.search(said, message), message


def test_refused_weights_leave_the_network_as_it_was():
    model = make_model()
    before = {name: item.clone() for name, item in model.state_dict().items()}
    other = make_model(seed=1).state_dict()
    other["score.bias"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="score.bias has shape"):
        load_weights(model, other, "other.chkpt")
    assert all(torch.equal(item, before[name]) for name, item in model.state_dict().items())
