"Evaluation, comparison, splits: values against plain loops, the coverage of intervals, bad input on the command line."

import functools
import inspect
import math
import shutil
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from topoqa_nb.answers.bootstrap import coverage, resampled_measures
from topoqa_nb.answers.evaluation import evaluate
from topoqa_nb.answers.measures import maxima, measures, target_table
from topoqa_nb.answers.scored import scored_decoys, simulated_decoys
from topoqa_nb.cli import main
from topoqa_nb.runs.selection import best_checkpoint
from topoqa_nb.sweep.jobs import JobResult, SweepResult
from topoqa_nb.sweep.sweep import run_jobs
from topoqa_nb.training.training import train


@pytest.fixture(scope="module")
def decoys() -> pd.DataFrame:
    "With ties, a target of one decoy, one of equal labels, one of equal predictions, and families."
    table = simulated_decoys(9, 12, seed=4).round({"prediction": 2, "dockq": 2}).iloc[11:]
    table.loc[table.target == "T002", "dockq"] = 0.5
    table.loc[table.target == "T003", "prediction"] = 0.5
    families = {target: target if target < "T005" else "last" for target in table.target}
    return scored_decoys(table, families=families).table


def pearson_by_hand(x, y, weights=None):
    weights = weights or [1] * len(x)
    mean_x = sum(w * a for w, a in zip(weights, x, strict=True)) / sum(weights)
    mean_y = sum(w * b for w, b in zip(weights, y, strict=True)) / sum(weights)
    covariance = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True))
    x_part = sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    y_part = sum(w * (b - mean_y) ** 2 for w, b in zip(weights, y, strict=True))
    if len(set(y)) < 2:
        return math.nan
    return covariance / math.sqrt(x_part * y_part) if len(set(x)) > 1 else 0.0


def ranks_by_hand(values):
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


def kendall_by_hand(x, y):
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    in_x, in_y = sum(a != 0 for a, _ in signs), sum(b != 0 for _, b in signs)
    if not in_y:
        return math.nan
    return sum(a * b for a, b in signs) / math.sqrt(in_x * in_y) if in_x else 0.0


def rows_of(decoys):
    return [
        (part.prediction.tolist(), part.dockq.tolist())
        for _, part in decoys.groupby("target")
        if len(part) > 1
    ]


def mean_known(values):
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


def test_order_and_errors_equal_plain_loops(decoys):
    found, x, y = measures(decoys), decoys.prediction.tolist(), decoys.dockq.tolist()
    size = decoys.family.map(decoys.family.value_counts()).tolist()
    expected = {
        "pearson": pearson_by_hand(x, y),
        "spearman": pearson_by_hand(ranks_by_hand(x), ranks_by_hand(y)),
        "kendall": kendall_by_hand(x, y),
        "mse": sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x),
        "mae": sum(abs(a - b) for a, b in zip(x, y, strict=True)) / len(x),
        "family_pearson": pearson_by_hand(x, y, [1 / count for count in size]),
        "target_pearson": mean_known(pearson_by_hand(*row) for row in rows_of(decoys)),
        "target_spearman": mean_known(pearson_by_hand(*map(ranks_by_hand, row)) for row in rows_of(decoys)),
        "target_kendall": mean_known(kendall_by_hand(*row) for row in rows_of(decoys)),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert found["rmse"] == pytest.approx(math.sqrt(expected["mse"]))


def test_ranking_loss_and_first_places_equal_plain_loops(decoys):
    table = decoys.assign(prediction=decoys.prediction + 1e-6 * np.arange(len(decoys)))  # no ties here
    found, rows = measures(table), rows_of(table)
    losses, success, enrichment, most = [], [], [], []
    for x, y in rows:
        order = sorted(range(len(x)), key=lambda place: -x[place])
        good = [value >= 0.49 for value in y]
        losses.append(max(y) - y[order[0]])
        success.append(any(good[place] for place in order[:5]))
        most.append(any(good))
        if any(good):
            enrichment.append(sum(good[place] for place in order[:5]) / 5 / (sum(good) / len(good)))
    assert found["ranking_loss"] == pytest.approx(np.mean(losses))
    assert found["success_top5_0.49"] == pytest.approx(np.mean(success))
    assert found["enrichment_top5_0.49"] == pytest.approx(np.mean(enrichment))
    assert maxima(target_table(table))["success_top5_0.49"] == pytest.approx(np.mean(most))


def test_classification_and_calibration_equal_plain_loops(decoys):
    found, x, y = measures(decoys), decoys.prediction.tolist(), decoys.dockq.tolist()
    good = [value >= 0.49 for value in y]
    pairs = [
        (a > b) + (a == b) / 2
        for a, hit in zip(x, good, strict=True)
        if hit
        for b, no in zip(x, good, strict=True)
        if not no
    ]
    assert found["auroc_0.49"] == pytest.approx(np.mean(pairs))
    precisions = [
        sum(hit for b, hit in zip(x, good, strict=True) if b >= a) / sum(b >= a for b in x)
        for a, is_hit in zip(x, good, strict=True)
        if is_hit
    ]
    assert found["average_precision_0.49"] == pytest.approx(np.mean(precisions))
    bins = [int((rank - 0.5) * 10 / len(x)) for rank in ranks_by_hand(x)]
    sums = [sum(b - a for a, b, k in zip(x, y, bins, strict=True) if k == number) for number in range(10)]
    assert found["calibration_error"] == pytest.approx(sum(map(abs, sums)) / len(x))


def test_a_resample_of_everything_once_is_the_set_itself(decoys):
    once = resampled_measures(decoys, np.ones((1, decoys.family.nunique()), int))
    expected = measures(decoys)
    assert {name: values[0] for name, values in once.items()} == pytest.approx(
        expected, abs=1e-9, nan_ok=True
    )


def test_a_constant_prediction_has_no_order_and_a_loss():
    table = simulated_decoys(4, 6).assign(prediction=0.1)
    found = evaluate(table, bootstrap=50).values
    assert [found[name] for name in ("pearson", "spearman", "kendall", "auroc_0.49")] == [0, 0, 0, 0.5]
    losses = [max(y) - sum(y) / len(y) for _, y in rows_of(table)]
    assert found["ranking_loss"] == pytest.approx(np.mean(losses))


def test_nominal_95_percent_intervals_contain_the_truth_as_often():
    share = coverage(
        0.7, lambda seed: simulated_decoys(25, 10, correlation=0.7, seed=seed), repeats=300, resamples=400
    )
    assert 0.91 <= share <= 0.98


# --- the command line


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "Predictions of two models, in the working directory."
    monkeypatch.chdir(tmp_path)
    table = simulated_decoys(4, 5)
    table.to_csv("a.csv", index=False)
    table.head(5).to_csv("one_target.csv", index=False)
    table.assign(prediction=math.nan).to_csv("nan.csv", index=False)
    pd.concat([table, table.head(1)]).to_csv("twice.csv", index=False)
    flat = table.assign(MODEL=table.MODEL.str.replace("/", "-")).drop(columns="target")
    flat.to_csv("no_target.csv", index=False)
    table.to_csv("b.csv", index=False)
    Path("bad.json").write_text("{")
    Path("families.csv").write_text("target,family\nT000,a\n")
    Path("other.csv").write_text("MODEL,dockq\nx,0.5\n")
    Path("there").mkdir()
    return tmp_path


REFUSED = {
    "evaluate --predictions a.csv --labels other.csv": "other.csv: expected labels of graphs",
    "evaluate --predictions twice.csv": "more than once",
    "evaluate --predictions nan.csv": "expected finite numbers",
    "evaluate --predictions no_target.csv": "targets of the decoys: expected one for each",
    "evaluate --predictions no_target.csv --target-regex ^x": "20 of 20 without one",
    "evaluate --predictions one_target.csv": "two targets (or families) at least, found 1",
    "evaluate --predictions a.csv --families families.csv": "none for T001",
    "evaluate --predictions a.csv --out there": "add --overwrite",
    "evaluate --predictions a.csv --out a.csv --overwrite": "an earlier answer and nothing else",
    "evaluate --predictions a.csv --out a.csv/new": "a.csv, which is a file",
    "evaluate --predictions a.csv --families absent.csv": "absent.csv: expected a CSV file",
    "evaluate --predictions bad.json": "JSON",
    "evaluate --predictions gone.parquet": "found no such file",
    "evaluate --predictions a.xlsx": "found .xlsx",
    "evaluate": "expected one of them, found neither",
    "evaluate --predictions a.csv --model a.csv": "expected one of them, found both",
    "evaluate --model a.csv --labels other.csv": "found no graph_dir",
    "compare --predictions a.csv b.csv --out a.csv/new": "a.csv, which is a file",
    "compare --predictions a.csv": "two predictions or more, found 1",
    "compare --predictions a.csv nan.csv": "expected finite numbers",
}


def test_bad_input_is_one_line_and_writes_nothing(files, capsys):
    before = {path: path.stat().st_size for path in files.rglob("*")}
    for line, said in REFUSED.items():
        out = [] if "--out" in line else ["--out", "new"]
        assert main([*line.split(), *out]) == 2, line
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1), line
        assert captured.err.startswith("topoqa: error: ") and said in captured.err, (line, captured.err)
    assert {path: path.stat().st_size for path in files.rglob("*")} == before


def test_a_model_is_compared_with_an_ensemble(files, capsys):
    table = pd.read_csv("a.csv")
    table.assign(spread=0.1, prediction_1=0.5, prediction_2=0.5).to_csv("both.csv", index=False)
    for pair in ("a.csv both.csv", "both.csv a.csv"):
        line = f"compare --predictions {pair} --bootstrap 20 --out new --overwrite"
        assert main(line.split()) == 0
        assert "not told apart" in capsys.readouterr().out
        assert Path("new/comparison.html").is_file()


def test_folds_of_the_command_line(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--graph-dir", demo.graph_dir, "--labels", demo.train_labels, "--labels", demo.val_labels]
    assert main(["split", *map(str, data), "--folds", "4", "--out", "new"]) == 2
    assert "4 parts of 3" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(["split", *map(str, data), "--folds", "3", "--out", "new"]) == 0
    parts = [pd.read_csv(file) for file in sorted(Path("new").glob("fold_*.csv"))]
    assert [part.MODEL.str[:6].nunique() for part in parts] == [1, 1, 1]
    assert len(pd.concat(parts).MODEL.unique()) == 12


def train_here(planned, **options) -> SweepResult:
    "As `run_jobs`, without a process for each job."
    inspect.signature(run_jobs).bind(planned, **options)
    results = []
    for job in planned:
        run = train(job.loaded, run_name=job.run.name, output_root=job.run.path.parent)
        checkpoint = best_checkpoint(run.checkpoints)
        results.append(JobResult(job.name, run.path, "completed", checkpoint=checkpoint))
    return SweepResult(tuple(results))


def test_cross_validation_trains_a_run_for_each_fold(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("topoqa_nb.sweep.sweep.run_jobs", train_here)
    small = ["paths.graph=" + str(demo.graph_dir), "trainer.fast_dev_run=true", "model.hidden_dim=8"]
    overrides = [part for value in small for part in ("--override", value)]
    line = ["cross-validate", "--config", "config.yaml", "--folds", "3", "--out", "cv", "--bootstrap", "50"]
    assert main([*line, *overrides, "--output-root", "runs"]) == 0
    table = pd.read_csv("cv/config/predictions.csv")
    assert (len(table), sorted(table.fold.unique())) == (12, [1, 2, 3])
    assert table.groupby("target").fold.nunique().eq(1).all()
    assert Path("cv/config/evaluation/evaluation.html").is_file()
    assert len(list(Path("runs").glob("config_fold*"))) == 3
    for fold, rows in table.groupby("fold"):  # the run of a fold has trained on none of it
        trained = pd.read_csv(f"cv/config/fold{fold}_train.csv").MODEL
        assert not {*rows.target} & {*trained.str.split("/").str[0]}


def test_a_narrow_terminal_breaks_no_name_and_is_told_what_it_lacks(files, capsys, monkeypatch):
    names = ["the_model_that_was_trained_longest", "the_model_that_nobody_has_ever_trained"]
    for name in names:
        shutil.copy("a.csv", f"{name}.csv")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for width in (40, 80, 120):
        terminal = functools.partial(Console, width=width, force_terminal=True, color_system=None)
        for module in ("topoqa_nb.ground.console", "topoqa_nb.evaluation_commands"):
            monkeypatch.setattr(f"{module}.standard_output", terminal)
        for command in (
            "evaluate --predictions a.csv",
            f"compare --predictions {names[0]}.csv {names[1]}.csv",
        ):
            assert main(f"{command} --bootstrap 20".split()) == 0
            said = capsys.readouterr()
            table = said.out.split("\n\n")[1]
            widest = max(len(line.rstrip()) for line in table.splitlines())
            assert widest <= max(width, 42) and ("no room for" in said.err) == (width == 40), (command, width)
            if "compare" in command and width > 40:
                assert all(name in table for name in names)
