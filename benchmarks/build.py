"""(g) Graphs of structures: processor time by stage, with 1 and 2 processes, memory, and the start of a process.

    python benchmarks/build.py [STRUCTURES] [--count 40] [--processes 1 2] [--cold] [--slowly PYTHON]

STRUCTURES is a folder (default: synthetic ones); so many of them are taken, in the order of their names. Each row is a process
of its own; times are processor time, so that other work on the machine counts little. --cold begins without translated
kernels of numba, as after an installation, which takes a while. Memory is that of a worker alone. --slowly names the
Python of an environment with gudhi and biopython, with mkdssp on the path: the published way, `build_slowly.py`, builds
every fourth structure, and the ratio is that of the same structures.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

from topoqa_nb.build.example import write_example
from topoqa_nb.build.inputs import find_structures
from topoqa_nb.build.recipe import Recipe, Watch, build_graph

SLOWLY = Path(__file__).with_name("build_slowly.py")
STEP = 4  # of the structures that are built the slow way, too


def one_by_one(files: list[str]) -> None:
    "Print the time to the first graph, and seconds by stage and in all for each structure."
    example = write_example(Path(files[0]) / "example.pdb")
    start = time.process_time()
    build_graph(example, Recipe())
    first, rows = time.process_time() - start, []
    with patch("topoqa_nb.build.recipe.time.perf_counter", time.process_time):
        for name in files[1:]:
            start, watch = time.process_time(), Watch()
            build_graph(name, Recipe(), watch)
            rows.append(watch.seconds | {"all": time.process_time() - start})
    print(json.dumps({"first": first, "imports": start_of_process, "rows": rows}))


def alone(scratch: Path, files: list[Path], **environment: str) -> dict:
    "What `one_by_one` prints in a process of its own."
    command = [sys.executable, __file__, "--one", str(scratch), *map(str, files)]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def with_processes(structures: Path, out: Path, processes: int) -> tuple[float, float, float, list[float]]:
    "Wall time and processor time of a whole build (s), and memory of the process that asks and of each worker (MB)."
    words = ["build", str(structures), "--out", str(out), "--jobs", str(processes)]
    command = [sys.executable, "-m", "topoqa_nb.cli", *words]
    start, seen, spent, memory = time.perf_counter(), {}, {}, {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for each in [
                process.pid,
                *(child.pid for child in psutil.Process(process.pid).children(recursive=True)),
            ]:
                try:
                    known = seen.setdefault(each, psutil.Process(each))
                    times = known.cpu_times()
                    spent[each] = times.user + times.system
                    memory[each] = max(memory.get(each, 0), known.memory_full_info().uss / 1e6)
                except psutil.Error:
                    continue
            time.sleep(0.05)
    workers = sorted(
        (memory[each] for each in memory if each != process.pid and spent[each] > 0.5), reverse=True
    )
    return time.perf_counter() - start, sum(spent.values()), memory[process.pid], workers


def stages_line(rows: list[dict[str, float]]) -> str:
    "Mean of each stage (ms)."
    means = {stage: 1000 * statistics.mean(row[stage] for row in rows) for stage in rows[0]}
    return " | ".join(f"{stage} {value:.1f}" for stage, value in means.items())


def slow_times(python: str, files: list[Path], scratch: Path) -> list[float]:
    "Seconds of each structure in the published way."
    plain = []
    for number, file in enumerate(files):
        content = file.read_bytes()
        plain.append(scratch / f"{number}.pdb")
        plain[-1].write_bytes(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    command = [python, str(SLOWLY), *map(str, plain)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(arguments: argparse.Namespace, scratch: Path) -> None:
    "All lines."
    from topoqa_nb.build.demo_set import write_structures  # with torch

    structures = arguments.structures or scratch / "synthetic" / "structures"
    if not arguments.structures:
        write_structures(scratch / "synthetic", 4, max(2, arguments.count // 4), seed=1)
    chosen = dict(list(find_structures([structures]).items())[: arguments.count])
    files = list(chosen.values())
    for name, file in chosen.items():
        place = scratch / "chosen" / f"{name}{''.join(file.suffixes)}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    if arguments.cold:
        cold = alone(scratch / "cold", [], NUMBA_CACHE_DIR=str(scratch / "numba"))
        print(f"  first graph of a process without translated kernels: {cold['first']:.1f} s", flush=True)
    found = alone(scratch / "cached", files)
    print(f"  first graph of a process: {found['first']:.2f} s, after imports of {found['imports']:.1f} s")
    mean = statistics.mean(row["all"] for row in found["rows"])
    print(f"  ms a structure, mean of {len(files)}: {stages_line(found['rows'])}")
    print(f"  1,000 such structures: {1000 * mean:.0f} s of processor time", flush=True)
    for processes in arguments.processes:
        wall, spent, asking, workers = with_processes(
            scratch / "chosen", scratch / f"out{processes}", processes
        )
        each = f", worker {workers[0]:.0f} MB" if processes > 1 and workers else ""
        print(
            f"  {processes} processes: {wall:.1f} s, {spent:.1f} s of processor time, start included; asking process {asking:.0f} MB{each}",
            flush=True,
        )
    if arguments.slowly:
        slow = slow_times(arguments.slowly, files[::STEP], scratch)
        fast = [row["all"] for row in found["rows"][::STEP]]
        ratios = [one / other for one, other in zip(slow, fast, strict=True)]
        print(
            f"  published way, {len(slow)} of them: {statistics.mean(slow):.2f} s a structure, {sum(slow) / sum(fast):.1f} x the time here (median of ratios {statistics.median(ratios):.1f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("structures", type=Path, nargs="?", help="a folder; default: synthetic structures")
    parser.add_argument("--count", type=int, default=40, help="structures")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of whole builds")
    parser.add_argument("--cold", action="store_true", help="also without translated kernels")
    parser.add_argument("--slowly", metavar="PYTHON", help="of an environment with gudhi and biopython")
    arguments = parser.parse_args()
    from measure import machine  # imports torch, which the processes that are measured do without

    print(f"(g) graphs of structures: {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        measure(arguments, Path(scratch).resolve())


if __name__ == "__main__":
    start_of_process = time.process_time()
    if sys.argv[1:2] == ["--one"]:
        one_by_one(sys.argv[2:])
    else:
        main()
