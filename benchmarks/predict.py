"""(f) Predictions: graphs a second and peak memory at several numbers of graphs, on one core.

    python benchmarks/predict.py [--graphs 1000 10000] [--data GRAPHS] [--repeats 3]

Each row is a process of its own with one thread that scores a directory several times, watched from outside. The rate is by
processor time, which is wall time on a machine that does nothing else, and the fastest counts. It is that of everything
after the import: listing, opening, schema, scores, ranking. `warm` opens a store that was packed before, `streamed` reads
every file. Anonymous memory belongs to the process alone;
`mapped` are pages of files, the store's among them, which the system takes back when it needs the memory. --data repeats
the graphs of a directory; without it they are random.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from graphs import repeat_graphs, write_graphs
from measure import machine, peak_text, watched

from topoqa_nb.answers.inference import Scorer
from topoqa_nb.data.graphs import list_graphs, read_graph
from topoqa_nb.data.schema import EdgeSchema, FeatureSchema, NodeSchema
from topoqa_nb.data.store import open_store
from topoqa_nb.network.model import TopoQANet
from topoqa_nb.network.weights import published_names

WAYS = {"warm": True, "streamed": False}  # whether the store is used


def write_model(graph_dir: Path, path: Path) -> None:
    "Random weights of the default size, for the widths of the graphs."
    graph = read_graph(next(iter(list_graphs(graph_dir).values())))
    torch.manual_seed(0)
    edge, node = EdgeSchema(graph.edge_attr.shape[1]), NodeSchema(graph.x.shape[1])
    model = TopoQANet(FeatureSchema(edge, node))
    names = published_names(model)
    torch.save({names[own]: value for own, value in model.state_dict().items()}, path)


def score(way: str, folder: Path, repeats: int) -> None:
    "Print the seconds of processor time of the fastest."
    torch.set_num_threads(1)
    scorer = Scorer.load(folder / "weights.ckpt", device="cpu")
    options = {"use_store": WAYS[way], "store_dir": folder / "stores"}
    times = []
    for _ in range(repeats):
        start = time.process_time()
        scorer.predict(folder / "graphs", **options)
        times.append(time.process_time() - start)
    print(min(times))


def measure(count: int, source: Path | None, repeats: int) -> None:
    "A line for each way."
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if source:
            repeat_graphs(folder / "graphs", count, source)
        else:
            write_graphs(folder / "graphs", count, "real")
        write_model(folder / "graphs", folder / "weights.ckpt")
        open_store(folder / "graphs", store_dir=folder / "stores")
        for way in WAYS:
            said, peak = watched([__file__, "--one", way, scratch, "--repeats", str(repeats)])
            print(
                f"  {count:6} graphs | {way:<8} {count / float(said):6.0f} graphs a second | {peak_text(peak)}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, nargs="+", default=[1000, 10_000], help="sizes of directories")
    parser.add_argument("--data", type=Path, help="a directory whose graphs are repeated")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the fastest counts")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        score(arguments.one[0], Path(arguments.one[1]), arguments.repeats)
        return
    print(f"(f) predictions on one core: {machine()}", flush=True)
    for count in arguments.graphs:
        measure(count, arguments.data, arguments.repeats)


if __name__ == "__main__":
    main()
