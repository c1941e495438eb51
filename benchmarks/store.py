"""(e) The schema of many graphs, and what the packed store costs: packing, opening, a batch.

    OMP_NUM_THREADS=1 python benchmarks/store.py [--graphs 1000 10000] [--repeats 5]

Files are in the page cache. Each figure is a median; the two sides of a comparison alternate.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from graphs import SIZES, write_data_set, write_graphs
from measure import median, seconds
from original import GraphFiles
from torch_geometric.data import Batch

from topoqa_nb.build.interface import node_columns
from topoqa_nb.data.graphs import list_graphs
from topoqa_nb.data.schema import resolve_schema
from topoqa_nb.data.store import GraphStore, open_store

BATCH = 16


def packing(graph_dir: Path, store_dir: Path, repeats: int) -> float:
    "Time to pack a directory of which there is no store (s)."
    times = []
    for _ in range(repeats):
        shutil.rmtree(store_dir, ignore_errors=True)
        times.append(seconds(lambda: open_store(graph_dir, store_dir=store_dir)))
    return statistics.median(times)


def write_sidecar(graph_dir: Path) -> None:
    "An entry of the usual length for every graph."
    columns = node_columns()
    entry = {
        "edge_module": "edge/legacy_band/v11",
        "edge_params": {"distance_max": 10.0},
        "edge_metadata": {"feature_dim": 11, "edge_feature_variant": "legacy", "edge_count": 114},
        "node_feature_columns": columns,
        "node_feature_dim": len(columns),
    }
    (graph_dir / "graph_metadata.json").write_text(json.dumps(dict.fromkeys(list_graphs(graph_dir), entry)))


def resolve(graph_dir: Path, store: GraphStore) -> None:
    "Resolve the schema, as a run does."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resolve_schema(graph_dir, store=store)


def directory(count: int, repeats: int) -> None:
    "Packing, opening and schema of one directory."
    with tempfile.TemporaryDirectory() as folder:
        graph_dir, store_dir = write_graphs(Path(folder, "graphs"), count, "real"), Path(folder, "stores")
        pack = packing(graph_dir, store_dir, min(repeats, 3))
        listing = median(lambda: list_graphs(graph_dir), repeats)
        opening = median(lambda: open_store(graph_dir, store_dir=store_dir), repeats)
        store = open_store(graph_dir, store_dir=store_dir)
        without = median(lambda: resolve(graph_dir, store), repeats)
        write_sidecar(graph_dir)
        with_sidecar = median(lambda: resolve(graph_dir, store), repeats)
    print(f"  {count:6} graphs | packing {pack:.2f} s, {pack / count * 1e3:.2f} ms a graph")
    print(
        f"  {count:6} graphs | opening the store {opening * 1e3:.0f} ms, of which listing the files "
        f"{listing * 1e3:.0f} ms"
    )
    print(f"  {count:6} graphs | schema without sidecar {without:.2f} s, with sidecar {with_sidecar:.2f} s")


def original_batches(files: GraphFiles, order: torch.Tensor) -> Iterator[Batch]:
    "A file per graph unless it was used lately, and PyG's collation."
    for numbers in order.split(BATCH):
        yield Batch.from_data_list([files[number] for number in numbers.tolist()])


def store_batches(store: GraphStore, order: torch.Tensor) -> Iterator[Batch]:
    "Slices of the store."
    return map(store.batch, order.split(BATCH))


def batches(count: int, size: str, repeats: int) -> None:
    "Batches from the store against batches in the original's way."
    with tempfile.TemporaryDirectory() as folder:
        data = write_data_set(Path(folder), count, size)
        files = GraphFiles(data / "graphs", data / "train.csv")
        store = open_store(data / "graphs", store_dir=Path(folder, "stores"))
        times = {"original": [], "store": []}
        for repeat in range(repeats):
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(repeat))
            for name, source, batched in (
                ("original", files, original_batches),
                ("store", store, store_batches),
            ):
                taken = seconds(
                    lambda source=source, batched=batched, order=order: list(map(len, batched(source, order)))
                )
                times[name].append(taken / len(order) * 1e6)
    slow, fast = (statistics.median(each) for each in times.values())
    print(
        f"  {size:6} graphs | a graph in a batch of {BATCH}: original {slow:.0f} us, store {fast:.1f} us, {slow / fast:.0f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, nargs="+", default=[1000, 10_000], help="sizes of directories")
    parser.add_argument("--repeats", type=int, default=5, help="timings of which the median is taken")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("(e) schema and store, graphs of real size", flush=True)
    for count in arguments.graphs:
        directory(count, arguments.repeats)
    for size in SIZES:
        batches(arguments.graphs[0], size, arguments.repeats)


if __name__ == "__main__":
    main()
