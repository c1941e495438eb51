"""(a) A warm epoch: this package against a loop in the original's way, one thread, all callbacks.

    python benchmarks/epoch.py                          # random graphs of two sizes
    python benchmarks/epoch.py --data FOLDER            # a folder with graphs/, train.csv and val.csv for the small ones

An epoch is training, validation, metrics and checkpoints. Every side trains in a process of its own, as a user would, and
the first epoch is not counted; the order of the sides turns around from one repeat to the next. First of all it is
shown that the sides compute the same thing: three epochs in 64 bit with the same seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from graphs import SIZES, data_settings, write_data_set
from measure import machine, quiet, ratio_line
from original import Clock, fit

from topoqa_nb.ground.config import LoadedConfig, load_config
from topoqa_nb.network.kernels import find_numba
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.training.training import train

TOLERANCE = 1e-6  # of the metrics
COMPARED = ["train_loss", "val_loss", "val_pearson_corr", "val_spearman_corr"]
Outcome = tuple[list[dict[str, float]], list[float]]  # metrics and seconds of each epoch
Side = Callable[[LoadedConfig, Path], Outcome]


def configuration(data: Path, scratch: Path, epochs: int, precision: int = 32) -> LoadedConfig:
    "The shipped configuration on a data set."
    return load_config(
        "sched_boost_seed222.yaml",
        data_settings(data, scratch) | {"trainer.num_epochs": epochs, "trainer.precision": precision},
    )


def ours(kernel: str) -> Side:
    "Training with a kernel, as `topoqa run` does it."

    def run(loaded: LoadedConfig, folder: Path) -> Outcome:
        clock = Clock()
        with patch.dict(os.environ, TOPOQA_KERNEL=kernel), quiet():
            done = train(loaded, run_name=folder.name, callbacks=[clock])
        return read_metrics(done)[COMPARED].to_dict("records"), clock.epochs

    return run


def original(loaded: LoadedConfig, folder: Path) -> Outcome:
    "The original's way."
    with quiet():
        return fit(loaded.config.paths.train_labels.parent, loaded.config, folder)


def sides() -> dict[str, Side]:
    "The original first; numba where it is installed."
    kernels = ["torch", *(["numba"] if find_numba() else [])]
    return {"original": original} | {kernel: ours(kernel) for kernel in kernels}


def in_a_process(side: str, data: Path, folder: Path, epochs: int, precision: int = 32) -> Outcome:
    "One training, in a process of its own."
    asked = [side, str(data.resolve()), str(folder), str(epochs), str(precision)]
    command = [sys.executable, __file__, "--one", *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def show_equality(data: Path, scratch: Path) -> None:
    "The largest difference of any metric in any of three epochs."
    rows = {name: in_a_process(name, data, scratch / f"equal_{name}", 3, 64)[0] for name in sides()}
    for name in [name for name in rows if name != "original"]:
        pairs = zip(rows[name], rows["original"], strict=True)
        worst = max(abs(one[key] - other[key]) for one, other in pairs for key in COMPARED)
        print(f"  {name}: metrics of 3 epochs in 64 bit differ by at most {worst:.1e}", flush=True)
        if worst > TOLERANCE:
            sys.exit(f"{name}: expected the metrics of the original's way, found a difference of {worst:.1e}")


def compare(title: str, data: Path, repeats: int, epochs: int) -> None:
    "Equality, then times."
    print(f"\n{title}", flush=True)
    names, times = list(sides()), {name: [] for name in sides()}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        show_equality(data, scratch)
        for repeat in range(repeats):
            for name in names if repeat % 2 == 0 else reversed(names):
                seconds = in_a_process(name, data, scratch / f"{name}_{repeat}", epochs)[1]
                times[name].append(statistics.median(seconds[1:]))
    for name in times:
        print(ratio_line(name, times[name], times["original"]), flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder with graphs/, train.csv and val.csv")
    parser.add_argument("--graphs", type=int, default=400, help="random graphs (default %(default)s)")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES), help="(default all)")
    parser.add_argument("--repeats", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="in a process, > 1 (default %(default)s)")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(1)
    if arguments.one:
        side, data, folder, epochs, precision = arguments.one
        loaded = configuration(Path(data), Path(folder).parent, int(epochs), int(precision))
        print(json.dumps(sides()[side](loaded, Path(folder))))
        return
    print(machine())
    print(f"(a) warm epoch, one thread, all callbacks, {arguments.epochs} epochs in a process", flush=True)
    for size in arguments.sizes:
        nodes, edges = SIZES[size]
        if size == "real" and arguments.data:
            compare(
                f"the graphs of {arguments.data.name}/", arguments.data, arguments.repeats, arguments.epochs
            )
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = write_data_set(Path(folder), arguments.graphs, size)
            title = f"{arguments.graphs} random graphs, about {nodes} nodes and {edges} edges"
            compare(title, data, arguments.repeats, arguments.epochs)


if __name__ == "__main__":
    main()
