"""Anonymous memory of a training epoch: the packed store against the original's way of loading.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--graphs 500 1000 2000 4000] [--size real]

Each row is one process of its own, watched from outside with its readers. `file` are mapped pages of the store,
which the system takes back when it needs them; it includes the libraries.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from graphs import BATCH, EDGE_WIDTH, NODE_WIDTH, SIZES, original_batches, write_graphs

from topoqa_nb.model import TopoQANet, widths
from topoqa_nb.store import open_store


def train_epoch(way: str, graph_dir: Path, store_dir: Path) -> None:
    "One epoch: forward, backward, step."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = TopoQANet(widths(NODE_WIDTH, EDGE_WIDTH))
    optimizer = torch.optim.Adam(model.parameters())
    if way == "original":
        count = sum(1 for _ in graph_dir.rglob("*.pt"))
        batches = original_batches(graph_dir, torch.randperm(count))
    else:
        store = open_store(graph_dir, store_dir=store_dir)
        batches = map(store.batch, torch.randperm(len(store)).split(BATCH))
    for batch in batches:
        model(batch).mean().backward()
        optimizer.step()


SOURCES = {"anonymous": ("smaps_rollup", "Pss_Anon:"), "file": ("status", "RssFile:")}


def memory(process: psutil.Process, kind: str) -> float:
    "Memory of a process and its children; what forked processes share counts once (MB)."
    name, field = SOURCES[kind]
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with suppress(OSError):  # ended meanwhile
            lines = Path(f"/proc/{each.pid}/{name}").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith(field))
    return total * 1024 / 1e6


def peak(*arguments: str) -> dict[str, float]:
    "Highest memory of a process that runs this script with the given arguments (MB)."
    highest = dict.fromkeys(SOURCES, 0.0)
    process = subprocess.Popen([sys.executable, __file__, *arguments])
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            highest = {kind: max(value, memory(watched, kind)) for kind, value in highest.items()}
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed")
    return highest


def compare(count: int, size: str) -> None:
    "Print one line for each way."
    with tempfile.TemporaryDirectory() as folder:
        graph_dir, store_dir = write_graphs(Path(folder, "graphs"), count, size), Path(folder, "stores")
        for way in ("pack", "store", "original"):
            found = peak(way, str(graph_dir), str(store_dir))
            print(
                f"{size:4} {count:5} graphs | {way:8} | anonymous {found['anonymous']:6.1f} MB, file {found['file']:6.1f} MB"
            )


def main() -> None:
    "Print all figures."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--graphs", type=int, nargs="+", default=[500, 1000, 2000, 4000], help="sizes of directories"
    )
    parser.add_argument("--size", choices=list(SIZES), default="real", help="size of a graph")
    arguments = parser.parse_args()
    for count in arguments.graphs:
        compare(count, arguments.size)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1:2] == ["pack"]:
        open_store(Path(sys.argv[2]), store_dir=Path(sys.argv[3]))
    elif sys.argv[1:2] in (["store"], ["original"]):
        train_epoch(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
