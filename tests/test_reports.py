"Tables and figures that a page alone does not show: gaps in the data, many runs, many targets."

import dataclasses
import html
import warnings

import numpy as np
import pandas as pd
import pytest

from topoqa_nb.data.batches import load_split
from topoqa_nb.data.schema import resolve_schema
from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.network.baselines import baseline_scores, pooled_features
from topoqa_nb.pipeline.figures import plot_labels, plot_learning_curves, plot_phases, plot_predictions
from topoqa_nb.pipeline.reports import (
    comparison_table,
    dataset_table,
    evaluation_table,
    metrics_table,
    phases_table,
    runs_table,
    schema_table,
    show,
    winner_sentence,
)


def record(name, score, **changes):
    facts = {"stage": "sweep", "run_name": name, "run_dir": name, "status": "completed", "score": score}
    facts |= {"primary_metric": "val_loss", "val_loss": score, "val_spearman": 0.5, "best_epoch": 3}
    facts |= {"seconds": 1.0, "parent_checkpoint": None, "parent_score": None, "improved_on_parent": None}
    return facts | changes


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    tiny = write_tiny_dataset(tmp_path_factory.mktemp("reports") / "data", targets=6, decoys=6)
    store = open_store(tiny.graph_dir)
    return [load_split("train", tiny.train_labels, store), load_split("val", tiny.val_labels, store)]


def test_runs_are_ranked_by_the_metric_they_were_trained_for():
    table = runs_table([record("b", 0.2), record("a", 0.1)])
    assert list(table.run) == ["a", "b"]
    assert "val_loss" in table.columns


def test_failed_runs_stand_last_and_break_nothing():
    failed = record(
        "died", None, status="failed", val_loss=None, val_spearman=None, best_epoch=None, seconds=None
    )
    table = runs_table([failed, record("a", 0.1)])
    assert list(table.run) == ["a", "died"]
    assert winner_sentence([failed]) == "No run has a score."
    assert "only candidate" in winner_sentence([failed, record("a", 0.1)])


def test_a_fine_tune_that_gained_nothing_is_shown_as_such():
    parent = "a/model_checkpoints/best.chkpt"
    facts = {
        "parent_checkpoint": parent,
        "parent_score": 0.1,
        "improved_on_parent": False,
        "trained_score": 0.12,
    }
    kept = record("a_phase1", 0.1000001, **facts)
    table = phases_table([kept])
    assert table.change[0] == 0
    assert table.outcome[0] == "the parent's weights"
    assert table.parent[0] == "a"
    texts = [text.get_text() for text in plot_phases([kept]).axes[0].texts]
    assert texts == ["+0.02000, no epoch beat the parent"]


def test_no_fine_tunes():
    assert phases_table([]).iloc[0, 0] == "none was run"
    plot_phases([])


def test_a_foreign_checkpoint_is_named_by_its_file():
    tuned = record(
        "x_phase1", 0.1, parent_checkpoint="../weights.pt", parent_score=0.2, improved_on_parent=True
    )
    assert phases_table([tuned]).parent[0] == "weights.pt"


@pytest.mark.parametrize("runs", [1, 12])
def test_learning_curves_have_names_and_units(runs):
    curve = pd.DataFrame({"epoch": [0, 1], "val_loss": [0.2, 0.1], "val_spearman_corr": [0.1, 0.2]})
    figure = plot_learning_curves({f"run{number}": curve for number in range(runs)})
    for axis in figure.axes:
        assert axis.get_title() and axis.get_xlabel() and axis.get_ylabel()
        styles = {(line.get_color(), line.get_linestyle()) for line in axis.lines}
        assert len(styles) == runs


def test_up_to_ten_targets_can_be_told_apart_and_more_have_no_legend(splits):
    _, val = splits
    for count, looks_expected, legends in ((10, 10, 1), (11, 1, 0)):
        targets = [f"T{position % count:02d}" for position in range(len(val))]
        figure = plot_predictions(
            val.dockq.numpy(), dataclasses.replace(val, targets=targets), "some targets"
        )
        looks = {
            (points.get_facecolor().tobytes(), points.get_paths()[0].vertices.tobytes())
            for points in figure.axes[0].collections
        }
        assert (len(set(targets)), len(looks), len(figure.legends)) == (count, looks_expected, legends)
    assert figure.axes[0].get_title() == "some targets, 11 targets"


def test_pooled_features_are_means_in_the_order_of_the_split(splits):
    _, val = splits
    features = pooled_features(val)
    for row, position in enumerate(val.index.tolist()):
        graph = val.store.graph(position)
        edges = (
            graph.edge_attr.mean(0)
            if len(graph.edge_attr)
            else graph.edge_attr.new_zeros(val.store.edge_width)
        )
        expected = np.hstack([graph.x.mean(0).numpy(), edges.numpy()])
        np.testing.assert_allclose(features[row], expected, atol=1e-5)


def test_baselines_are_fitted_on_the_training_split_alone(splits):
    train, val = splits
    scores = baseline_scores(train, val)
    assert scores["training mean"] == pytest.approx(np.full(len(val), train.dockq.mean()))
    shuffled = type(val)(
        **{name: getattr(val, name) for name in val.__dataclass_fields__} | {"dockq": val.dockq.flip(0)}
    )
    again = baseline_scores(train, shuffled)
    np.testing.assert_array_equal(scores["ridge on pooled features"], again["ridge on pooled features"])
    assert list(comparison_table(scores, val).model) == list(scores)


def test_data_without_targets_or_builder_summary(splits):
    train, val = splits
    nameless = type(val)(
        **{name: getattr(val, name) for name in val.__dataclass_fields__} | {"targets": [None] * len(val)}
    )
    assert len(dataset_table([train, nameless])) == 2
    plot_labels([train, nameless])
    plot_predictions(val.dockq.numpy(), nameless, "no targets")
    table = schema_table(resolve_schema(val.store.graph_dir, store=val.store))
    assert list(table.stage) == ["interface", "topology", "node", "edge"]
    assert table.features.iloc[3] == f"{val.store.edge_width} per edge"


def test_metrics_of_the_summary_and_of_a_split_have_the_same_names():
    metrics = {
        "loss": 0.1,
        "pearson_corr": 0.5,
        "spearman_corr": 0.4,
        "target_spearman": None,
        "ranking_loss": None,
    }
    with_prefix = {f"val_{name}": value for name, value in metrics.items()}
    pd.testing.assert_frame_equal(metrics_table({"m": metrics}), metrics_table({"m": with_prefix}))
    summary = {
        "final": {"run_name": "m"},
        "test": {"labels": "/x/test.csv", "coverage": {"usable": 3}, "metrics": metrics},
    }
    assert evaluation_table(summary).labels[0] == "test.csv"


# Names as they are written

NAMES = [
    "a$b",
    "$x^$",
    "$\\frac$",
    "100%_#",
    "a\\b",
    "a\\$b",
    "_hidden",
    "_$_$",
    "äöü",
    "a^{b",
    "$",
    "x{}y&z~",
]


def shown(figure):
    "Titles, tick labels and legend of a figure as they are drawn; a warning is an error."
    with warnings.catch_warnings(action="error"):
        figure.canvas.draw()
    texts = [axis.title for axis in figure.axes] + [
        text for axis in figure.axes for text in axis.get_yticklabels()
    ]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    drawn = [text._preprocess_math(text.get_text()) for text in texts]
    assert not any(is_formula for _, is_formula in drawn)
    return [text.removeprefix("\u200b") for text, _ in drawn]


def test_names_of_targets_are_drawn_as_they_are_written(splits):
    half = len(NAMES) // 2
    for names in (NAMES[:half], NAMES[half:]):  # a legend names ten targets at most
        split = dataclasses.replace(splits[0], targets=[names[n % len(names)] for n in range(len(splits[0]))])
        assert set(split.targets) == set(names) and len(names) <= 10
        figure = plot_predictions(np.full(len(split), 0.5), split, "run $x^$ of _$")
        assert set(shown(figure)) >= {*names, "run $x^$ of _$"}


def test_names_of_runs_are_drawn_as_they_are_written():
    curve = pd.DataFrame({"epoch": [0, 1], "val_loss": [0.2, 0.1], "val_spearman_corr": [0.1, 0.2]})
    assert set(shown(plot_learning_curves(dict.fromkeys(NAMES, curve)))) >= set(NAMES)
    fine = {"parent_score": 0.2, "trained_score": 0.1, "improved_on_parent": True}
    assert set(shown(plot_phases([record(name, 0.1, **fine) for name in NAMES]))) >= set(NAMES)


def test_a_browser_shows_the_names_of_a_table_as_they_are_written():
    text = show(pd.DataFrame({"run": NAMES})).data
    assert "mathjax_ignore" in text
    assert all(html.escape(name, quote=False) in text.replace("<wbr>", "") for name in NAMES)
