"""Metrics against SciPy on many random inputs, and the properties that a page shows only once."""

import math

import numpy as np
import pytest
from conftest import in_turn
from scipy.stats import pearsonr, spearmanr

from topoqa_nb.ground.core import DataError
from topoqa_nb.network.metrics import mse, pearson, ranking_loss, regression_metrics, spearman


def random_split(seed):
    "Predictions with ties, labels and targets."
    generator = np.random.default_rng(seed)
    count = int(generator.integers(8, 200))
    prediction = generator.uniform(0, 1, count).round(int(generator.integers(1, 8)))
    targets = [f"T{number}" for number in generator.integers(0, max(2, count // 8), count)]
    return prediction.astype(np.float32), generator.uniform(0, 1, count).astype(np.float32), targets


@in_turn("seed", range(20))
def test_agrees_with_scipy(seed):
    prediction, dockq, _ = random_split(seed)
    exact = prediction.astype(float), dockq.astype(float)
    assert pearson(prediction, dockq) == pytest.approx(pearsonr(*exact).statistic, abs=1e-12)
    assert spearman(prediction, dockq) == pytest.approx(spearmanr(*exact).statistic, abs=1e-12)
    assert mse(prediction, dockq) == pytest.approx(np.mean((exact[0] - exact[1]) ** 2), abs=1e-15)


@in_turn("seed", range(20))
def test_order_of_rows_does_not_matter(seed):
    prediction, dockq, targets = random_split(seed)
    order = np.random.default_rng(1).permutation(len(dockq))
    shuffled = regression_metrics(prediction[order], dockq[order], [targets[position] for position in order])
    assert shuffled == pytest.approx(regression_metrics(prediction, dockq, targets), abs=1e-12, nan_ok=True)


def test_per_target_means_weigh_targets_equally():
    prediction = [0.9, 0.1] + [0.1, 0.2, 0.3, 0.4]
    dockq = [0.2, 0.6] + [0.1, 0.2, 0.3, 0.4]
    found = regression_metrics(prediction, dockq, ["A"] * 2 + ["B"] * 4)
    assert found["val_target_spearman"] == pytest.approx((-1 + 1) / 2)
    assert found["val_ranking_loss"] == pytest.approx((0.4 + 0) / 2)


def test_interleaved_targets_equal_sorted_ones():
    prediction, dockq, targets = (
        np.array([0.1, 0.9, 0.5, 0.2]),
        np.array([0.3, 0.8, 0.1, 0.7]),
        ["A", "B", "A", "B"],
    )
    order = [0, 2, 1, 3]
    ordered = regression_metrics(prediction[order], dockq[order], [targets[position] for position in order])
    assert regression_metrics(prediction, dockq, targets) == pytest.approx(ordered)


def test_lone_and_unknown_decoys_count_in_no_target():
    with_extra = regression_metrics([0.1, 0.2, 0.9, 0.8], [0.1, 0.2, 0.0, 0.5], ["A", "A", "B", None])
    assert with_extra["val_target_spearman"] == pytest.approx(1.0)
    assert with_extra["val_ranking_loss"] == pytest.approx(0.0)


@pytest.mark.filterwarnings("error")
@in_turn("constant", [0.1, 0.0, 1.0, 1e-300])
def test_constant_input_gives_zero_without_warnings(constant):
    varied, same = np.linspace(0, 1, 7), np.full(7, constant)
    for first, second in ((varied, same), (same, varied), (same, same)):
        assert pearson(first, second) == 0.0
        assert spearman(first, second) == 0.0
    found = regression_metrics(same, varied, ["A"] * 7)
    assert found["val_target_spearman"] == 0.0
    assert found["val_ranking_loss"] == pytest.approx(0.5)


@pytest.mark.filterwarnings("error")
def test_values_that_are_not_numbers_stay_visible():
    found = regression_metrics([math.nan, 0.2, 0.3], [0.1, 0.2, 0.3], ["A"] * 3)
    assert all(math.isnan(value) for value in found.values())


@in_turn("seed", range(20))
def test_results_are_python_floats(seed):
    prediction, dockq, targets = random_split(seed)
    assert {type(value) for value in regression_metrics(prediction, dockq, targets).values()} == {float}
    assert type(ranking_loss(prediction, dockq)) is float


@in_turn("prediction, dockq", [([0.1], [0.1, 0.2]), ([], []), ([[0.1], [0.2]], [0.1, 0.2])])
def test_wrong_shapes_are_refused(prediction, dockq):
    with pytest.raises(DataError, match="one value per decoy"):
        regression_metrics(prediction, dockq)
