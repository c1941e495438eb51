"""What the packed store costs and saves: packing, opening, resolving the schema, an epoch of batches.

    OMP_NUM_THREADS=1 python benchmarks/store.py [--graphs 1000 10000] [--repeats 5]

Files are in the page cache. Each figure is a median; the two sides of a comparison alternate.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from graphs import BATCH, SIZES, original_batches, write_graphs

from topoqa_nb.schema import resolve_schema, topoqa_node_columns
from topoqa_nb.store import GraphStore, list_graphs, open_store


def seconds(action: Callable[[], object]) -> float:
    "Wall-clock time of one call."
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median(action: Callable[[], object], repeats: int) -> float:
    "Median time of several calls (s)."
    return statistics.median(seconds(action) for _ in range(repeats))


def packing(graph_dir: Path, store_dir: Path, repeats: int) -> float:
    "Time to pack a directory of which there is no store (s)."
    times = []
    for _ in range(repeats):
        shutil.rmtree(store_dir, ignore_errors=True)
        times.append(seconds(lambda: open_store(graph_dir, store_dir=store_dir)))
    return statistics.median(times)


def write_sidecar(graph_dir: Path) -> None:
    "An entry of the usual length for every graph."
    columns = topoqa_node_columns()
    entry = {
        "edge_module": "edge/legacy_band/v11",
        "edge_params": {"distance_max": 10.0},
        "edge_metadata": {"feature_dim": 11, "edge_feature_variant": "legacy", "edge_count": 114},
        "node_feature_columns": columns,
        "node_feature_dim": len(columns),
    }
    (graph_dir / "graph_metadata.json").write_text(json.dumps(dict.fromkeys(list_graphs(graph_dir), entry)))


def resolve(graph_dir: Path, store_dir: Path) -> None:
    "Open the store and resolve the schema, as a run does."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resolve_schema(graph_dir, store=open_store(graph_dir, store_dir=store_dir))


def directory(count: int, size: str, repeats: int) -> None:
    "Packing, opening and schema of one directory."
    with tempfile.TemporaryDirectory() as folder:
        graph_dir, store_dir = write_graphs(Path(folder, "graphs"), count, size), Path(folder, "stores")
        pack = packing(graph_dir, store_dir, min(repeats, 3))
        listing = median(lambda: list_graphs(graph_dir), repeats)
        opening = median(lambda: open_store(graph_dir, store_dir=store_dir), repeats)
        without = median(lambda: resolve(graph_dir, store_dir), repeats)
        write_sidecar(graph_dir)
        with_sidecar = median(lambda: resolve(graph_dir, store_dir), repeats)
    print(
        f"{size:4} {count:6} graphs | packing {pack:6.2f} s, {pack / count * 1e3:.2f} ms a graph"
        f" | opening {opening * 1e3:5.0f} ms (listing alone {listing * 1e3:.0f} ms)"
        f" | opening and schema {without:.2f} s, with sidecar {with_sidecar:.2f} s"
    )


def epoch(store: GraphStore, order: torch.Tensor) -> None:
    "All batches of the store, once."
    for numbers in order.split(BATCH):
        store.batch(numbers)


def epochs(count: int, size: str, repeats: int) -> None:
    "Batches from the store against batches in the original's way."
    with tempfile.TemporaryDirectory() as folder:
        graph_dir = write_graphs(Path(folder, "graphs"), count, size)
        store = open_store(graph_dir, store_dir=Path(folder, "stores"))
        ours, original = [], []
        for repeat in range(repeats):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(repeat))
            ours.append(seconds(lambda order=order: epoch(store, order)))
            original.append(seconds(lambda order=order: list(map(len, original_batches(graph_dir, order)))))
    each = [statistics.median(times) / count * 1e6 for times in (original, ours)]
    print(
        f"{size:4} {count:6} graphs | batches of {BATCH}: original {each[0]:.0f} us a graph, store {each[1]:.1f} us,"
        f" {each[0] / each[1]:.0f} x"
    )


def main() -> None:
    "Print all figures."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, nargs="+", default=[1000, 10_000], help="sizes of directories")
    parser.add_argument("--repeats", type=int, default=5, help="timings of which the median is taken")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for count in arguments.graphs:
        directory(count, "real", arguments.repeats)
    for size in SIZES:
        epochs(arguments.graphs[0], size, arguments.repeats)


if __name__ == "__main__":
    main()
