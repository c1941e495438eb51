"""(d) Growth: epoch time and peak memory of a training run at several numbers of graphs.

    python benchmarks/growth.py [--graphs 500 1000 2000 4000] [--size real]

Each row is a process of its own that trains for three epochs, of which the last is timed, watched from outside. Anonymous
memory belongs to the process alone. `mapped` are pages of files: the libraries, and for the store its graphs, which the
system takes back when it needs the memory.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from graphs import SIZES, write_data_set
from measure import peak_text, watched

SIDES = ("original", "store")


def train(side: str, data: Path, scratch: Path) -> None:
    "Three epochs; prints the seconds of the last."
    import torch
    from epoch import configuration, original, ours

    torch.set_num_threads(1)
    run = original if side == "original" else ours("")
    seconds = run(configuration(data, scratch, epochs=3), scratch / side)[1]
    print(seconds[-1])


def watch(side: str, data: Path, scratch: Path) -> tuple[float, dict[str, float]]:
    "Seconds of an epoch, and the highest memory of the process (MB)."
    said, highest = watched([__file__, "--one", side, str(data), str(scratch)])
    return float(said), highest


def compare(count: int, size: str) -> None:
    "A line for each side; the store is packed by the process that is watched."
    with tempfile.TemporaryDirectory() as folder:
        data = write_data_set(Path(folder), count, size)
        for side in SIDES:
            seconds, peak = watch(side, data, Path(folder))
            print(
                f"  {count:5} graphs | {side:<8} epoch {seconds:6.2f} s | {peak_text(peak)}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    counts = [500, 1000, 2000, 4000]
    parser.add_argument("--graphs", type=int, nargs="+", default=counts, help="sizes of data sets")
    parser.add_argument("--size", choices=list(SIZES), default="real", help="size of a graph")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, data, scratch = arguments.one
        train(side, Path(data), Path(scratch))
        return
    print(f"(d) growth with the number of graphs ({arguments.size} size), one thread", flush=True)
    for count in arguments.graphs:
        compare(count, arguments.size)


if __name__ == "__main__":
    main()
