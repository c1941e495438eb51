"""(b) Cold start: seconds from the start of a process to its first optimizer step.

    OMP_NUM_THREADS=1 python benchmarks/start.py [--graphs 1000 10000] [--repeats 3]

`store` has its packed graphs from an earlier run, `first run` packs them first, `original` reads what its first batch needs.
Files are in the page cache. The rest of a start is importing PyTorch, PyG and Lightning; this package imports as `topoqa
run` does, with `fast_import`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from topoqa_nb.ground.machine import fast_import

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

SIDES = ("original", "store", "first run")


def first_step(side: str, data: Path, scratch: Path, started: float) -> None:
    "Train until the first step is done, print how long it took and how long the store and the schema took of it."
    with nullcontext() if side == "original" else fast_import():
        import torch
        from graphs import data_settings
        from measure import quiet, timed
        from pytorch_lightning import Callback

        from topoqa_nb.data import dataset
        from topoqa_nb.ground.config import load_config
        from topoqa_nb.training.training import train

    class Done(Callback):
        def on_train_batch_end(self, *_: object) -> None:
            print(time.time() - started, *parts, file=sys.__stdout__, flush=True)
            os._exit(0)

    torch.set_num_threads(1)
    step_each_batch = {"trainer.accumulate_grad_batches": 1}
    overrides = data_settings(data, scratch) | step_each_batch
    loaded, parts = load_config("sched_boost_seed222.yaml", overrides), []
    with quiet():
        if side == "original":
            from original import fit

            fit(data, loaded.config, scratch / "original", Done())
        watched = {name: timed(getattr(dataset, name), parts) for name in ("open_store", "resolve_schema")}
        with patch.multiple(dataset, **watched):
            train(loaded, callbacks=[Done()])


def measure_start(side: str, data: Path, scratch: Path) -> list[float]:
    "Seconds in all, and of the parts, in a process of its own."
    command = [sys.executable, __file__, "--one", side, str(data), str(scratch), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed: {done.stderr[-2000:]}")
    return [float(value) for value in done.stdout.split()]


def compare(count: int, repeats: int) -> None:
    "Medians of all sides, which alternate."
    from graphs import write_data_set

    found = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data_set(Path(folder, "data"), count, "real")
        measure_start("store", data, Path(folder))  # leaves the packed graphs
        for repeat in range(repeats):
            for side in SIDES:
                scratch = Path(folder, f"fresh_{repeat}") if side == "first run" else Path(folder)
                found[side].append(measure_start(side, data, scratch))
    for side, rows in found.items():
        total, *parts = (statistics.median(column) for column in zip(*rows, strict=True))
        said = "" if not parts else f" | of which the store {parts[0]:.3f} s, the schema {parts[1]:.3f} s"
        print(f"  {count:6} graphs | {side:<9} first step after {total:5.2f} s{said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, nargs="+", default=[1000, 10_000], help="sizes of data sets")
    parser.add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, data, scratch, started = arguments.one
        first_step(side, Path(data), Path(scratch), float(started))
        return
    print("(b) cold start to the first step, one thread", flush=True)
    for count in arguments.graphs:
        compare(count, arguments.repeats)


if __name__ == "__main__":
    main()
