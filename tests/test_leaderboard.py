"""The leaderboard in every state of a run, seeds, archiving; through the functions and the command line."""

import csv
import functools
import json
import subprocess
import sys

import pytest
from rich.console import Console

from topoqa_nb import cli as cli
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import RunError
from topoqa_nb.ground.machine import this_process
from topoqa_nb.runs.leaderboard import by_config, comparable, leaderboard
from topoqa_nb.runs.progress import progress
from topoqa_nb.runs.record import read_metadata, read_record, update_metadata
from topoqa_nb.runs.runs import archive, create_run, find_run, invent_epoch, read_metrics
from topoqa_nb.training.devices import environment


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


def make(root, name, score=None, *overrides, status="completed", source=None, **sections):
    loaded = load_config(source, [f"paths.save_dir={root}", "num_epochs=10", *overrides])
    run = create_run(root, name, loaded, loaded.config, command=["topoqa"])
    for epoch, value in enumerate([] if score is None else [score + 0.1, score]):
        invent_epoch(
            run,
            {
                "epoch": epoch,
                "step": epoch,
                "val_loss": value + 1,
                "val_spearman_corr": 0.5,
                "selection_metric": value,
            },
        )
    done = None if score is None else 1
    update_metadata(
        run, status=status, progress={"epoch": done}, runtime={"epoch_seconds": [30.0, 30.0]}, **sections
    )
    return run


def kill(run):
    "Leave the run as a process leaves it that was killed."
    update_metadata(run, environment={"process": this_process() | {"started": 1.0}})


def topoqa(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def every_state(root):
    make(root, "done", -0.6)
    make(root, "going", -0.5, status="running")
    kill(make(root, "killed", -0.4, status="running"))
    make(root, "stopped", -0.3, status="interrupted", reason="stopped by SIGTERM")
    make(root, "failed", status="failed", reason="TrainingError: epoch 0: expected a finite loss")
    make(root, "by_loss", -0.9, "selection.primary_metric=val_loss")
    make(root, "put_away", -0.55)
    archive(root, ["put_away"])
    make(root, "damaged", -0.7).metadata_file.write_text("{")
    cut = make(root, "cut", -0.7, status="running")
    cut.metrics_file.write_text(cut.metrics_file.read_text()[:-4])


# --- rows


def test_every_state_of_a_run(root):
    every_state(root)
    rows = {row["run_name"]: row for row in leaderboard(root)}
    assert list(rows) == [
        "done",
        "put_away",
        "going",
        "killed",
        "stopped",
        "by_loss",
        "failed",
        "cut",
        "damaged",
    ]
    assert [row["rank"] for row in rows.values()] == [1, 2, 3, 4, 5, 1, None, None, None]
    assert (rows["going"]["process"], rows["going"]["seconds_left"], rows["going"]["epochs_done"]) == (
        "alive",
        240.0,
        2,
    )
    assert rows["killed"]["process"] == "gone" and "seconds_left" not in rows["killed"]
    assert [name for name, row in rows.items() if row["archived"]] == ["put_away"]
    assert "finite loss" in rows["failed"]["reason"]
    assert (rows["cut"]["status"], rows["damaged"]["status"]) == ("unreadable", "unreadable")
    assert "whole last line" in rows["cut"]["reason"]


def test_damaged_metrics_of_a_finished_run_are_named_though_its_progress_is_known(root):
    run = make(root, "done", -0.6)
    run.metrics_file.write_text("damaged")
    row = leaderboard(root)[0]
    assert (row["run_name"], row["status"]) == ("done", "unreadable")
    assert "metrics.csv" in row["reason"]
    assert progress(run, read_record(run)) == {"epochs_done": 2, "epochs": 10}


def test_the_process_survives_the_environment(root):
    run = make(root, "going", status="running")
    update_metadata(run, environment=environment("reference", 1, "cpu"))
    assert read_metadata(run)["environment"]["process"] == this_process()
    assert json.loads(json.dumps(this_process())) == this_process()


def test_looking_at_runs_needs_no_torch():
    code = "import sys, topoqa_nb.runs.runs, topoqa_nb.runs.leaderboard; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_half_written_metrics(root, cut):
    run = make(root, "a", -0.61234)
    run.metrics_file.write_text(run.metrics_file.read_text()[:-cut])
    with pytest.raises(RunError, match="expected a whole last line"):
        read_metrics(run)


def test_a_row_that_lacks_cells(root):
    run = make(root, "a", -0.6)
    lines = run.metrics_file.read_text().splitlines()
    run.metrics_file.write_text("\n".join([*lines[:-1], lines[-1].rpartition(",")[0]]) + "\n")
    with pytest.raises(RunError, match="expected 10 cells in line 3, found 9"):
        read_metrics(run)


# --- seeds


def test_mean_and_sd_over_seeds(root):
    for seed, score in ((222, -0.6), (777, -0.5), (1337, -0.7)):
        make(root, f"a{seed}", score, f"seed={seed}")
    make(root, "b", -0.65, "learning_rate=0.001")
    first, second = by_config(leaderboard(root))
    assert (first["run_name"], first["sd"]) == ("b", None)
    assert second["seeds"] == [222, 777, 1337]
    assert (second["score"], second["sd"]) == (pytest.approx(-0.6), pytest.approx(0.1))
    assert second["run_name"] == "a1337"
    assert json.loads(json.dumps([first, second], allow_nan=False)) == [first, second]


def test_a_repeated_seed_counts_once(root):
    for name, score, seed in (("a", -0.6, 1), ("b", -0.6, 1), ("c", -0.4, 2)):
        make(root, name, score, f"seed={seed}")
    (row,) = by_config(leaderboard(root))
    assert (row["seeds"], row["score"]) == ([1, 2], pytest.approx(-0.5))


def test_the_place_of_the_runs_makes_no_difference(root, tmp_path):
    make(root, "a", -0.6, "seed=1")
    other = make(tmp_path / "other", "b", -0.5, "seed=2")
    other.path.rename(root / "b")
    (row,) = by_config(leaderboard(root))
    assert row["seeds"] == [1, 2]


@pytest.mark.parametrize("section", [{"data": {"fingerprint": "x"}}, {"lineage": {"parent_sha256": "x"}}])
def test_other_data_or_another_parent_is_another_question(root, section):
    make(root, "a", -0.6, "seed=1")
    make(root, "b", -0.5, "seed=2", **section)
    assert sorted(row["seeds"] for row in by_config(leaderboard(root))) == [[1], [2]]


def test_runs_that_have_not_completed_do_not_count(root):
    every_state(root)
    make(root, "other_seed", -0.8, "seed=777", status="running")
    rows = by_config(leaderboard(root))
    assert [(row["metric"], row["seeds"], row["score"]) for row in rows] == [
        ("selection_metric", [222], -0.6),
        ("val_loss", [222], pytest.approx(0.1)),
    ]


def test_configs_are_named_by_their_files(root, tmp_path):
    for seed in (222, 777):
        file = tmp_path / f"sched_boost_seed{seed}.yaml"
        file.write_text(f"dataloader: {{seed: {seed}}}\n")
        make(root, f"a{seed}", -0.6, source=file)
    (row,) = by_config(leaderboard(root))
    assert row["config"] == "sched_boost_seed222.yaml, sched_boost_seed777.yaml"


# --- archive


def test_archived_runs_move_and_stay_found(root):
    for name in ("a", "b", "c"):
        make(root, name, -0.6)
    moved = archive(root, ["a", "c", root / "a", "latest"])
    assert [run.path for run in moved] == [root / "history" / "a", root / "history" / "c"]
    assert (root / "latest").readlink().as_posix() == "history/c"
    assert find_run(root, "latest").name == find_run(root, "c").name == "c"
    assert [row["archived"] for row in leaderboard(root)] == [True, False, True]


def test_latest_that_means_another_run_is_left_alone(root):
    for name in ("a", "b"):
        make(root, name, -0.6)
    archive(root, ["a"])
    assert (root / "latest").readlink().as_posix() == "b"


def test_what_cannot_be_archived(root, tmp_path):
    every_state(root)
    make(tmp_path / "other", "outside", -0.1)
    (root / "history" / "done").mkdir()
    for name, said in {
        "going": "status running, process alive",
        "put_away": "a run that is archived",
        "done": "a run of this name",
        "damaged": "expected valid JSON",
        tmp_path / "other" / "outside": "a run elsewhere",
        "stoped": "did you mean stopped?",
    }.items():
        with pytest.raises(RunError) as problem:
            archive(root, ["stopped", name])
        assert said in str(problem.value)
        assert (root / "stopped").is_dir(), "nothing has moved"
    make(
        root,
        "far",
        status="running",
        environment={"process": {"host": "elsewhere", "pid": 1, "started": 1.0}},
    )
    with pytest.raises(RunError, match="process unknown"):
        archive(root, ["far"])


def test_a_killed_run_can_be_archived(root):
    kill(make(root, "killed", -0.4, status="running"))
    assert archive(root, ["killed"])[0].path == root / "history" / "killed"


def test_a_root_behind_a_link(root, tmp_path):
    make(root, "a", -0.6)
    (tmp_path / "link").symlink_to(root)
    archive(tmp_path / "link", ["latest"])
    assert (root / "history" / "a").is_dir()


# --- command line


def test_json_and_csv_stand_alone(root, capsys):
    every_state(root)
    code, out, err = topoqa(capsys, "leaderboard", "--root", root, "--format", "json", "--limit", 50)
    assert (code, len(json.loads(out))) == (0, 8) and err.startswith(
        "left out, not comparable with these: 1 run"
    )
    everything = ["leaderboard", "--root", root, "--all"]
    code, out, err = topoqa(capsys, *everything, "--format", "csv", "--limit", 50)
    assert (code, err, len(list(csv.DictReader(out.splitlines())))) == (0, "", 9)
    code, out, err = topoqa(capsys, *everything, "--format", "json", "--by-config")
    assert (code, err, len(json.loads(out))) == (0, "", 2)


def test_an_empty_root(root, capsys):
    root.mkdir()
    assert topoqa(capsys, "leaderboard", "--root", root, "--format", "json") == (0, "[]\n", "")
    assert topoqa(capsys, "leaderboard", "--root", root) == (0, "no runs\n", "")
    assert topoqa(capsys, "leaderboard", "--root", root, "--by-config") == (0, "no runs\n", "")


def test_tables(root, capsys):
    every_state(root)
    make(root, "with[red]brackets", -0.1)
    code, out, err = topoqa(capsys, "leaderboard", "--root", root, "--limit", 50, "--all")
    assert (code, err) == (0, "")
    titles = [line.split(";")[0] for line in out.splitlines() if line.startswith(("ranked", "not ranked"))]
    assert titles == [
        "ranked by selection_metric, lower is better",
        "ranked by val_loss, lower is better",
        "not ranked",
    ]
    lines = {line.split()[1]: line for line in out.splitlines() if line[:1].isdigit()}
    assert (
        "running" in lines["going"]
        and "at most 4 min (8 epochs)" in lines["going"]
        and "2 of 10" in lines["going"]
    )
    assert "running, process gone" in lines["killed"]
    assert "completed, archived" in lines["put_away"]
    assert "with[red]brackets" in lines
    assert "finite loss" in out and "run_metadata.json" in out and "\x1b" not in out
    code, out, err = topoqa(capsys, "leaderboard", "--root", root, "--by-config", "--all")
    assert "mean" in out and "ranked by val_loss" in out
    out = topoqa(capsys, "leaderboard", "--root", root)[1]
    assert "ranked by val_loss" not in out and out.splitlines()[-1].endswith(
        "(metric val_loss, not selection_metric); --all shows them"
    )


# --- what may be compared


def test_a_narrow_terminal_breaks_no_name(root, capsys, monkeypatch):
    names = [f"sched_boost_seed222_2026-11-26_03-23-58_phase2_seed{seed}" for seed in (101, 555)]
    make(root, names[0], -0.6, source="sched_boost_finetune_seed101.yaml")
    make(root, names[1], status="failed", reason="no space left on the device that holds the runs")
    for width in (30, 80, 120):
        terminal = functools.partial(Console, width=width, force_terminal=True, color_system=None)
        monkeypatch.setattr("topoqa_nb.ground.console.standard_output", terminal)
        _, out, err = topoqa(capsys, "leaderboard", "--root", root)
        assert all(name in out for name in names) and "no room for" in err
        assert max(map(len, out.splitlines())) <= max(width, len(f"{names[1]}  failed"))
        assert (
            "sched_boost_finetune_seed101.yaml"
            in topoqa(capsys, "leaderboard", "--root", root, "--by-config")[1]
        )


def test_another_rule_or_other_data_win_nothing(root, capsys):
    "A weight of 3 has the lowest score, and a demo run the most runs; neither is what is meant."
    for number in range(2):
        make(root, f"usual{number}", -0.6 - 0.01 * number, data={"validation": "a", "decoys": 150})
    make(root, "heavy", -1.97, "selection.spearman_weight=3", data={"validation": "a", "decoys": 150})
    for number in range(3):
        make(root, f"demo{number}", -0.9, data={"validation": "d", "decoys": 72, "demo": True})
    make(root, "part", -0.99, "limit_val_batches=1", data={"validation": "first", "decoys": 64})
    rows, left_out = comparable(root)
    assert [row["run_name"] for row in rows] == ["usual1", "usual0"]
    assert (
        "5 runs: " in left_out
        and "1 (spearman_weight 3, not 1)" in left_out
        and "validated on 64 decoys" in left_out
    )
    board = leaderboard(root)
    assert [row["rank"] for row in board] == [1, 2, 1, 1, 1, 2, 3]
    assert len({row["group"] for row in board}) == 4
    code, out, err = topoqa(capsys, "leaderboard", "--root", root, "--format", "json", "--by-config")
    assert (code, len(json.loads(out))) == (0, 1) and err.strip() == left_out


def test_a_run_of_an_earlier_version_joins_the_group_of_its_data(root):
    both = {"fingerprint": "all", "validation": "a"}
    make(root, "new", -0.6, data=both)
    make(root, "old", -0.7, data={"fingerprint": "all"})
    make(root, "old_part", -0.8, "limit_val_batches=1", data={"fingerprint": "all"})
    make(root, "other_training_data", -0.5, data={"fingerprint": "more", "validation": "a"})
    rows, left_out = comparable(root)
    assert [row["run_name"] for row in rows] == ["old", "new", "other_training_data"]
    assert "1 run: " in left_out


def test_limit_counts_each_metric(root, capsys):
    every_state(root)
    out = topoqa(capsys, "leaderboard", "--root", root, "--limit", 1, "--format", "json")[1]
    assert [row["run_name"] for row in json.loads(out)] == ["done", "failed", "cut", "damaged"]
    out = topoqa(capsys, "leaderboard", "--root", root, "--limit", 1, "--format", "json", "--all")[1]
    assert [row["run_name"] for row in json.loads(out)] == ["done", "by_loss", "failed", "cut", "damaged"]


def test_archive_command(root, capsys):
    every_state(root)
    code, out, err = topoqa(capsys, "archive", "--root", root, "--run-id", "done", "stopped")
    assert (code, err) == (0, "") and [line.rpartition("/")[2] for line in out.splitlines()] == [
        "done",
        "stopped",
    ]
    for arguments in (["--run-id", "going"], ["--run-id", "done"], []):
        code, out, err = topoqa(capsys, "archive", "--root", root, *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_monitor_command(root, capsys):
    every_state(root)
    code, out, err = topoqa(capsys, "monitor", "--root", root, "--run-id", "going", "--metrics", 1)
    assert (code, err) == (0, "") and "8 epochs" in out and "selection_metric" in out
    out = topoqa(capsys, "monitor", "--root", root, "--run-id", "killed", "--format", "json", "--follow")[1]
    assert json.loads(out)["process"] == "gone"
    for arguments in (
        ["cut"],
        ["damaged"],
        ["dmaged"],
        ["going", "--interval", 0],
        ["going", "--metrics", -1],
    ):
        code, out, err = topoqa(capsys, "monitor", "--root", root, "--run-id", *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_summarise_says_what_is_left(root, capsys):
    every_state(root)
    out = topoqa(capsys, "summarise", "--root", root, "--run-id", "going")[1]
    assert json.loads(out)["progress"]["epochs_left"] == 8 and json.loads(out)["process"] == "alive"


def test_a_run_whose_checkpoints_are_gone_or_whose_metrics_are_cut_is_named(tmp_path):
    from topoqa_nb.ground.config import load_config
    from topoqa_nb.ground.core import CheckpointError, RunError
    from topoqa_nb.runs.leaderboard import summarise
    from topoqa_nb.runs.monitor import snapshot
    from topoqa_nb.runs.record import update_metadata
    from topoqa_nb.runs.runs import create_run, invent_epoch

    loaded = load_config(None, {"paths.save_dir": tmp_path})
    row = {
        "epoch": 0,
        "step": 1,
        "train_loss": 0.1,
        "val_loss": 0.1,
        "val_spearman_corr": 0.5,
        "selection_metric": -0.4,
    }
    runs = {
        name: create_run(tmp_path, name, loaded, loaded.config, command=["x"]) for name in ("gone", "cut")
    }
    for run in runs.values():
        invent_epoch(run, row)
        update_metadata(run, status="completed")
    update_metadata(runs["gone"], checkpoints={"best": "checkpoint.sel--0.40000_val-0.10000_epoch000.chkpt"})
    text = runs["cut"].metrics_file.read_text()
    runs["cut"].metrics_file.write_text(text[:-4])
    for look in (summarise, snapshot):
        with pytest.raises(CheckpointError, match="expected the best checkpoint"):
            look(runs["gone"])
        with pytest.raises(RunError, match="a whole last line"):
            look(runs["cut"])
    rows = {entry["run_name"]: entry for entry in leaderboard(tmp_path)}
    assert (rows["gone"]["checkpoint"], rows["gone"]["reason"]) == (None, "its checkpoints are gone")
    assert rows["cut"]["status"] == "unreadable"


def test_settings_within_the_noise_of_seeds_are_marked(root, capsys):
    for seed, score in ((1, -0.60), (2, -0.62), (3, -0.61)):
        make(root, f"usual_{seed}", score, f"seed={seed}")
        make(root, f"close_{seed}", score + 0.005, f"seed={seed}", "learning_rate=0.004")
        make(root, f"worse_{seed}", score + 0.2, f"seed={seed}", "learning_rate=0.1")
    code, out, err = topoqa(capsys, "leaderboard", "--root", root, "--by-config", "--format", "json")
    assert (code, err) == (0, "")
    assert [row["verdict"] for row in json.loads(out)] == ["best", "not told apart", "worse"]
    code, out, _ = topoqa(capsys, "leaderboard", "--root", root, "--by-config", "--limit", 1)
    assert "scores vary by 0.01000 (sd) by seed alone" in out


def test_fine_tunes_that_kept_their_parent_are_no_seeds(root, capsys):
    make(root, "own", -0.61, "seed=1")
    for seed in (2, 3):
        kept = make(root, f"kept_{seed}", -0.6, f"seed={seed}")
        update_metadata(kept, selection=read_metadata(kept)["selection"] | {"best_epoch": -1})
    code, out, _ = topoqa(capsys, "leaderboard", "--root", root, "--by-config", "--format", "json")
    assert code == 0 and [row["seeds"] for row in json.loads(out)] == [[1]]
    _, out, _ = topoqa(capsys, "leaderboard", "--root", root, "--by-config")
    assert "2 fine-tunes that kept their parent are not counted" in out
    assert "the draw of the validation targets does is not known: " in out


def test_all_runs_are_ranked_by_a_metric_that_none_was_ranked_by(root, capsys):
    make(root, "one", -0.6)
    make(root, "two", -0.5, "selection.primary_metric=val_loss")
    code, out, _ = topoqa(capsys, "leaderboard", "--root", root, "--metric", "val_loss", "--format", "json")
    rows = json.loads(out)
    assert code == 0 and [row["run_name"] for row in rows] == ["one", "two"]
    assert [row["rank"] for row in rows] == [1, 2] and {row["metric"] for row in rows} == {"val_loss"}
    assert topoqa(capsys, "leaderboard", "--root", root, "--metric", "loss")[0] == 2
