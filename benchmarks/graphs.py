"""Random graphs of two sizes, and the way in which the original feeds them to its network."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch_geometric.data import Batch, Data

from topoqa_nb.store import list_graphs, read_graph

NODE_WIDTH, EDGE_WIDTH = 172, 11  # of the builds that were measured
SIZES = {"real": (35, 114), "big": (91, 902)}  # nodes and edges of a graph, on average
BATCH = 16
CACHED_GRAPHS = 256  # the original keeps the graphs that it used last


def random_graph(size: str, generator: torch.Generator) -> Data:
    "A graph whose numbers of nodes and edges vary by a quarter."
    nodes, edges = (
        int(mean * (0.75 + 0.5 * torch.rand(1, generator=generator).item())) for mean in SIZES[size]
    )
    return Data(
        x=torch.rand(nodes, NODE_WIDTH, generator=generator),
        edge_index=torch.randint(nodes, (2, edges), generator=generator),
        edge_attr=torch.rand(edges, EDGE_WIDTH, generator=generator),
    )


def write_graphs(folder: Path, count: int, size: str) -> Path:
    "Files in folders of twenty. Beyond 512 graphs the files are hard links to earlier ones, to save the disk."
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        path = folder / f"T{number // 20:04d}" / f"D{number:05d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < 512:
            torch.save(random_graph(size, generator), path)
        else:
            os.link(folder / f"T{number % 512 // 20:04d}" / f"D{number % 512:05d}.pt", path)
    return folder


def original_batches(graph_dir: Path, order: torch.Tensor) -> Iterator[Batch]:
    "A file per graph, the last ones kept, PyG's collation."
    files, kept = list(list_graphs(graph_dir).values()), OrderedDict()

    def load(number: int) -> Data:
        if number not in kept:
            kept[number] = read_graph(files[number])
        kept.move_to_end(number)
        if len(kept) > CACHED_GRAPHS:
            kept.popitem(last=False)
        return kept[number]

    for numbers in order.split(BATCH):
        yield Batch.from_data_list([load(number) for number in numbers.tolist()])
