"""Every file that is read, in every form of damage, by whatever reads it: a line, or a value, and never a traceback or a wait.

`make test` takes every 127th case of the table, `make test-faults` takes all of them (TOPOQA_DAMAGE_EVERY=1).
"""

import copy
import functools
import gzip
import io
import json
import math
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from original_stack import write_original_run

from topoqa_nb.answers.export import export
from topoqa_nb.answers.models import load_models
from topoqa_nb.answers.predictions import read_predictions
from topoqa_nb.build.example import write_example
from topoqa_nb.build.journal import journal_of
from topoqa_nb.build.recipe import Recipe
from topoqa_nb.build.structures import read_structure
from topoqa_nb.cli import main
from topoqa_nb.data.cache import cache_rows, cached_stores
from topoqa_nb.data.families import read_families
from topoqa_nb.data.graphs import read_graph
from topoqa_nb.data.labels import read_labels
from topoqa_nb.data.sidecar import read_sidecar, read_summary
from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import TopoqaError, write_json
from topoqa_nb.network.weights import load_model
from topoqa_nb.pipeline.parameters import PipelineParameters
from topoqa_nb.pipeline.plan import claim_reports
from topoqa_nb.pipeline.stage_record import read_stage
from topoqa_nb.pipeline.standing import SUMMARY, standing
from topoqa_nb.runs.leaderboard import leaderboard, summarise
from topoqa_nb.runs.record import RunDirectory, read_metadata
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.sweep.manifest import load_manifest, plan_jobs
from topoqa_nb.training.resume import check_restorable
from topoqa_nb.training.rewind import find_start, finish_rewinds
from topoqa_nb.training.training import train

EVERY = int(os.environ.get("TOPOQA_DAMAGE_EVERY", "127"))
SECONDS = 30  # in which a case ends, on a machine that does other things too

# --- what can happen to a file ---


def loop(file: Path) -> None:
    file.symlink_to(file.name)


FORMS: dict[str, bytes | Callable[[Path], object]] = {
    "missing": lambda file: None, "a directory": Path.mkdir, "a pipe": os.mkfifo, "a loop": loop,
    "a link to nothing": lambda file: file.symlink_to("nowhere"), "a device": lambda file: file.symlink_to("/dev/null"),
    "empty": b"", "one byte": b"{", "zeros": bytes(500), "noise": bytes(range(256)) * 4, "PK": b"PK\x03\x04" + bytes(range(200)),
    "a pickle": b"\x80\x02}q\x00.", "pickle 5": b"\x80\x05\x95\x10", "not UTF-8": b'{"a": "\xff\xfe"}', "UTF-16": '{"a": 1}'.encode("utf-16"),
    "null": b"null", "a list": b"[1, 2]", "a text": b'"text"', "a number": b"7", "NaN": b"NaN", "an object": b'{"a": {"b": [1]}}',
    "deep": b"[" * 100_000, "deep objects": b'{"a":' * 5_000, "digits": b"7" * 5000, "half a character": b'{"a": "\\ud800"}',
    "another file": b"../other/checkpoint.val-0.04_epoch001.chkpt", "lines": b"MODEL,dockq\n" * 3, "quotes": b'"a\n' * 50, "NUL": b"a,b\n\x00,1\n",
}  # fmt: skip
CUTS = (0.05, 0.3, 0.6, 0.95, 0.999)
VALUES = {
    "null": None, "a list": [1], "a text": "x", "nothing": {}, "a number": -3, "huge": 10**18, "a fraction": 0.5, "true": True, "NaN": math.nan, "nested": {"a": [{}]},
}  # fmt: skip


def places(value: object, depth: int, path: tuple = ()) -> Iterator[tuple]:
    "The keys of nested dictionaries and lists; of a list the first item."
    if path:
        yield path
    if depth and isinstance(value, dict):
        for key in value:
            yield from places(value[key], depth - 1, (*path, key))
    elif depth and isinstance(value, list) and value:
        yield from places(value[0], depth - 1, (*path, 0))


def changed(content: object, path: tuple, value: object) -> object:
    "A copy with another value at one place."
    content = shallow = copy.copy(content)
    for key in path[:-1]:
        shallow[key] = copy.copy(shallow[key])
        shallow = shallow[key]
    shallow[path[-1]] = value
    return content


# --- what is read, and by whom ---


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    "Data, their store, a completed run, a manifest, a stage file: everything that somebody reads."
    root = tmp_path_factory.mktemp("damage")
    data = write_tiny_dataset(root / "data", sidecar=True)
    stage = {"id": "edge/tiny/v1", "alias": "tiny", "jobs": {"a": 1}, "summary": "text"}
    modules = {"edge": stage | {"output_dir": str(data.graph_dir)}, "node": stage, "topology": stage}
    write_json(root / "summary.json", {"modules": modules, "edge": {"output_dir": str(data.graph_dir)}})
    write_json(
        root / "reports" / "sweep.json",
        {"stage": "sweep", "status": "completed", "jobs": [], "seconds": 1.0, "best": None},
    )
    (root / "c.yaml").write_text("trainer: {num_epochs: 2}\n")
    (root / "m.yaml").write_text("shared: {config: c.yaml}\njobs: [{name: a, overrides: {seed: 1}}]\n")
    train(load_config(None, settings_of(root)), run_name="one")
    shutil.copytree(root / "runs" / "one", root / "runs" / "two", symlinks=True)
    write_more(root)
    note = root / "runs" / "two" / "resumed" / "1" / "unfinished.json"
    write_json(note, {"after_epoch": 0, "source": "model_checkpoints/last.chkpt"})
    return root


def write_more(root: Path) -> None:
    "What answers, a build, a pipeline, the original and an interrupted command leave."
    decoys = [f"TINY01/TINY01_{number:02}" for number in range(4)]
    rows = [f"{name},TINY01,0.{number + 1}" for number, name in enumerate(decoys)]
    (root / "scores.csv").write_text("\n".join(["MODEL,target,prediction", *rows]) + "\n")
    (root / "families.csv").write_text("target,family\nTINY01,1\nTINY02,2\n")
    run = RunDirectory(root / "runs" / "one")
    export([run.path], root / "model.safetensors")
    final = {"run_name": "one", "checkpoint": f"one/model_checkpoints/{run.last_checkpoint.name}"}
    write_json(root / "answer" / SUMMARY, {"run_root": root / "runs", "status": "completed", "final": final})
    write_json(root / "answer" / "parameters.json", {"run_root": root / "runs", "jobs": 1})
    write_json(root / "moved" / "history" / ".archiving.json", {"runs": ["one"], "latest": "one"})
    write_original_run(root / "original" / "polish")
    text = write_example(root / "structures" / "pair.pdb").read_bytes()
    (root / "structures" / "pair.pdb.gz").write_bytes(gzip.compress(text, mtime=0))
    with journal_of(root / "built" / "journal.jsonl", Recipe()):
        pass


def settings_of(root: Path) -> dict[str, object]:
    "Of a run that takes a moment."
    data = {"graph": "graph_data", "train_labels": "train.csv", "val_labels": "val.csv"}
    paths = {f"paths.{key}": root / "data" / name for key, name in data.items()}
    paths |= {
        "paths.store": root / "stores",
        "paths.save_dir": root / "runs",
        "paths.summary": root / "summary.json",
    }
    return paths | {"trainer.num_epochs": 1, "model.hidden_dim": 8, "model.attention_head": 2}


def resumable(run: RunDirectory) -> None:
    "What a resume looks at before it changes anything."
    start = find_start(run, read_metadata(run), "last")
    start.is_over(load_config(run.config_file).config)
    check_restorable(start, load_model(start.source)[0], load_config(run.config_file).config)


def said(*words: object) -> int:
    "A command ends with 0, or with 2 and a line: what somebody wrote is refused, and is no failure of a training."
    err = io.StringIO()
    with redirect_stderr(err):
        code = main([str(word) for word in words])
    lines = err.getvalue().splitlines()
    assert code in (0, 2) and "Traceback" not in err.getvalue(), (code, words, lines[-3:])
    assert code == 0 or lines[-1].startswith("topoqa: error: "), lines[-3:]
    return code


def begins(root: Path, *more: object) -> None:
    "A run up to its first epoch, which is left out; one that is refused leaves no directory."
    new = root / "new"
    words = ["run", "--config", root / "c.yaml", "--output-root", new, *more]
    words += [
        f"--override={key}={value}" for key, value in settings_of(root).items() if key != "paths.save_dir"
    ]
    try:
        with patch("topoqa_nb.training.training.fit"), patch("topoqa_nb.training.training.conclude"):
            code = said(*words)
        left = [path.name for path in new.glob("*")] if new.is_dir() else []
    finally:
        shutil.rmtree(new, ignore_errors=True)
    assert code == 0 or not left, left


def goes_on(run: RunDirectory) -> None:
    "A resume up to its first epoch; one that is refused leaves the run as it was."
    kept = run.path.parent / ".kept"
    shutil.copytree(run.path, kept, symlinks=True, copy_function=copied)
    before = listing(run.path)
    try:
        with patch("topoqa_nb.training.resume.fit"), patch("topoqa_nb.training.resume.conclude"):
            code = said(
                "resume", "--run-dir", run.path, "--checkpoint", "last", "--override", "trainer.num_epochs=3"
            )
        after = listing(run.path)
    finally:
        shutil.rmtree(run.path)
        kept.rename(run.path)
    assert code == 0 or after == before, sorted(set(after.items()) ^ set(before.items()))


def claimed(reports: Path) -> None:
    "As a pipeline that goes on compares its parameters."
    parameters = PipelineParameters(jobs=1)
    claim_reports(
        SimpleNamespace(reports_dir=reports, parameters=parameters, data={}, run_root=reports, manifest=None)
    )


def goes_on_building(file: Path) -> None:
    "A build's journal is opened, and begun anew if nothing of it can be believed."
    with journal_of(file, Recipe()) as journal:
        assert journal.recipe == Recipe().to_dict()


def copied(file: str, target: str) -> None:
    "A pipe is none that can be read."
    os.mkfifo(target) if stat.S_ISFIFO(os.lstat(file).st_mode) else shutil.copy2(file, target)


def listing(folder: Path) -> dict[str, object]:
    "What lies in a folder: kind, size and time of each file."
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.lstat().st_mode, path.lstat().st_size) for path in paths}


def readers(root: Path) -> dict[str, tuple[Path, list[Callable[[], object]]]]:
    "Name -> a file, and what reads it."
    data, runs = root / "data" / "graph_data", root / "runs"
    run, rewound, graph = (
        RunDirectory(runs / "one"),
        RunDirectory(runs / "two"),
        sorted(data.rglob("*.pt"))[0],
    )
    store = next((path.parent for path in (root / "stores").glob("*/*/header")), root / "stores" / "none")
    polish, structures = root / "original" / "polish", root / "structures"
    original_rows = next(polish.rglob("metrics.csv"))
    shown = [
        lambda: summarise(run),
        lambda: said("monitor", "--run-dir", run.path),
        lambda: leaderboard(runs),
    ]
    packed = [
        lambda: open_store(data, store_dir=root / "stores"),
        lambda: cache_rows(cached_stores(root / "stores"), verify=True),
    ]
    begin = [lambda: begins(root)]
    go_on = [lambda: goes_on(run)]
    tune = [lambda: begins(root, "--resume-from", run.last_checkpoint)]
    checkpoint = [lambda: load_model(run.last_checkpoint), lambda: resumable(run), *go_on, *tune]
    return {
        "graph": (graph, [lambda: read_graph(graph), *begin]),
        "labels": (root / "data" / "val.csv", [lambda: read_labels(root / "data" / "val.csv"), *begin]),
        "sidecar": (data / "graph_metadata.json", [lambda: read_sidecar(data, ["TINY01/TINY01_00"]), *begin]),
        "summary": (root / "summary.json", [lambda: read_summary(data, root / "summary.json"), *begin]),
        "config": (root / "c.yaml", [lambda: said("config", "--show", root / "c.yaml"), lambda: load_config(root / "c.yaml"), *begin]),
        "manifest": (root / "m.yaml", [lambda: plan_jobs(load_manifest(root / "m.yaml")), lambda: said("batch", "--manifest", root / "m.yaml", "--dry-run")]),
        "checkpoint": (run.last_checkpoint, checkpoint),
        "metadata": (run.metadata_file, [*shown, lambda: said("summarise", "--run-dir", run.path), *go_on]),
        "features": (run.feature_file, shown[:1]),
        "coverage": (run.coverage_file, shown[:1]),
        "metrics": (run.metrics_file, [lambda: read_metrics(run), *shown, *go_on]),
        "run config": (run.config_file, [lambda: resumable(run), *go_on]),
        "rewind": (rewound.path / "resumed" / "1" / "unfinished.json", [lambda: finish_rewinds(rewound), lambda: summarise(rewound)]),
        "stage": (root / "reports" / "sweep.json", [lambda: read_stage(root / "reports", "sweep")]),
        "predictions": (root / "scores.csv", [lambda: read_predictions(root / "scores.csv")]),
        "families": (root / "families.csv", [lambda: read_families(root / "families.csv")]),
        "exported": (root / "model.safetensors", [lambda: load_models([root / "model.safetensors"])]),
        "answer": (root / "answer" / SUMMARY, [lambda: load_models([root / "answer"]), lambda: standing(root / "answer")]),
        "parameters": (root / "answer" / "parameters.json", [lambda: standing(root / "answer"), lambda: claimed(root / "answer")]),
        "archiving": (root / "moved" / "history" / ".archiving.json", [lambda: leaderboard(root / "moved")]),
        "original": (polish / "run_metadata.json", [lambda: summarise(RunDirectory(polish)), lambda: leaderboard(polish.parent)]),
        "original metrics": (original_rows, [lambda: summarise(RunDirectory(polish)), lambda: leaderboard(polish.parent)]),
        "structure": (structures / "pair.pdb", [lambda: read_structure(structures / "pair.pdb")]),
        "packed structure": (structures / "pair.pdb.gz", [lambda: read_structure(structures / "pair.pdb.gz")]),
        "journal": (root / "built" / "journal.jsonl", [lambda: goes_on_building(root / "built" / "journal.jsonl")]),
        "store header": (store / "header", packed),
        "store array": (store / "edges", packed[:1]),
        "store origin": (store.parent / "origin", packed[1:]),
    }  # fmt: skip


TREES = {  # JSON files whose keys are changed one by one, and how deep
    "sidecar": 3, "summary": 3, "metadata": 2, "features": 3, "coverage": 3, "rewind": 2, "stage": 2,
    "answer": 2, "parameters": 1, "archiving": 2, "original": 2,
}  # fmt: skip


def table(root: Path) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    "File, damage, and how it is done."
    for name, (file, _) in readers(root).items():
        for form, change in FORMS.items():
            yield name, form, change if callable(change) else functools.partial(Path.write_bytes, data=change)
        whole = file.read_bytes()
        for cut in CUTS:
            yield (
                name,
                f"cut at {cut}",
                functools.partial(Path.write_bytes, data=whole[: int(len(whole) * cut)]),
            )
        for part in range(8):  # a byte changed
            spoilt = bytearray(whole)
            spoilt[part * len(whole) // 8] ^= 255
            yield name, f"byte {part} of 8", functools.partial(Path.write_bytes, data=bytes(spoilt))
    for name, depth in TREES.items():
        content = json.loads(readers(root)[name][0].read_text())
        first = next(iter(content)) if name == "sidecar" else None
        for path in places(content if first is None else {first: content[first]}, depth):
            for kind, value in VALUES.items():
                text = json.dumps(changed(content, path, value))
                yield (
                    name,
                    f"{'.'.join(map(str, path))} {kind}",
                    functools.partial(Path.write_text, data=text),
                )
    content = torch.load(readers(root)["checkpoint"][0], weights_only=True)
    for path in places(content, 3):
        for kind, value in [
            *VALUES.items(),
            ("stretched", torch.zeros(1).expand(10**5, 10**5)),
            ("meta", torch.empty(3, device="meta")),
        ]:
            yield (
                "checkpoint",
                f"{'.'.join(map(str, path))} {kind}",
                functools.partial(saved, content=content, path=path, value=value),
            )


def saved(file: Path, content: dict, path: tuple, value: object) -> None:
    torch.save(changed(content, path, value), file)


# --- the test ---


class Hang(BaseException):
    "A reader did not come back."


def hang(number: int, frame: object) -> None:
    raise Hang


def outcome(reader: Callable[[], object]) -> str | None:
    "None for a value or a refusal; else what went wrong."
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader()
    except TopoqaError as problem:
        return f"two lines: {problem}" if "\n" in str(problem) else None
    except Hang:
        return "no end"
    except BaseException as problem:
        return f"{type(problem).__name__}: {str(problem)[:150]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def remove(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore")
def test_no_damage_is_a_traceback_or_a_wait(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    before = signal.signal(signal.SIGALRM, hang)
    kept = shutil.copytree(world, tmp_path / "kept", symlinks=True)
    wrong, cases, calls = {}, 0, 0
    try:
        for name, damage, change in list(table(world))[::EVERY]:
            file, reading = readers(world)[name]
            whole = kept / file.relative_to(world)
            remove(file)
            change(file)
            cases += 1
            for number, reader in enumerate(reading):
                calls += 1
                if problem := outcome(reader):
                    wrong[f"{name}, {damage}, reader {number}"] = problem
            out, err = capsys.readouterr()
            if "Traceback" in err:
                wrong[f"{name}, {damage}"] = err[-200:]
            restore(world, kept, file, whole, name)
    finally:
        signal.signal(signal.SIGALRM, before)
    with capsys.disabled():
        print(f"\n{cases} cases, {calls} readings, {len(wrong)} wrong")
    assert not wrong, "\n".join(f"{case}: {problem}" for case, problem in list(wrong.items())[:60])


def restore(world: Path, kept: Path, file: Path, whole: Path, name: str) -> None:
    "Put back what was damaged; a reader that mends, as packing does, has made the rest anew."
    folder = {
        "store header": "stores",
        "store array": "stores",
        "store origin": "stores",
        "rewind": "runs",
    }.get(name)
    if folder:
        shutil.rmtree(world / folder)
        shutil.copytree(kept / folder, world / folder, symlinks=True)
    else:
        remove(file)
        shutil.copy2(whole, file)
