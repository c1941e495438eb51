"""Three kernels, one result: on graphs of every kind, in any order of edges, with and without numba."""

import os
import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import in_turn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data

from topoqa_nb.data.schema import EdgeSchema, FeatureSchema, NodeSchema
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import ConfigError, DataError
from topoqa_nb.network import kernels, products
from topoqa_nb.network.attention import attention_layer, order_edges
from topoqa_nb.network.kernels import (
    LOOPS,
    TILE,
    TORCH_STEPS,
    Steps,
    choose_kernel,
    compile_loop,
    find_numba,
    numba_steps,
    on_arrays,
)
from topoqa_nb.network.layer import EdgeUpdate, Interaction, interact
from topoqa_nb.network.model import TopoQANet
from topoqa_nb.network.products import STEP, find_onednn, padded_rows
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.training.training import train

needs_numba = pytest.mark.skipif(find_numba() is None, reason="numba is not installed")
FAST = ["torch", pytest.param("numba", marks=needs_numba)]
EVERY = ["reference", *FAST]


def make_case(nodes, pairs, heads=2, width=3, dropout=0.0, dtype=torch.float64, seed=0):
    "A layer in training mode with random parameters, node states, edge states and edges."
    generator = torch.Generator().manual_seed(seed)
    conv, update = attention_layer(width, heads, dropout).to(dtype), EdgeUpdate(width, heads).to(dtype)
    with torch.no_grad():
        for parameter in (*conv.parameters(), *update.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    edge_index = (
        pairs if isinstance(pairs, torch.Tensor) else torch.randint(nodes, (2, pairs), generator=generator)
    )
    return SimpleNamespace(
        conv=conv,
        update=update,
        edge_index=edge_index,
        nodes=torch.randn(nodes, width, generator=generator, dtype=torch.float64).to(dtype),
        edges=torch.randn(edge_index.shape[1], width, generator=generator, dtype=torch.float64).to(dtype),
    )


def outcome(case, kernel, by_target=False, seed=1):
    "New states, then the gradients of node states, edge states and every parameter, edges as in the file."
    conv, update = deepcopy(case.conv), deepcopy(case.update)
    nodes, edges = (values.clone().requires_grad_() for values in (case.nodes, case.edges))
    edge_index, edge_order, stored = case.edge_index, None, edges
    if by_target:  # as a store hands them out
        edge_order = edge_index[1].argsort(stable=True)
        edge_index, stored = edge_index[:, edge_order], edges.index_select(0, edge_order)
    order = order_edges(edge_index, len(nodes), kernel, edge_order)
    torch.manual_seed(seed)
    states = as_in_the_file(*interact(conv, update, nodes, order.arrange(stored), order), order)
    pulled, generator = 0.0, torch.Generator().manual_seed(2)
    for each in states:
        pull = torch.randn(each.shape, generator=generator, dtype=torch.float64)
        pulled = pulled + (each * pull.to(each)).sum()
    grads = torch.autograd.grad(pulled, [nodes, edges, *conv.parameters(), *update.parameters()])
    return [*(each.detach() for each in states), *grads]


def as_in_the_file(nodes, edges, order):
    "What `interact` gives, its edges where the file has them."
    return nodes, edges if order.file_rows is None else edges.index_select(0, order.file_rows.argsort())


def assert_same(found, wanted, tolerance):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# Against the reference.


@pytest.mark.parametrize("kernel", FAST)
@settings(max_examples=60)
@given(
    nodes=st.integers(1, 12),
    edge_count=st.integers(0, 50),
    heads=st.integers(1, 4),
    width=st.integers(1, 9),
    dropout=st.sampled_from([0.0, 0.4]),
    by_target=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_random_graphs(kernel, nodes, edge_count, heads, width, dropout, by_target, seed):
    case = make_case(nodes, edge_count, heads, width, dropout, seed=seed)
    assert_same(outcome(case, kernel, by_target), outcome(case, "reference"), 1e-9)


BORDER = {
    "no edges": (3, torch.zeros(2, 0, dtype=torch.long)),
    "one node": (1, torch.zeros(2, 0, dtype=torch.long)),
    "one node with itself": (1, torch.zeros(2, 3, dtype=torch.long)),
    "isolated first and last": (5, torch.tensor([[1, 2, 3], [3, 1, 2]])),
    "one pair many times": (4, torch.tensor([[2] * 9, [1] * 9])),
    "targets in falling order": (4, torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])),
    "all to the last": (4, torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3]])),
    "one tile and one edge": (40, TILE + 1),
    "two full tiles": (40, 2 * TILE),
    "three tiles": (7, 2 * TILE + 300),
}


@pytest.mark.parametrize("kernel", FAST)
@in_turn("dropout", [0.0, 0.25])
@in_turn("heads", [1, 3])
@pytest.mark.parametrize("border", BORDER)
def test_graphs_at_the_border(kernel, border, heads, dropout):
    case = make_case(*BORDER[border], heads=heads, dropout=dropout)
    assert_same(outcome(case, kernel), outcome(case, "reference"), 1e-9)


@pytest.mark.parametrize("kernel", FAST)
def test_single_precision_is_as_close_to_double_as_the_reference_is(kernel):
    sizes = {"nodes": 60, "pairs": 1500, "heads": 8, "width": 32}
    exact = outcome(make_case(**sizes), "reference")
    errors = {
        name: [
            ((found - wanted).norm() / wanted.norm()).item()
            for found, wanted in zip(
                outcome(make_case(**sizes, dtype=torch.float32), name), exact, strict=True
            )
        ]
        for name in ("reference", kernel)
    }
    assert max(errors["reference"]) < 1e-5
    assert max(errors[kernel]) < 3 * max(errors["reference"]), errors


def test_the_loops_without_compiling():
    "What numba translates is ordinary Python, and can be tested where numba is missing."
    steps = Steps(**{name: on_arrays(loop, np.float64) for name, (loop, _) in LOOPS.items()})
    assert_same(bare_layer(steps), bare_layer(TORCH_STEPS), 1e-12)


INPUTS = 11  # tensors of `Interaction` that may need a gradient


def shapes_of(nodes, edge_count, heads, width):
    "Of the node states, the edge states, and nine parameters."
    projection = [(heads * width, width), (heads * width,)]
    attention = [*2 * projection, projection[0], (heads, width), (width,)]
    return [(nodes, width), (edge_count, width), *attention, (heads * width, 3 * width), projection[1]]


def bare_layer(steps, needs_grad=(True,) * INPUTS, double=False):
    "`Interaction` itself with a mask, on inputs of which some need gradients."
    generator = torch.Generator().manual_seed(4)
    heads, width, nodes, edge_count = 3, 4, 6, 20
    shapes = shapes_of(nodes, edge_count, heads, width)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for values, needed in zip(inputs, needs_grad, strict=True):
        values.requires_grad_(needed)
    mask = torch.rand(edge_count, heads, generator=generator, dtype=torch.float64)
    order = order_edges(torch.randint(nodes, (2, edge_count), generator=generator), nodes, "torch")
    copies = [values.detach().clone() for values in inputs]
    states = Interaction.apply(*inputs, mask, order, 0.2, steps)
    wanted = [values for values in inputs if values.requires_grad]
    total = sum(each.square().sum() for each in states)
    grads = torch.autograd.grad(total, wanted, create_graph=double)
    assert all(map(torch.equal, inputs, copies)), "inputs were changed"
    return [*(each.detach() for each in states), *grads]


def steps_of(kernel):
    return numba_steps(torch.float64) if kernel == "numba" else TORCH_STEPS


@pytest.mark.parametrize("kernel", FAST)
@in_turn("missing", range(INPUTS))
def test_inputs_that_need_no_gradient(kernel, missing):
    needs_grad = [place != missing for place in range(INPUTS)]
    everything = bare_layer(steps_of(kernel))
    del everything[2 + missing]
    for ours, wanted in zip(bare_layer(steps_of(kernel), needs_grad), everything, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("kernel", FAST)
def test_gradients_by_finite_differences(kernel):
    generator = torch.Generator().manual_seed(6)
    shapes = shapes_of(4, 7, 2, 3)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]
    order = order_edges(torch.randint(4, (2, 7), generator=generator), 4, kernel)
    mask = 2.0 * torch.randint(2, (7, 2), generator=generator)
    assert torch.autograd.gradcheck(
        lambda *values: Interaction.apply(*values, mask.double(), order, 0.2, steps_of(kernel)), inputs
    )


@pytest.mark.parametrize("kernel", FAST)
def test_a_second_derivative_is_refused_and_not_wrong(kernel):
    _, _, *grads = bare_layer(steps_of(kernel), double=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grads[0].sum().backward()


# Numbers at the border.


@pytest.mark.parametrize("kernel", FAST)
@in_turn("scale", [1e-30, 1e4, 1e30])
def test_very_small_and_very_large_scores(kernel, scale):
    case = make_case(6, 30)
    with torch.no_grad():
        case.conv.att *= scale
    found, wanted = outcome(case, kernel)[0], outcome(case, "reference")[0]
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", FAST)
@in_turn("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_hidden(kernel, value):
    "Training stops on a loss that is not finite; it must get there, also through loops that reorder sums."
    case = make_case(3, torch.tensor([[0, 1, 2], [1, 1, 0]]))
    case.nodes[0, 0] = value
    states = outcome(case, kernel)[0]
    assert not torch.isfinite(states[1]).all()
    assert torch.isfinite(states[2]).all(), "node 2 receives nothing"


# Order, dropout and random numbers.


@in_turn("by_target", [False, True])
def test_one_seed_draws_one_mask_in_all_kernels(by_target):
    case, left_over = make_case(8, 40, heads=3, dropout=0.5), []
    names = ["reference", "torch", *(["numba"] if find_numba() else [])]
    states = {}
    for kernel in names:
        states[kernel] = outcome(case, kernel, by_target, seed=7)[0]
        left_over.append(torch.get_rng_state())
    for kernel in names[1:]:
        torch.testing.assert_close(states[kernel], states["reference"], rtol=1e-9, atol=1e-9)
        other = outcome(case, kernel, by_target, seed=8)[0]
        assert not torch.allclose(other, states[kernel]), "another seed, another mask"
    assert all(torch.equal(left_over[0], state) for state in left_over), "what is drawn next differs"


@pytest.mark.parametrize("kernel", EVERY)
def test_no_random_number_is_drawn_without_need(kernel):
    for case in (make_case(5, 12, dropout=0.0), make_case(5, 0, dropout=0.5), make_case(5, 12, dropout=0.5)):
        case.conv.train(case.edges.shape[0] == 0 or case.conv.dropout == 0)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        outcome(case, kernel, seed=1)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kernel", EVERY)
def test_the_same_call_gives_the_same_bits(kernel):
    case = make_case(50, 3000, heads=4, width=8, dropout=0.25, dtype=torch.float32)
    assert all(map(torch.equal, outcome(case, kernel), outcome(case, kernel)))


@pytest.mark.parametrize("kernel", FAST)
def test_a_stored_order_by_target_is_not_sorted_again(kernel):
    edge_index = torch.tensor([[3, 0, 1, 2], [0, 1, 1, 3]])
    edge_order = torch.tensor([2, 0, 3, 1])
    order = order_edges(edge_index, 4, kernel, edge_order)
    assert order.rows is None and torch.equal(order.file_rows, edge_order)
    assert order.ptr.tolist() == [0, 1, 3, 3, 4]


@pytest.mark.parametrize("kernel", FAST)
def test_a_stored_order_that_is_not_by_target(kernel):
    case = make_case(6, 30, dropout=0.5)
    edge_order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    order = order_edges(case.edge_index[:, edge_order], 6, kernel, edge_order)
    torch.manual_seed(1)
    states = interact(case.conv, case.update, case.nodes, order.arrange(case.edges[edge_order]), order)
    for found, wanted in zip(as_in_the_file(*states, order), outcome(case, "reference"), strict=False):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", EVERY)
@in_turn("wrong", [-1, 4, 2**40])
@in_turn("row", [0, 1])
def test_a_node_number_out_of_range_is_refused(kernel, wrong, row):
    "Compiled loops would read and write memory that is not theirs."
    edge_index = torch.tensor([[0, 1, 2], [1, 2, 3]])
    edge_index[row, 1] = wrong
    with pytest.raises(DataError, match=f"node numbers from 0 to 3, found .*{wrong}"):
        order_edges(edge_index, 4, kernel)


@pytest.mark.parametrize("kernel", FAST)
def test_inputs_that_are_not_contiguous(kernel):
    case = make_case(5, 20)
    wanted = outcome(case, "reference")
    case.nodes = case.nodes.t().contiguous().t()
    case.edges = torch.cat([case.edges, case.edges], dim=1)[:, : case.edges.shape[1]]
    case.edge_index = case.edge_index.t().contiguous().t()
    assert_same(outcome(case, kernel), wanted, 1e-9)


@pytest.mark.parametrize("kernel", EVERY)
def test_inference_mode(kernel):
    case = make_case(5, 20)
    wanted = outcome(case, "reference")
    with torch.inference_mode():
        order = order_edges(case.edge_index, 5, kernel)
        states = interact(case.conv, case.update, case.nodes, order.arrange(case.edges), order)
        for found, expected in zip(as_in_the_file(*states, order), wanted, strict=False):
            torch.testing.assert_close(found, expected)


# Products by oneDNN.


@pytest.fixture
def amd(monkeypatch):
    "A processor on which oneDNN is chosen."
    monkeypatch.setattr(products, "processor_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    find_onednn.cache_clear()
    yield monkeypatch
    find_onednn.cache_clear()


def test_onednn_is_chosen_only_where_it_was_found_faster(amd):
    assert find_onednn() is not None, (
        "this version of PyTorch lacks it: products are slower on AMD processors"
    )
    for change in (("processor_vendor", lambda: "GenuineIntel"), ("processor_vendor", lambda: None)):
        find_onednn.cache_clear()
        amd.setattr(products, *change)
        assert find_onednn() is None


def test_a_pytorch_without_onednn(amd):
    amd.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert find_onednn() is None


@pytest.mark.parametrize("kernel", FAST)
@in_turn("nodes", [60, STEP - 1, STEP, STEP + 1, 300])
@in_turn("edges", [0, 50, STEP, TILE, TILE + 1, TILE + STEP, 2 * TILE + 300])
def test_either_product_gives_the_same(kernel, nodes, edges, amd):
    "Rows are padded with zeros for oneDNN; nothing of them may show, whatever the memory held before."
    sizes = {"nodes": nodes, "pairs": edges, "heads": 8, "width": 32, "dtype": torch.float32}
    assert products.find_onednn() is not None
    by_onednn = outcome(make_case(**sizes), kernel)
    with amd.context() as patch:
        patch.setattr(products, "find_onednn", lambda: None)
        by_mkl = outcome(make_case(**sizes), kernel)
    for found, wanted in zip(by_onednn, by_mkl, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.fixture
def dirty_memory():
    "New memory is full of NaN, so that reading it shows."
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize(
    "pairs", [STEP + 5, TILE + STEP + 5]
)  # the last tile is the only one, or has another before
def test_no_row_is_read_before_it_is_written(kernel, pairs, amd, dirty_memory):
    case = make_case(nodes=STEP + 3, pairs=pairs, heads=8, width=32, dtype=torch.float32)
    assert all(values.isfinite().all() for values in outcome(case, kernel))


def test_single_graphs_are_left_to_mkl(amd):
    assert padded_rows(STEP - 1, torch.float32) == STEP - 1
    assert padded_rows(STEP + 1, torch.float32) == 2 * STEP
    assert padded_rows(STEP + 1, torch.float64) == STEP + 1


# The choice.


@pytest.fixture
def free_choice(monkeypatch):
    monkeypatch.delenv("TOPOQA_KERNEL", raising=False)


def test_the_default(free_choice, monkeypatch):
    assert choose_kernel() == ("numba" if find_numba() else "torch")
    monkeypatch.setattr(kernels, "find_numba", lambda: None)
    assert choose_kernel() == "torch"


@in_turn("device", ["cuda", "cuda:1", "mps", "meta"])
def test_off_the_cpu_the_reference_runs(free_choice, device):
    assert choose_kernel(device) == "reference"


@pytest.mark.parametrize("kernel", EVERY)
def test_a_kernel_can_be_forced(monkeypatch, kernel):
    monkeypatch.setenv("TOPOQA_KERNEL", kernel)
    assert choose_kernel() == kernel


@pytest.mark.parametrize(
    "value, arguments, said",
    [
        ("nunba", (), "did you mean numba"),
        ("Numba", (), "found Numba"),
        ("torch", ("cuda",), "found torch for cuda"),
        ("numba", ("cpu", True), "found numba for low precision"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_one_line(monkeypatch, value, arguments, said):
    monkeypatch.setenv("TOPOQA_KERNEL", value)
    with pytest.raises(ConfigError, match=said) as caught:
        choose_kernel(*arguments)
    assert "\n" not in str(caught.value)


def test_numba_forced_but_missing_is_one_line(monkeypatch):
    monkeypatch.setenv("TOPOQA_KERNEL", "numba")
    monkeypatch.setattr(kernels, "find_numba", lambda: None)
    with pytest.raises(ConfigError, match="numba is not installed.*topoqa_nb\\[fast\\]") as caught:
        choose_kernel()
    assert "\n" not in str(caught.value)


def test_autocast_uses_the_reference(free_choice):
    case = make_case(5, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_kernel("cpu", kernels.is_low_precision(case.nodes)) == "reference"
    assert not kernels.is_low_precision(case.nodes)
    assert kernels.is_low_precision(case.nodes.bfloat16())


# With and without numba, and its cache.

SCORES = """
import sys
{before}
import torch
from torch_geometric.data import Data
from topoqa_nb.data.schema import EdgeSchema, FeatureSchema, NodeSchema
from topoqa_nb.network.kernels import choose_kernel
from topoqa_nb.network.model import TopoQANet
torch.manual_seed(0)
model = TopoQANet(FeatureSchema(EdgeSchema(3), NodeSchema(5)), hidden_dim=8, attention_head=2).eval()
graph = Data(x=torch.randn(6, 5), edge_index=torch.randint(6, (2, 18)), edge_attr=torch.randn(18, 3))
print(choose_kernel(), round(model(graph).item(), 6))
"""


def scores_in_a_process(before="", **environment):
    "Kernel and score as a fresh process prints them."
    known = {key: value for key, value in os.environ.items() if key != "TOPOQA_KERNEL"}
    result = subprocess.run(
        [sys.executable, "-c", SCORES.format(before=before)],
        env=known | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


def test_without_numba_nothing_fails(monkeypatch, capsys):
    missing = "sys.modules['numba'] = None  # importing it now raises ImportError"
    kernel, score = scores_in_a_process(missing)
    assert kernel == "torch"
    monkeypatch.setenv("TOPOQA_KERNEL", "reference")
    exec(SCORES.format(before=""), {})
    assert capsys.readouterr().out.split() == ["reference", score]


@needs_numba
def test_a_damaged_cache_and_one_that_cannot_be_written(tmp_path):
    folder = tmp_path / "cache"
    expected = scores_in_a_process(NUMBA_CACHE_DIR=str(folder))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and expected[0] == "numba"
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert scores_in_a_process(NUMBA_CACHE_DIR=str(folder)) == expected
    (tmp_path / "file").touch()
    assert scores_in_a_process(NUMBA_CACHE_DIR=str(tmp_path / "file" / "below")) == expected


@needs_numba
def test_loops_compile_where_no_cache_folder_is_to_be_had(monkeypatch):
    "numba then refuses `cache=True` with a RuntimeError."
    asked = []

    def njit(types, cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: loop

    monkeypatch.setattr(kernels, "find_numba", lambda: SimpleNamespace(njit=njit))
    assert compile_loop(len, ()) is len
    assert asked == [True, False]


@needs_numba
def test_compiled_loops_refuse_other_layouts_and_types():
    softmax = numba_steps(torch.float64).softmax
    target, ptr = torch.tensor([0, 0]), torch.tensor([0, 2])
    for scores in (torch.zeros(2, 4, dtype=torch.float64)[:, ::2], torch.zeros(2, 2)):
        with pytest.raises(TypeError):
            softmax(target, ptr, scores)
    with pytest.raises(TypeError):
        softmax(target.int(), ptr, torch.zeros(2, 2, dtype=torch.float64))


# In the network and in training.


def test_all_kernels_give_the_network_the_same_scores_and_gradients(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    graphs = [
        Data(
            x=torch.randn(nodes, 5, generator=generator, dtype=torch.float64),
            edge_index=torch.randint(nodes, (2, edge_count), generator=generator),
            edge_attr=torch.randn(edge_count, 3, generator=generator, dtype=torch.float64),
        )
        for nodes, edge_count in [(9, 40), (1, 0), (6, 14), (4, 0), (2, 3)]
    ]
    batch = Batch.from_data_list(graphs)
    stored = batch.clone()
    stored.edge_order = batch.edge_index[1].argsort(stable=True)
    stored.edge_index = batch.edge_index[:, stored.edge_order]
    stored.edge_attr = batch.edge_attr[stored.edge_order]
    torch.manual_seed(0)
    model = (
        TopoQANet(FeatureSchema(EdgeSchema(3), NodeSchema(5)), hidden_dim=8, attention_head=3, num_layers=3)
        .double()
        .train()
    )

    def results(kernel, graphs):
        monkeypatch.setenv("TOPOQA_KERNEL", kernel)
        torch.manual_seed(1)
        scores = model(graphs)
        return [scores.detach(), *torch.autograd.grad(scores.square().sum(), list(model.parameters()))]

    wanted = results("reference", batch)
    for kernel in ("reference", "torch", *(["numba"] if find_numba() else [])):
        for graphs in (batch, stored):
            assert_same(results(kernel, graphs), wanted, 1e-9)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("precision, accumulate, compared", [("64", 1, "every metric"), ("32", 4, "losses")])
def test_three_epochs_give_what_the_reference_gives(
    kernel, precision, accumulate, compared, tmp_path, monkeypatch
):
    """Same seed, same order, same dropout.

    Training amplifies rounding: on real graphs in 32 bit, after 150 steps, the reference moves its own Pearson
    correlation by 0.3 when one weight matrix moves by one unit in the last place. So 64 bit tells rounding from a mistake,
    and in 32 bit only the losses are compared, after three steps.
    """
    demo = write_tiny_dataset(tmp_path / "set", targets=6, decoys=6)
    chosen = {
        "paths.graph": str(demo.graph_dir),
        "paths.train_labels": str(demo.train_labels),
        "paths.val_labels": str(demo.val_labels),
        "dataloader.batch_size": 8,
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.precision": precision,
        "trainer.num_epochs": 3,
    }
    metrics = {}
    for name in ("reference", kernel):
        monkeypatch.setenv("TOPOQA_KERNEL", name)
        loaded = load_config(None, chosen | {"paths.save_dir": str(tmp_path / name)})
        metrics[name] = read_metrics(train(loaded, run_name="run"))
    assert len(metrics[kernel]) == 3
    columns = ["train_loss", "val_loss"] if compared == "losses" else list(metrics[kernel])
    difference = (metrics[kernel] - metrics["reference"])[columns].abs().max()
    assert difference.max() < (1e-9 if precision == "64" else 1e-6), difference.to_dict()
