"""Ranking, names and links over whole runs."""

import math
import random
from pathlib import Path

import pytest
from conftest import in_turn
from hypothesis import given, settings
from hypothesis import strategies as st

from topoqa_nb.ground.core import CheckpointError, ConfigError, RunError
from topoqa_nb.ground.settings import SelectionConfig
from topoqa_nb.runs.selection import (
    METRICS,
    Candidate,
    best_checkpoint,
    candidate,
    checkpoint_name,
    describe_rule,
    judge,
    kept,
    parse_checkpoint_name,
    rank,
    update_links,
)

values = st.floats(-5, 5, allow_nan=False).map(lambda value: round(value, 5))


def links(directory: Path) -> dict[str, str]:
    "Every link and what it says, unresolved."
    return {path.name: str(path.readlink()) for path in directory.iterdir() if path.is_symlink()}


def save(directory: Path, *items: Candidate) -> None:
    "Stand-in weights that tell their epoch."
    for item in items:
        (directory / item.filename).write_text(str(item.epoch))


# The metric.


def test_the_formula():
    rule = SelectionConfig(spearman_min_delta=0.1, spearman_weight=2.0)
    assert judge(rule, 0.06, 0.6) == pytest.approx(0.06 - 2.0 * 0.5)
    assert judge(rule, 0.06, 0.1) == judge(rule, 0.06, -1.0) == 0.06


def test_switched_off_it_is_the_loss():
    assert judge(SelectionConfig(use_val_spearman=False, spearman_weight=5.0), 0.06, 0.99) == 0.06


def test_an_undefined_correlation_earns_nothing():
    assert judge(SelectionConfig(), 0.06, math.nan) == 0.06


def test_a_loss_that_is_not_finite_stays_visible():
    assert math.isnan(judge(SelectionConfig(), math.nan, 0.5))


def test_the_description_tells_weight_delta_and_state():
    on = describe_rule(SelectionConfig(spearman_weight=0.7, spearman_min_delta=0.05))
    assert "on" in on and "weight 0.7" in on and "min delta 0.05" in on and "selection_metric" in on
    off = describe_rule(SelectionConfig(use_val_spearman=False, primary_metric="val_loss"))
    assert "off" in off and "ranked by val_loss" in off


def test_an_unknown_metric_is_refused():
    with pytest.raises(ConfigError, match="selection.primary_metric.*found val_spearman"):
        rank([], "val_spearman")


# Names.


@in_turn(
    "name, expected",
    [
        ("checkpoint.sel--0.69959_val-0.05479_epoch128.chkpt", (-0.69959, 0.05479, 128)),
        ("checkpoint.sel-0.05000_val-0.05000_epoch000.chkpt", (0.05, 0.05, 0)),
        ("checkpoint.sel--0.65000_val-0.06000_epoch-01.chkpt", (-0.65, 0.06, -1)),
        ("checkpoint.sel--0.65000_val-0.06000_epoch1234.chkpt", (-0.65, 0.06, 1234)),
    ],
)
def test_names_are_written_and_read(name, expected):
    assert checkpoint_name(*expected) == name
    assert parse_checkpoint_name(name) == Candidate(name, *expected)


@given(values, st.floats(0, 5).map(lambda value: round(value, 5)), st.integers(-1, 5000))
def test_a_name_gives_its_numbers_back(selection, loss, epoch):
    found = parse_checkpoint_name(checkpoint_name(selection, loss, epoch))
    assert (found.selection_metric, found.val_loss, found.epoch) == (selection, loss, epoch)


def test_a_value_that_rounds_to_zero_has_no_sign():
    assert checkpoint_name(-1e-7, 0.0, 0) == "checkpoint.sel-0.00000_val-0.00000_epoch000.chkpt"


@in_turn(
    "name",
    ["last.chkpt", "best.ckpt", "model.pt", "", "checkpoint.sel-_val-_epoch.chkpt",
     "checkpoint.sel-nan_val-0.10000_epoch001.chkpt", "checkpoint.sel--0.1_val-0.1_epoch001.chkpt.tmp",
     ".checkpoint.sel--0.65000_val-0.06000_epoch001.chkpt.x8_1.tmp"],
)  # fmt: skip
def test_other_names_are_not_candidates(name):
    assert parse_checkpoint_name(name) is None


def test_older_names_are_read_as_far_as_they_tell():
    assert parse_checkpoint_name("model.sel--0.5_val-0.1_epoch7.chkpt").selection_metric == -0.5
    assert parse_checkpoint_name("model.val-0.06_epoch012.ckpt").selection_metric == 0.06


# The order.


def test_names_sorted_as_text_would_pick_another_one():
    names = [
        checkpoint_name(*item)
        for item in [(-0.1, 0.05, 0), (-0.7, 0.05, 1), (0.02, 0.02, 2), (-0.69, 0.05, 3)]
    ]
    ranked = [item.filename for item in rank(map(parse_checkpoint_name, names))]
    assert ranked == [names[1], names[3], names[0], names[2]]
    assert sorted(names)[0] != ranked[0] and sorted(names, reverse=True)[0] != ranked[0]


def test_ties_go_to_the_lower_loss_then_to_the_earlier_epoch():
    items = [
        candidate(-0.5, 0.09, 0),
        candidate(-0.5, 0.08, 3),
        candidate(-0.5, 0.08, 2),
        candidate(-0.6, 0.2, 9),
    ]
    assert [item.epoch for item in rank(items)] == [9, 2, 3, 0]
    assert [item.epoch for item in rank(items, "val_loss")] == [2, 3, 0, 9]


def test_the_parent_wins_a_tie_with_its_child():
    "A phase that changes nothing returns its parent."
    assert rank([candidate(-0.5, 0.08, 0), candidate(-0.5, 0.08, -1)])[0].epoch == -1


def test_differences_below_the_decimals_of_a_name_count():
    better, worse = candidate(-0.5000002, 0.08, 5), candidate(-0.5000001, 0.08, 4)
    assert rank([worse, better])[0] is better


def test_an_epoch_that_was_run_again_takes_one_place():
    items = [
        candidate(-0.5, 0.08, 1),
        candidate(-0.4, 0.08, 2),
        candidate(-0.5, 0.08, 1),
        candidate(-0.3, 0.08, 3),
    ]
    assert [item.epoch for item in kept(items)[0]] == [1, 2, 3]


@given(st.lists(st.tuples(values, values), max_size=20), st.sampled_from(METRICS))
def test_ranking_does_not_depend_on_the_order_of_arrival(rows, primary):
    items = [candidate(*row, epoch) for epoch, row in enumerate(rows)]
    shuffled = random.Random(0).sample(items, len(items))
    assert rank(items, primary) == rank(shuffled, primary)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(values, values), min_size=1, max_size=20),
    st.sampled_from(METRICS),
    st.integers(1, 4),
)
def test_judging_epoch_by_epoch_is_judging_all_at_once(rows, primary, keep):
    items = [candidate(*row, epoch) for epoch, row in enumerate(rows)]
    so_far = []
    for item in items:
        ranked, other_best = kept([*so_far, item], primary, keep)
        so_far = [*ranked, other_best]
    assert (ranked, other_best) == kept(items, primary, keep)


def test_the_best_by_the_other_metric_is_kept_in_addition():
    items = [candidate(-0.1 * epoch, 0.05 + 0.01 * epoch, epoch) for epoch in range(6)]
    ranked, other_best = kept(items)
    assert [item.epoch for item in ranked] == [5, 4, 3] and other_best.epoch == 0
    ranked, other_best = kept(items, "val_loss")
    assert [item.epoch for item in ranked] == [0, 1, 2] and other_best.epoch == 5


def test_nothing_to_keep():
    assert kept([]) == ([], None)


# Links.


@pytest.mark.parametrize(
    "primary, other_link",
    [("selection_metric", "val_loss_best.ckpt"), ("val_loss", "selection_metric_best.ckpt")],
)
def test_links_are_right_after_every_epoch(tmp_path, primary, other_link):
    generator = random.Random(1)
    so_far, judged = [], []
    for epoch in range(15):
        loss = generator.uniform(0.03, 0.1)
        item = candidate(loss - generator.uniform(0, 0.9), loss, epoch)
        save(tmp_path, item)
        judged.append(item)
        ranked, other_best = kept([*so_far, item], primary)
        update_links(tmp_path, ranked, other_best, primary)
        so_far = [*ranked, other_best]
        for path in tmp_path.glob("*.chkpt"):  # the caller deletes, after the links
            if path.name not in {one.filename for one in so_far}:
                path.unlink()
        in_order = sorted(judged, key=lambda one: getattr(one, primary))
        expected = dict(zip(("best.ckpt", "second_best.ckpt", "third_best.ckpt"), in_order, strict=False))
        expected[other_link] = min(
            judged, key=lambda one: one.val_loss if primary != "val_loss" else one.selection_metric
        )
        assert links(tmp_path) == {link: one.filename for link, one in expected.items()}
        assert {link: (tmp_path / link).read_text() for link in expected} == {
            link: str(one.epoch) for link, one in expected.items()
        }


def test_nothing_is_deleted_but_links(tmp_path):
    items = [candidate(-0.1 * epoch, 0.1, epoch) for epoch in range(6)]
    save(tmp_path, *items)
    (tmp_path / "last.chkpt").write_text("last")
    update_links(tmp_path, *kept(items))
    assert {path.name for path in tmp_path.glob("*.chkpt")} == {
        "last.chkpt",
        *(item.filename for item in items),
    }


def test_links_are_relative_and_survive_a_move(tmp_path):
    folder = tmp_path / "run" / "model_checkpoints"
    folder.mkdir(parents=True)
    items = [candidate(-0.5, 0.1, 0), candidate(-0.4, 0.05, 1)]
    save(folder, *items)
    update_links(folder, *kept(items))
    assert not any(Path(target).is_absolute() for target in links(folder).values())
    moved = (tmp_path / "run").rename(tmp_path / "history") / "model_checkpoints"
    assert (moved / "best.ckpt").read_text() == "0" and (moved / "val_loss_best.ckpt").read_text() == "1"
    assert best_checkpoint(moved) == moved / items[0].filename


def test_stale_links_go(tmp_path):
    items = [candidate(-0.5 + 0.1 * epoch, 0.1, epoch) for epoch in range(3)]
    save(tmp_path, *items)
    update_links(tmp_path, *kept(items), "selection_metric")
    update_links(tmp_path, items[:2], items[0], "val_loss")
    assert set(links(tmp_path)) == {"best.ckpt", "second_best.ckpt", "selection_metric_best.ckpt"}
    update_links(tmp_path, [], None)
    assert links(tmp_path) == {}


def test_a_link_of_a_deleted_file_is_mended(tmp_path):
    old, new = candidate(-0.5, 0.1, 0), candidate(-0.4, 0.1, 1)
    save(tmp_path, old, new)
    update_links(tmp_path, [old])
    (tmp_path / old.filename).unlink()
    update_links(tmp_path, [new])
    assert links(tmp_path) == {"best.ckpt": new.filename}


def test_a_missing_file_changes_no_link(tmp_path):
    there, gone = candidate(-0.5, 0.1, 0), candidate(-0.6, 0.1, 1)
    save(tmp_path, there)
    update_links(tmp_path, [there])
    with pytest.raises(CheckpointError, match="no such file"):
        update_links(tmp_path, [there, gone], gone)
    assert links(tmp_path) == {"best.ckpt": there.filename}


def test_a_real_file_is_never_replaced_by_a_link(tmp_path):
    item = candidate(-0.5, 0.1, 0)
    save(tmp_path, item)
    (tmp_path / "best.ckpt").write_text("somebody's weights")
    with pytest.raises(RunError, match="move it away"):
        update_links(tmp_path, [item])
    assert (tmp_path / "best.ckpt").read_text() == "somebody's weights"


def test_the_best_checkpoint_is_the_file_behind_the_link(tmp_path):
    item = candidate(-0.5, 0.1, 0)
    save(tmp_path, item)
    update_links(tmp_path, [item])
    assert best_checkpoint(tmp_path) == tmp_path / item.filename


def test_no_best_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing"):
        best_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="found nothing"):
        best_checkpoint(tmp_path / "absent")
    (tmp_path / "best.ckpt").symlink_to("gone.chkpt")
    with pytest.raises(CheckpointError, match="gone.chkpt, which is gone"):
        best_checkpoint(tmp_path)
