"""Data sets to measure with: random graphs of two sizes, with labels."""

import os
import shutil
from pathlib import Path

import torch
from torch_geometric.data import Data

from topoqa_nb.data.graphs import list_graphs

NODE_WIDTH, EDGE_WIDTH = 172, 11  # of the builds that were measured
SIZES = {"real": (35, 114), "big": (91, 902)}  # nodes and edges of a graph, on average
DECOYS = 20  # of a target
DISTINCT = 512  # files beyond are hard links to earlier ones, to save the disk


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


def graph_name(number: int) -> str:
    "A decoy of a target."
    return f"T{number // DECOYS:04d}/D{number:05d}"


def write_graphs(folder: Path, count: int, size: str) -> Path:
    "So many graph files, a folder for each target."
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        path = folder / f"{graph_name(number)}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < DISTINCT:
            torch.save(random_graph(size, generator), path)
        else:
            os.link(folder / f"{graph_name(number % DISTINCT)}.pt", path)
    return folder


def repeat_graphs(folder: Path, count: int, source: Path) -> Path:
    "So many graph files, which are those of a directory again and again: links where the file system allows."
    files = list(list_graphs(source).values())
    for number in range(count):
        path = folder / f"{graph_name(number)}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(files[number % len(files)], path)
        except OSError:  # another file system, or no right to link to another user's file
            shutil.copy(files[number % len(files)], path)
    return folder


def data_settings(data: Path, scratch: Path) -> dict[str, str]:
    "The overrides that make a run use a data set and keep what it writes in a folder of its own."
    return {
        "paths.graph": str(data / "graphs"),
        "paths.train_labels": str(data / "train.csv"),
        "paths.val_labels": str(data / "val.csv"),
        "paths.save_dir": str(scratch / "runs"),
        "paths.store": str(scratch / "stores"),
    }


def write_data_set(folder: Path, count: int, size: str) -> Path:
    "Graphs with labels; a fifth of the targets is for validation."
    write_graphs(folder / "graphs", count, size)
    dockq = torch.rand(count, generator=torch.Generator().manual_seed(1)).tolist()
    rows = [f"{graph_name(number)},{value:.4f}" for number, value in enumerate(dockq)]
    validation = max(1, count // DECOYS // 5) * DECOYS
    for name, part in (("train", rows[validation:]), ("val", rows[:validation])):
        (folder / f"{name}.csv").write_text("\n".join(["MODEL,dockq", *part]) + "\n")
    return folder
