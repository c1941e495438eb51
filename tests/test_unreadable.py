"One run that cannot be read is a line of the leaderboard, and an error of one line everywhere else."

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from topoqa_nb.cli import main
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import write_json
from topoqa_nb.runs.record import read_metadata, update_metadata
from topoqa_nb.runs.runs import METRIC_COLUMNS, create_run, invent_epoch

SCALARS = {
    "a list": [],
    "a text": "x",
    "a number": 3,
    "a truth": True,
    "full": ["a"],
    "a mapping": {"a": "b"},
}
SECTIONS = [
    "environment",
    "data",
    "training_parameters",
    "selection",
    "checkpoints",
    "lineage",
    "runtime",
    "progress",
]
LEAVES = {
    **{
        f"selection.{key}": "number"
        for key in ("best_score", "best_epoch", "best_val_loss", "best_val_spearman")
    },
    **{"selection.primary_metric": "metric", "checkpoints.best": "text", "lineage.parent_checkpoint": "text"},
    **{"runtime.seconds": "number", "progress.epoch": "number", "progress.epochs": "number"},
    **{"runtime.epoch_seconds": "numbers", "checkpoints.ranked": "texts", "lineage.mode": "text"},
    **{"training_parameters.early_stopping": "section", "training_parameters.dataloader": "section"},
}
RIGHT = {"number": ["a number"], "text": ["a text"], "numbers": ["a list"], "metric": []}
RIGHT |= {"texts": ["a list", "full"], "section": ["a mapping"]}


def make_run(root: Path, name: str, loss: float = 0.1) -> Path:
    loaded = load_config(None, [f"paths.save_dir={root}"])
    run = create_run(root, name, loaded, loaded.config, command=["topoqa", "run"])
    invent_epoch(run, dict.fromkeys(METRIC_COLUMNS, 0) | {"val_loss": loss, "selection_metric": loss})
    update_metadata(run, status="completed", progress={"epoch": 0}, runtime={"seconds": 1.0})
    return run.path


def as_directory(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


FILES: dict[str, bytes | Callable[[Path], None]] = {
    "empty": b"", "cut": b'{"status": "comp', "not UTF-8": b'{"status": "\xff"}', "a list": b"[1]", "null": b"null",
    "a text": b'"x"', "deep": b"[" * 100_000, "a long number": b"7" * 5000,
    "endless": b'{"status": "completed", "selection": {"best_score": Infinity}}', "huge": lambda file: os.truncate(file, 65_000_000),
    "a directory": as_directory, "a loop": loop, "a pipe": fifo,
    "metrics a directory": lambda file: as_directory(file.parent / "metrics" / "metrics.csv"),
    "metrics not UTF-8": lambda file: (file.parent / "metrics" / "metrics.csv").write_bytes(b"\xff\n"),
}  # fmt: skip


def says_one_line(capsys: pytest.CaptureFixture, *arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 2, arguments
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("topoqa: error: ") and err.count("\n") == 1, err


def check_unreadable(root: Path, capsys: pytest.CaptureFixture, metrics_only: bool = False) -> None:
    "The run `bad` of a root beside one that is `good`."
    assert main(["leaderboard", "--root", str(root), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    good, bad = json.loads(out)
    assert err == ""
    assert (good["run_name"], good["rank"], good["status"]) == ("good", 1, "completed")
    assert (bad["run_name"], bad["rank"], bad["status"]) == ("bad", None, "unreadable")
    assert ": expected " in bad["reason"] and "\n" not in bad["reason"] and len(bad["reason"]) < 1000
    for options in ([], ["--by-config"], ["--format", "csv"]):
        assert main(["leaderboard", "--root", str(root), *options]) == 0
        assert "good" in capsys.readouterr().out
    says_one_line(capsys, "summarise", "--run-dir", root / "bad")
    says_one_line(capsys, "monitor", "--run-dir", root / "bad")
    if not metrics_only:
        says_one_line(capsys, "archive", "--root", root, "--run-id", "bad")
        assert (root / "bad").is_dir()


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    make_run(tmp_path, "good")
    file, change = make_run(tmp_path, "bad") / "run_metadata.json", FILES[damage]
    change(file) if callable(change) else file.write_bytes(change)
    check_unreadable(tmp_path, capsys, metrics_only=damage.startswith("metrics"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", ["run_metadata.json", "metrics/metrics.csv", "."])
def test_what_may_not_be_read(place: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    make_run(tmp_path, "good")
    closed = make_run(tmp_path, "bad") / place
    closed.chmod(0)
    try:
        check_unreadable(tmp_path, capsys, metrics_only=place.startswith("metrics"))
    finally:
        closed.chmod(0o700)


@pytest.mark.parametrize("going", [False, True])
def test_wrong_types(going: bool, tmp_path: Path, capsys: pytest.CaptureFixture):
    make_run(tmp_path, "good")
    whole = read_metadata(make_run(tmp_path, "whole"))
    if going:
        whole |= {"status": "running", "environment": {"process": {"host": "elsewhere"}}}
    shutil.move(tmp_path / "whole", tmp_path / "bad")
    cases = [(key, kind) for key in [*SECTIONS, *LEAVES] for kind in SCALARS]
    for key, kind in cases:
        section, _, leaf = key.partition(".")
        if kind in (RIGHT[LEAVES[key]] if leaf else ["a mapping"]):
            continue
        value = whole[section] | {leaf: SCALARS[kind]} if leaf else SCALARS[kind]
        write_json(tmp_path / "bad" / "run_metadata.json", whole | {section: value})
        check_unreadable(tmp_path, capsys)


def test_empty_sections_and_what_nobody_computes_with_are_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = make_run(tmp_path, "good")
    whole = read_metadata(run)
    for change in (dict.fromkeys(SECTIONS), {"notes": [1], "mlflow": 3, "overrides": "x", "command": ["a"]}):
        write_json(run / "run_metadata.json", whole | change)
        for command in ("summarise", "monitor"):
            assert main([command, "--run-dir", str(run)]) == 0
        assert main(["leaderboard", "--root", str(tmp_path)]) == 0
        assert "unreadable" not in capsys.readouterr().out


def test_features_that_are_no_mapping(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = make_run(tmp_path, "good")
    (run / "feature_metadata.json").write_text("[1]")
    says_one_line(capsys, "summarise", "--run-dir", run)
