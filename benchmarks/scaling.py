"""What a plan for many workers rests on: times of tasks, of starts and of the driver, with 1 and 2 workers.

    python benchmarks/scaling.py [--workers 1 2] [--structures 48] [--graphs 6000] [--trainings 6] [--epochs 8]
                                 [--kinds build predict train] [--ray] [--out FILE]

A worker is a process with one thread that is started, says when it is ready, and takes the next task when it is done with one.
Tasks are structures that become graphs, shards of 500 graphs that are scored, and short trainings of a sweep. All times are wall
time and mean nothing with other work on the machine. --ray also measures what Ray adds: the start of a worker, and the
driver's time for a task that does nothing. --out keeps the figures, which nbs/96c_scaling.ipynb reads.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

SHARD = 500  # graphs


def builds(folder: Path) -> Callable[[str], object]:
    "Makes a graph of a structure; the first one translates or loads the kernels, and is part of the start."
    from topoqa_nb.build.example import write_example
    from topoqa_nb.build.recipe import Recipe, build_graph

    build_graph(write_example(folder / f"example_{os.getpid()}.pdb"), Recipe())
    return lambda file: build_graph(file, Recipe())


def predicts(folder: Path) -> Callable[[str], object]:
    "Scores a folder of graphs, which are read once and not packed."
    from topoqa_nb.answers.inference import Scorer

    scorer = Scorer.load(folder / "weights.ckpt", device="cpu")
    return lambda shard: scorer.predict(Path(shard), use_store=False)


def trains(folder: Path) -> Callable[[str], object]:
    "A training with a seed of its own, on graphs that are packed already."
    from graphs import data_settings
    from measure import quiet

    from topoqa_nb.ground.config import load_config
    from topoqa_nb.training.training import train

    def work(seed: str) -> None:
        settings = data_settings(folder / "data", folder) | {"dataloader.seed": int(seed)}
        settings |= {
            "paths.save_dir": str(folder / f"runs_{os.getpid()}"),
            "trainer.num_epochs": epochs_of(folder),
        }
        with quiet():
            train(load_config("config.yaml", settings), run_name=f"seed{seed}")

    return work


KINDS = {"build": builds, "predict": predicts, "train": trains}


def epochs_of(folder: Path) -> int:
    return int((folder / "epochs.txt").read_text())


def work(kind: str, folder: Path) -> None:
    "A worker: ready, then the seconds of each task, and those of processor time."
    do = KINDS[kind](folder)
    print("ready", time.process_time(), flush=True)
    for line in sys.stdin:
        start, spent = time.perf_counter(), time.process_time()
        do(line.strip())
        print(time.perf_counter() - start, time.process_time() - spent, flush=True)


def serve(kind: str, folder: Path, tasks: queue.Queue, begun: float, found: dict) -> None:
    "Start a worker and hand it tasks, one after the other, until there are no more."
    command, silent = (
        [sys.executable, __file__, "--work", kind, str(folder)],
        os.environ | {"TOPOQA_LOG_LEVEL": "WARNING"},
    )
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=silent, text=True
    ) as process:
        _, spent = process.stdout.readline().split()
        found["ready"].append(time.perf_counter() - begun)
        found["ready_cpu"].append(float(spent))
        while not tasks.empty():
            process.stdin.write(f"{tasks.get_nowait()}\n")
            process.stdin.flush()
            wall, spent = map(float, process.stdout.readline().split())
            found["tasks"].append(wall)
            found["tasks_cpu"].append(spent)
            found["answered"].append(time.perf_counter() - begun)
        process.stdin.close()


def with_workers(kind: str, folder: Path, tasks: Sequence[str], workers: int) -> dict[str, object]:
    "Wall time (s) to the last answer, until each worker was ready, and of each task; the latter two also in processor time."
    names = ("ready", "ready_cpu", "tasks", "tasks_cpu", "answered")
    waiting, found, begun = queue.Queue(), {name: [] for name in names}, time.perf_counter()
    for task in tasks:
        waiting.put(task)
    threads = [
        threading.Thread(target=serve, args=(kind, folder, waiting, begun, found)) for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["wall"] = [max(found.pop("answered"))]
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def files_of_a_start() -> int:
    "Files of Python and libraries that a worker has loaded when it is ready to train."
    code = "import topoqa_nb.training.training, sys; print(sum(bool(getattr(m, '__file__', 0)) for m in [*sys.modules.values()]))"
    return int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def prepared(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, float]]:
    "Tasks of each kind; and bytes of a file, seconds of a graph that is packed and of a store that is opened."
    from graphs import data_settings, write_data_set, write_graphs
    from measure import seconds
    from predict import write_model

    from topoqa_nb.build.demo_set import write_structures
    from topoqa_nb.build.inputs import find_structures
    from topoqa_nb.data.store import open_store

    write_structures(folder / "made", 4, max(2, arguments.structures // 4), seed=1)
    structures = list(find_structures([folder / "made" / "structures"]).values())[: arguments.structures]
    for number in range(max(1, arguments.graphs // SHARD)):
        write_graphs(folder / "shards" / f"{number:04d}", min(SHARD, arguments.graphs), "real")
    shards = sorted((folder / "shards").iterdir())
    write_model(shards[0], folder / "weights.ckpt")
    write_data_set(folder / "data", 400, "real")
    (folder / "epochs.txt").write_text(str(arguments.epochs))
    store = data_settings(folder / "data", folder)
    opened = [
        seconds(lambda: open_store(Path(store["paths.graph"]), store_dir=Path(store["paths.store"])))
        for _ in range(2)
    ]
    sizes = {"structure": structures, "graph": list(shards[0].rglob("*.pt"))}
    facts = {
        f"{name}_bytes": sum(file.stat().st_size for file in some) / len(some) for name, some in sizes.items()
    }
    facts |= {"pack_seconds": opened[0] / 400, "open_seconds": opened[1], "start_files": files_of_a_start()}
    seeds = [str(seed) for seed in range(arguments.trainings)]
    return {"build": list(map(str, structures)), "predict": list(map(str, shards)), "train": seeds}, facts


def of_ray(tasks: int = 1000) -> dict[str, float]:
    "Seconds: a cluster on this machine, a worker that imports what a training needs, the driver for a task."
    import ray

    begun = time.perf_counter()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    there = time.perf_counter()

    @ray.remote(num_cpus=1)
    class Worker:
        def __init__(self):
            import topoqa_nb.training.training  # noqa: F401

        def nothing(self, number: int) -> int:
            return number

    worker = Worker.remote()
    ray.get(worker.nothing.remote(0))
    ready = time.perf_counter()
    ray.get([worker.nothing.remote(number) for number in range(tasks)])
    done = time.perf_counter()
    ray.shutdown()
    return {"cluster": there - begun, "worker": ready - there, "task": (done - ready) / tasks}


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    "All figures, printed as they come."
    from measure import machine

    print(f"(i) workers and their tasks: {machine()}", flush=True)
    tasks, facts = prepared(folder, arguments)
    found = {"machine": machine(), "facts": facts, "shard": min(SHARD, arguments.graphs), "kinds": {}}
    for kind in arguments.kinds:
        found["kinds"][kind], some = {}, tasks[kind]
        for workers in arguments.workers:
            row = found["kinds"][kind][str(workers)] = with_workers(kind, folder, some, workers)
            mean = sum(row["tasks"]) / len(row["tasks"])
            line = f"{workers} workers: {row['wall'][0]:.2f} s, ready after {max(row['ready']):.2f} s"
            print(f"  {kind:<8} {len(some)} tasks, {line}, {1000 * mean:.1f} ms a task", flush=True)
    for name, value in facts.items():
        print(f"  {name:<16} {value:.4g}")
    if arguments.ray:
        found["ray"] = of_ray()
        print(f"  ray: {', '.join(f'{name} {value:.4f} s' for name, value in found['ray'].items())}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--structures", type=int, default=48)
    parser.add_argument("--graphs", type=int, default=6000)
    parser.add_argument("--trainings", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=8, help="of a training, on 400 graphs")
    parser.add_argument("--ray", action="store_true", help="also what Ray adds")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp()).resolve()
    try:
        found = measure(folder, arguments)
    finally:
        shutil.rmtree(folder)
    if arguments.out:
        arguments.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
