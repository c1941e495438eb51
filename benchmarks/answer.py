"""(h) Time to an answer: from a folder of graph files to a trained model and what it is worth, everything included.

    python benchmarks/answer.py                          # random graphs
    python benchmarks/answer.py --data FOLDER            # a folder with graphs/, train.csv and val.csv instead

A recipe is three jobs, whose mean is judged on the validation graphs: `original` are those of manifests/run_core.yaml,
`recommended` those of manifests/run_recommended.yaml. The original's way trains one after the other with two threads and
prints three numbers. Ours is two commands, `topoqa batch --jobs auto` and `topoqa evaluate`; nothing was packed before, and
the second makes every measure with its interval, figures and a page. Imports, checkpoints and logs are counted on both sides.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import yaml
from graphs import SIZES, data_settings, write_data_set
from measure import ratio_line, seconds
from sweep import run

from topoqa_nb.ground.config import load_config

MANIFESTS = Path(__file__).parents[1] / "manifests"
RECIPES = {"original": "run_core.yaml", "recommended": "run_recommended.yaml"}
Job = dict[str, object]  # name, config, overrides


def jobs_of(recipe: str, count: int, epochs: int) -> list[Job]:
    "The first jobs of a recipe, each with its own number of epochs or fewer."
    jobs = yaml.safe_load((MANIFESTS / RECIPES[recipe]).read_text())["jobs"][:count]
    for job in jobs:
        job["config"] = Path(job["config"]).name
        longest = load_config(job["config"]).config.trainer.num_epochs
        job["overrides"] = job.get("overrides", {}) | {"trainer.num_epochs": min(epochs, longest)}
    return jobs


def original(data: Path, folder: Path, jobs: list[Job]) -> None:
    "A process for each job, and one for the answer."
    script = [sys.executable, str(Path(__file__).with_name("original.py")), str(data), "--threads", "2"]
    for job in jobs:
        settings = [f"{key}={value}" for key, value in job["overrides"].items()]
        place = ["--save-dir", str(folder / job["name"]), "--config", job["config"]]
        run([*script, *place, "--set", *settings], threads=2)
    places = ["--save-dir", *(str(folder / job["name"]) for job in jobs)]
    run([*script, *places, "--config", jobs[0]["config"], "--evaluate"], threads=2)


def ours(data: Path, folder: Path, jobs: list[Job], resamples: int) -> None:
    "Two commands with a cache folder of their own."
    settings = data_settings(data, folder)
    del settings["paths.store"]
    manifest = folder / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"shared": {"overrides": settings}, "jobs": jobs}))
    topoqa, runs = [sys.executable, "-m", "topoqa_nb.cli"], folder / "runs"
    with patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
        run([*topoqa, "batch", "--manifest", str(manifest), "--jobs", "auto"], threads=1)
        found = [next(runs.glob(f"{job['name']}_*/model_checkpoints/best.ckpt")) for job in jobs]
        models = [f"--model={checkpoint}" for checkpoint in found]
        files = ["--graph-dir", settings["paths.graph"], "--labels", settings["paths.val_labels"]]
        files += ["--bootstrap", str(resamples)]
        run([*topoqa, "evaluate", *models, *files, "--out", str(folder / "answer")], threads=2)


def compare(recipe: str, jobs: list[Job], data: Path, repeats: int, resamples: int) -> None:
    "Wall-clock time of both sides, which alternate."
    times = {"original": [], "topoqa": []}
    print(
        f"  {recipe} recipe, {len(jobs)} jobs of {jobs[0]['overrides']['trainer.num_epochs']} epochs",
        flush=True,
    )
    for repeat in range(repeats):
        sides = [("original", original), ("topoqa", partial(ours, resamples=resamples))]
        for name, side in sides if repeat % 2 == 0 else reversed(sides):
            with tempfile.TemporaryDirectory() as folder:
                times[name].append(seconds(lambda side=side, folder=folder: side(data, Path(folder), jobs)))
    for name in times:
        print(ratio_line(name, times[name], times["original"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder with graphs/, train.csv and val.csv")
    parser.add_argument("--graphs", type=int, default=400, help="random graphs (default %(default)s)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="(default both)")
    parser.add_argument("--jobs", type=int, default=3, help="of a recipe (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of a job at most (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples (default %(default)s)")
    arguments = parser.parse_args()
    what = f"the graphs of {arguments.data.name}/" if arguments.data else f"{arguments.graphs} random graphs"
    print(f"(h) time to an answer, {what}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or write_data_set(Path(folder), arguments.graphs, next(iter(SIZES)))
        for recipe in arguments.recipes:
            jobs = jobs_of(recipe, arguments.jobs, arguments.epochs)
            compare(recipe, jobs, data.resolve(), arguments.repeats, arguments.bootstrap)


if __name__ == "__main__":
    main()
