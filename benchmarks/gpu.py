"""A warm epoch on a GPU: a loop in the original's way, this package batch by batch, and with the batches of a step together.

    python benchmarks/gpu.py --data FOLDER              # a folder with graphs/, train.csv and val.csv
    python benchmarks/gpu.py                            # random graphs of two sizes

All sides run on the same device, one after the other and in turn; the first two epochs of each are not counted. In 32 bit
the losses of the last epoch are printed too: the sides draw other dropout masks, so they differ as two seeds do.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from graphs import SIZES, data_settings, write_data_set
from measure import quiet, ratio_line
from original import Clock, fit

from topoqa_nb.ground.config import load_config
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.training import training

WARM_UP = 2  # epochs
SIDES = {"original": None, "apart": "off", "together": "auto"}  # name -> trainer.fuse_batches


def one(side: str, settings: dict[str, object], scratch: Path) -> tuple[list[float], float]:
    "Seconds of the counted epochs, and the last validation loss."
    fuse = {"trainer.fuse_batches": SIDES[side] or "off"}
    loaded = load_config("sched_boost_seed222.yaml", settings | fuse | {"paths.save_dir": str(scratch)})
    folder = Path(tempfile.mkdtemp(dir=scratch))
    if SIDES[side] is None:
        with quiet():
            rows, seconds = fit(loaded.config.paths.train_labels.parent, loaded.config, folder)
        return seconds[WARM_UP:], rows[-1]["val_loss"]
    clock, make_callbacks = Clock(), training.make_callbacks
    timed = patch.object(training, "make_callbacks", lambda *given: [clock, *make_callbacks(*given)])
    with timed, quiet():
        run = training.train(loaded, run_name=folder.name + "_run")
    return clock.epochs[WARM_UP:], float(read_metrics(run)["val_loss"].iloc[-1])


def compare(title: str, data: Path, arguments: argparse.Namespace) -> None:
    "Every side in turn, for both precisions."
    for precision in arguments.precision:
        print(f"\n{title}, precision {precision}", flush=True)
        times, losses = {name: [] for name in SIDES}, {}
        with tempfile.TemporaryDirectory() as folder:
            settings = data_settings(data, Path(folder)) | {
                "trainer.num_epochs": WARM_UP + arguments.epochs,
                "trainer.precision": precision,
                "trainer.accelerator": arguments.accelerator,
                "dataloader.num_workers": arguments.workers,
            }
            for _ in range(arguments.repeats):
                for name in SIDES:
                    seconds, losses[name] = one(name, settings, Path(folder))
                    times[name].append(statistics.median(seconds))
        for name, seconds in times.items():
            print(f"{ratio_line(name, seconds, times['original'])} | val_loss {losses[name]:.4f}", flush=True)


def data_sets(arguments: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path]]:
    "Title and folder of each data set."
    if arguments.data:
        yield f"the graphs of {arguments.data.name}/", arguments.data
        return
    for size in arguments.sizes:
        title = "{} random graphs, about {} nodes and {} edges".format(arguments.graphs, *SIZES[size])
        yield title, write_data_set(scratch / size, arguments.graphs, size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder with graphs/, train.csv and val.csv")
    parser.add_argument("--graphs", type=int, default=400, help="random graphs (default %(default)s)")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES), help="(default all)")
    parser.add_argument("--accelerator", default="cuda", help="(default %(default)s)")
    parser.add_argument("--precision", nargs="*", default=["32", "16-mixed"], help="(default both)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="counted, of each side (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else arguments.accelerator
    print(f"{name}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for title, data in data_sets(arguments, Path(folder)):
            compare(title, data, arguments)


if __name__ == "__main__":
    main()
