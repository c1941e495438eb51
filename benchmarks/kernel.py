"""Compare the kernels, one layer and one whole training step, forward and backward.

Every round times each kernel once, so that a machine whose speed changes treats them alike. A figure is the median
over the rounds; a ratio is the median of the ratios within a round. Absolute figures mean little on a busy machine;
`--clock cpu` counts only the time that this process was running.

    python benchmarks/kernel.py                                # synthetic graphs of usual size
    python benchmarks/kernel.py --graph-dir ../shared/data/graphs
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from graphs import EDGE_WIDTH, NODE_WIDTH
from torch.nn import functional
from torch_geometric.data import Batch, Data

from topoqa_nb.data.graphs import list_graphs, read_graph
from topoqa_nb.data.schema import EdgeSchema, FeatureSchema, NodeSchema
from topoqa_nb.network.attention import attention_layer, order_edges
from topoqa_nb.network.kernels import KERNELS, find_numba
from topoqa_nb.network.layer import EdgeUpdate, interact
from topoqa_nb.network.model import TopoQANet

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--graph-dir", type=Path, help="graphs to take, evenly spread; default: synthetic ones"
    )
    parser.add_argument("--graphs", type=int, default=16, help="graphs in the batch (default %(default)s)")
    parser.add_argument("--nodes", type=int, default=91, help="of a synthetic graph (default %(default)s)")
    parser.add_argument("--edges", type=int, default=902, help="of a synthetic graph (default %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--hidden", type=int, default=32, help="units of a head (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=21, help="(default %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="(default %(default)s)")
    return parser.parse_args()


def synthetic_graph(nodes: int, edges: int) -> Data:
    return Data(
        x=torch.randn(nodes, NODE_WIDTH),
        edge_index=torch.randint(nodes, (2, edges)),
        edge_attr=torch.rand(edges, EDGE_WIDTH),
    )


def make_batch(arguments: argparse.Namespace) -> Batch:
    "Graphs in one batch, edges sorted by target as the store keeps them."
    if arguments.graph_dir is None:
        graphs = [synthetic_graph(arguments.nodes, arguments.edges) for _ in range(arguments.graphs)]
    else:
        files = list(list_graphs(arguments.graph_dir).values())
        chosen = files[:: max(len(files) // arguments.graphs, 1)][: arguments.graphs]
        graphs = [
            Data(**{key: read_graph(file)[key] for key in ("x", "edge_index", "edge_attr")})
            for file in chosen
        ]
    batch = Batch.from_data_list(graphs)
    batch.edge_order = batch.edge_index[1].argsort(stable=True)
    batch.edge_index = batch.edge_index[:, batch.edge_order]
    batch.edge_attr = batch.edge_attr[batch.edge_order]
    return batch


def layer_pass(batch: Batch, arguments: argparse.Namespace, kernel: str) -> Callable[[], None]:
    "One layer, forward and backward, the order of the edges made beforehand."
    width = arguments.hidden
    conv, update = attention_layer(width, arguments.heads, dropout=0.25), EdgeUpdate(width, arguments.heads)
    order = order_edges(batch.edge_index, batch.num_nodes, kernel, batch.edge_order)
    nodes = torch.randn(batch.num_nodes, width, requires_grad=True)
    edges = torch.randn(batch.num_edges, width, requires_grad=True)
    pulls = torch.randn(batch.num_nodes, width), torch.randn(batch.num_edges, width)
    inputs = [nodes, edges, *conv.parameters(), *update.parameters()]
    return lambda: torch.autograd.grad(
        interact(conv, update, nodes, order.arrange(edges), order), inputs, pulls
    )


def training_step(batch: Batch, arguments: argparse.Namespace, kernel: str) -> Callable[[], None]:
    "The whole network: forward, loss, backward, Adam."
    sizes = {"hidden_dim": arguments.hidden, "attention_head": arguments.heads}
    schema = FeatureSchema(EdgeSchema(batch.edge_attr.shape[1]), NodeSchema(batch.x.shape[1]))
    model = TopoQANet(schema, **sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    dockq = torch.rand(batch.num_graphs)

    def step() -> None:
        os.environ["TOPOQA_KERNEL"] = kernel
        optimizer.zero_grad()
        functional.mse_loss(model(batch), dockq).backward()
        optimizer.step()

    return step


def measure(
    passes: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    "Seconds of each pass in each round; the first two rounds compile and warm up and are not counted."
    seconds = {name: [] for name in passes}
    for round_number in range(rounds + 2):
        for name, run in passes.items():
            start = clock()
            run()
            if round_number >= 2:
                seconds[name].append(clock() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    print(f"\n{title:<28}{'median':>12}{'reference / kernel':>22}")
    for name, values in seconds.items():
        ratios = [plain / fast for plain, fast in zip(seconds["reference"], values, strict=True)]
        print(f"{name:<28}{statistics.median(values) * 1e3:>9.2f} ms{statistics.median(ratios):>20.2f} x")


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)  # as in training
    torch.manual_seed(0)
    batch = make_batch(arguments)
    kernels = [name for name in KERNELS if name != "numba" or find_numba()]
    print(
        f"{batch.num_graphs} graphs, {batch.num_nodes} nodes, {batch.num_edges} edges; {arguments.heads} heads of "
        f"{arguments.hidden}; {arguments.threads} thread(s), {arguments.rounds} rounds, {arguments.clock} time"
    )
    if "numba" not in kernels:
        print("numba is not installed and is left out")
    for title, make in (("layer", layer_pass), ("training step", training_step)):
        passes = {kernel: make(batch, arguments, kernel) for kernel in kernels}
        report(title, measure(passes, arguments.rounds, CLOCKS[arguments.clock]))


if __name__ == "__main__":
    main()
