"""The synthetic sets: equal seeds, equal sets; whole or absent; shaped like a real build; something to learn."""

import errno
import json
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation
from scipy.stats import spearmanr

from topoqa_nb.build.complexes import make_complex, make_decoys, move_ligand
from topoqa_nb.build.dockq import Native, dockq
from topoqa_nb.build.example import write_example
from topoqa_nb.build.interface import node_columns
from topoqa_nb.build.recipe import Recipe, build_graph
from topoqa_nb.data import demo as demo_module
from topoqa_nb.data.demo import ensure_demo, write_demo
from topoqa_nb.data.graphs import list_graphs, read_graph
from topoqa_nb.data.schema import resolve_schema
from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import tiny_graphs, write_tiny_dataset
from topoqa_nb.ground.core import DataError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("small") / "demo_data", targets=2, decoys=3)


def read_labels(paths):
    table = pd.concat([pd.read_csv(paths.train_labels), pd.read_csv(paths.val_labels)], ignore_index=True)
    return table.assign(target=table.MODEL.str.split("_").str[0])


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Shapes


def test_shapes(demo_set):
    labels = read_labels(demo_set)
    assert len(labels) == 288
    assert labels.groupby("target").size().unique().tolist() == [12]
    assert labels.dockq.between(0, 1).all()
    by_target = labels.groupby("target").dockq
    assert by_target.std().min() > 0.2, "a target with (nearly) constant labels"
    assert by_target.max().min() > 0.8, "a target without a near-native decoy"
    assert by_target.min().max() < 0.23, "a target without a far decoy"
    assert labels.dockq.between(0.23, 0.8).mean() > 0.25, "hardly any decoy of medium quality"


def test_every_label_has_its_graph_and_targets_are_split(demo_set):
    names = {name.split("/")[1] for name in list_graphs(demo_set.graph_dir)}
    assert set(read_labels(demo_set).MODEL) == names
    sides = [set(pd.read_csv(path).MODEL.str[:6]) for path in (demo_set.train_labels, demo_set.val_labels)]
    assert [len(side) for side in sides] == [18, 6]
    assert not sides[0] & sides[1]


def test_place_in_the_target_does_not_tell_the_label(demo_set):
    labels = read_labels(demo_set)
    place = labels.MODEL.str[-2:].astype(int)
    assert abs(spearmanr(place, labels.dockq).statistic) < 0.3  # 1 if decoys were sorted


def test_graphs_look_like_a_real_build(demo_set):
    store = open_store(demo_set.graph_dir)
    assert 25 < store.node_counts.float().median() < 50
    assert 80 < store.edge_counts.float().median() < 170
    assert store.edge_counts.min() > 0
    batch = store.batch(range(len(store)))
    assert batch.x.min() >= 0 and batch.x.max() <= 1
    assert batch.edge_attr.min() >= 0 and batch.edge_attr.max() <= 1
    columns, constant = node_columns(), batch.x.std(dim=0) == 0
    rare = {"SS8_1", "SS8_2", "SS8_3", "SS8_4", "SS8_6", "AA_20"}  # nothing but helices, no unknown residue
    assert {columns[place] for place in constant.nonzero().flatten()} <= rare
    assert (batch.edge_attr.std(dim=0) > 0).all()


def test_columns_are_those_of_the_real_graphs(demo_set, shared_dir):
    content = json.loads((shared_dir / "data" / "graphs" / "graph_metadata.json").read_text())
    entry = next(value for key, value in content.items() if key != "_builder")
    assert entry["node_feature_columns"] == node_columns()
    real = read_graph(next((shared_dir / "data" / "graphs").rglob("*.pt")))
    ours = read_graph(demo_set.graph_dir / "DEMO01" / "DEMO01_00.pt")
    assert (ours.x.shape[1], ours.edge_attr.shape[1]) == (real.x.shape[1], real.edge_attr.shape[1])


def test_graphs_and_labels_are_those_of_the_structures(small):
    "The set holds what `topoqa build` and `topoqa dockq` say about its files."
    labels = read_labels(small)
    for model, target, said in labels[["MODEL", "target", "dockq"]].itertuples(index=False):
        path = small.root / "structures" / target / f"{model}.pdb"
        ours, theirs = build_graph(path, Recipe()), read_graph(small.graph_dir / target / f"{model}.pt")
        assert all(
            np.array_equal(getattr(ours, key), theirs[key]) for key in ("x", "edge_index", "edge_attr")
        )
        native = Native(small.root / "natives" / f"{target}.pdb")
        assert dockq(path, native).total.dockq == pytest.approx(said, abs=1e-6)


# Sidecar and summary


def test_sidecar_and_summary_are_understood_without_a_note(demo_set):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schema = resolve_schema(demo_set.graph_dir)
    assert schema.notes == []
    assert {stage: entry["id"] for stage, entry in schema.module_registry.items()} == {
        "interface": "interface/polar_cutoff/v1",
        "topology": "topology/persistence_basic/v1",
        "node": "node/dssp_topo_merge/v1",
        "edge": "edge/legacy_band/v11",
    }
    assert schema.node_schema.columns == node_columns()
    assert schema.builder["id"] == "topoqa_nb.build"


def test_a_moved_set_still_finds_its_summary(demo_set, tmp_path):
    moved = tmp_path / "elsewhere" / "data"
    shutil.copytree(demo_set.root, moved)
    schema = resolve_schema(moved / "graph_data")
    assert schema.summary_path.is_relative_to(moved)


def test_no_machine_path_is_written(demo_set):
    for path in (
        path for path in demo_set.root.rglob("*") if path.suffix in {".json", ".txt", ".csv", ".yaml"}
    ):
        assert str(demo_set.root.parent) not in path.read_text(), path.name


def test_the_set_says_that_it_is_synthetic(demo_set):
    assert (demo_set.root / "README.txt").read_text().startswith("SYNTHETIC")


# Determinism


def test_equal_seeds_give_equal_sets_and_other_seeds_others(small, tmp_path):
    again, other = (
        write_demo(tmp_path / name, targets=2, decoys=3, seed=seed) for name, seed in (("b", 1), ("c", 6))
    )
    assert files(small.root) == files(again.root)
    for name in files(small.root):
        same = (small.root / name).read_bytes() == (again.root / name).read_bytes()
        assert same or name.startswith("logs/"), name  # a summary says how long the build took
    assert small.train_labels.read_bytes() != other.train_labels.read_bytes()


def test_more_targets_leave_the_first_ones_as_they_are(small, demo_set):
    name = "natives/DEMO02.pdb"
    assert (small.root / name).read_bytes() == (demo_set.root / name).read_bytes()


def test_the_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    write_demo(tmp_path / "demo", targets=2, decoys=2)
    write_tiny_dataset(tmp_path / "tiny")
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])


# Geometry


def test_decoys_are_rigid_and_settled():
    native = make_complex(np.random.default_rng(7))
    for decoy in make_decoys(np.random.default_rng(1), native, 12):
        assert np.array_equal(decoy.receptor, native.receptor)
        inside = [cdist(pose.ligand, pose.ligand) for pose in (decoy, native)]
        assert np.allclose(*inside, rtol=0, atol=1e-9)
        between = cdist(decoy.receptor, decoy.ligand)
        assert (between < 10).sum() >= 16 and (between < 4).sum() <= 3


def test_a_shift_is_the_ligand_rmsd(tmp_path):
    native = make_complex(np.random.default_rng(7))
    shifted = move_ligand(native, Rotation.identity(), np.array([3.0, 4.0, 0.0]), np.zeros(3))
    true = Native(write_example(tmp_path / "native.pdb", native.structure()))
    score = dockq(write_example(tmp_path / "shifted.pdb", shifted.structure()), true).total
    assert score.lrmsd == pytest.approx(5, abs=1e-3)


def test_every_complex_has_an_interface():
    for seed in range(20):
        native = make_complex(np.random.default_rng(seed))
        assert (
            cdist(
                native.atoms[~native.is_ligand].reshape(-1, 3), native.atoms[native.is_ligand].reshape(-1, 3)
            ).min()
            > 3
        )
        assert min(len(native.receptor), len(native.ligand)) > 25


# Whole or absent


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "write_labels", interrupt)
    monkeypatch.setattr(demo_module, "_fill", lambda *_: {})
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", targets=2, decoys=2)
    assert list(tmp_path.iterdir()) == []


def test_ensure_demo_writes_once(tmp_path, monkeypatch):
    first = write_demo(tmp_path / "demo", targets=2, decoys=2)
    monkeypatch.setattr(demo_module, "write_demo", lambda *_: pytest.fail("written twice"))
    assert ensure_demo(tmp_path / "demo") == first


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "demo").mkdir()
    assert write_demo(tmp_path / "demo", targets=2, decoys=2).train_labels.is_file()


@pytest.mark.parametrize(
    "victim", ["train.csv", "val.csv", "graph_data/graph_metadata.json", "graph_data/DEMO24/DEMO24_11.pt"]
)
def test_a_damaged_set_is_named_and_left_alone(demo_set, tmp_path, victim):
    shutil.copytree(demo_set.root, tmp_path / "demo")
    (tmp_path / "demo" / victim).unlink()
    before = files(tmp_path / "demo")
    with pytest.raises(DataError, match=f"found a set without {victim}; remove it"):
        ensure_demo(tmp_path / "demo")
    assert files(tmp_path / "demo") == before


@pytest.mark.parametrize("write", [ensure_demo, write_demo, write_tiny_dataset])
def test_somebody_elses_folder_is_refused(tmp_path, write):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "README.txt").write_text("my thesis")
    with pytest.raises(DataError):
        write(tmp_path / "work")
    assert files(tmp_path) == ["work/README.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "demo").write_text("a file")
    for write in (ensure_demo, write_demo, write_tiny_dataset):
        with pytest.raises(DataError):
            write(tmp_path / "demo")


def test_the_slower_of_two_processes_takes_the_set_of_the_faster(demo_set, tmp_path, monkeypatch):
    def lose_the_race(root):
        shutil.copytree(demo_set.root, root)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(demo_module, "write_demo", lose_the_race)
    assert ensure_demo(tmp_path / "demo").val_labels.is_file()


def test_a_set_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OSError), demo_module.new_set(tmp_path / "demo") as temporary:
        (temporary / "train.csv").write_text("slower")
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "train.csv").write_text("faster")
    assert files(tmp_path) == ["demo/train.csv"]
    assert (tmp_path / "demo" / "train.csv").read_text() == "faster"


def test_a_full_disk_is_not_hidden(tmp_path, monkeypatch):
    def fill_the_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo_module, "_fill", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        ensure_demo(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("targets", "decoys"), [(1, 4), (4, 1), (0, 0)])
def test_a_set_that_cannot_be_split_or_ranked_is_refused(tmp_path, targets, decoys):
    for write in (write_demo, write_tiny_dataset):
        with pytest.raises(DataError, match="at least 2 targets of 2 decoys"):
            write(tmp_path / "set", targets=targets, decoys=decoys)
    assert not (tmp_path / "set").exists()


# Tiny data


@pytest.mark.parametrize(("node_width", "edge_width"), [(5, 3), (52, 24), (1, 1)])
def test_tiny_set_has_the_widths_that_were_asked_for(tmp_path, node_width, edge_width):
    tiny = write_tiny_dataset(tmp_path / "set", node_width=node_width, edge_width=edge_width, sidecar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schema = resolve_schema(tiny.graph_dir)
    assert (schema.node_schema.dim, schema.edge_schema.dim) == (node_width, edge_width)
    assert schema.edge_schema.module == "edge/tiny/v1"


def test_tiny_labels_follow_the_first_features():
    graphs = tiny_graphs(200)
    labels = [graph.y.item() for graph in graphs]
    for features in ("x", "edge_attr"):
        means = [graph[features][:, 0].mean().item() for graph in graphs]
        assert spearmanr(means, labels).statistic > 0.95


def test_tiny_files_hold_no_label(tmp_path):
    tiny = write_tiny_dataset(tmp_path / "set")
    path = tiny.graph_dir / "TINY01" / "TINY01_00.pt"
    assert set(torch.load(path, weights_only=False).keys()) == {"x", "edge_index", "edge_attr"}
    assert not (tiny.graph_dir / "graph_metadata.json").exists()
