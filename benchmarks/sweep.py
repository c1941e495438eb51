"""(c) Three jobs: `topoqa batch --jobs auto` against three runs of the original's way, one after the other.

    python benchmarks/sweep.py                          # random graphs
    python benchmarks/sweep.py --data FOLDER            # a folder with graphs/, train.csv and val.csv instead

The jobs are those of manifests/run_core.yaml. The original's runs have two threads each, ours have one each and run at
the same time where there are cores. Everything is counted: imports, the packing of the graphs, checkpoints, logs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml
from graphs import SIZES, data_settings, write_data_set
from measure import ratio_line, seconds

JOBS = ("sched_boost_seed222", "sched_boost_lr035_seed222", "large_batch_sched_boost_seed222")


def run(command: list[str], threads: int) -> None:
    "A command to its end, silently."
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-2000:]}")


def original(data: Path, folder: Path, jobs: Sequence[str], epochs: int) -> None:
    "Processes in sequence, two threads each."
    script = Path(__file__).with_name("original.py")
    for job in jobs:
        command = [sys.executable, str(script), str(data), "--save-dir", str(folder / job), "--threads", "2"]
        run([*command, "--config", f"{job}.yaml", "--set", f"trainer.num_epochs={epochs}"], threads=2)


def ours(data: Path, folder: Path, jobs: Sequence[str], epochs: int) -> None:
    "One command; it packs the graphs, because nobody has done so before."
    overrides = data_settings(data, folder) | {"trainer.num_epochs": epochs}
    named = [{"name": job, "config": f"{job}.yaml"} for job in jobs]
    manifest = folder / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"shared": {"overrides": overrides}, "jobs": named}))
    topoqa = [sys.executable, "-m", "topoqa_nb.cli", "batch"]
    run([*topoqa, "--manifest", str(manifest), "--jobs", "auto"], threads=1)


def compare(data: Path, jobs: Sequence[str], epochs: int, repeats: int) -> None:
    "Wall-clock time of both sides, which alternate."
    times = {"original": [], "topoqa": []}
    for repeat in range(repeats):
        sides = [("original", original), ("topoqa", ours)]
        for name, side in sides if repeat % 2 == 0 else reversed(sides):
            with tempfile.TemporaryDirectory() as folder:
                work = partial(side, data, Path(folder), jobs, epochs)
                times[name].append(seconds(work))
    for name in times:
        print(ratio_line(name, times[name], times["original"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder with graphs/, train.csv and val.csv")
    parser.add_argument("--graphs", type=int, default=400, help="random graphs (default %(default)s)")
    parser.add_argument(
        "--size", choices=list(SIZES), default="big", help="of a random graph (default %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=len(JOBS), help="(default %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of each run (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="(default %(default)s)")
    arguments = parser.parse_args()
    what = (
        f"the graphs of {arguments.data.name}/"
        if arguments.data
        else f"{arguments.graphs} random graphs ({arguments.size})"
    )
    print(
        f"(c) {arguments.jobs} jobs of {arguments.epochs} epochs, {what}, {os.cpu_count()} cores", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or write_data_set(Path(folder), arguments.graphs, arguments.size)
        compare(data.resolve(), JOBS[: arguments.jobs], arguments.epochs, arguments.repeats)


if __name__ == "__main__":
    main()
