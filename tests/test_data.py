"""Labels, splits, order of epochs: whole files, loader processes, restarts. What the page does not show."""

import random
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import in_turn
from pytorch_lightning import LightningModule, Trainer
from torch_geometric.data import Batch

from topoqa_nb.data import demo as demo_module
from topoqa_nb.data.batches import (
    check_coverage,
    coverage_report,
    data_fingerprint,
    epoch_order,
    load_split,
    make_loader,
)
from topoqa_nb.data.dataset import locate_data
from topoqa_nb.data.graphs import list_graphs
from topoqa_nb.data.labels import match_labels, read_labels, target_of
from topoqa_nb.data.store import open_store
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.ground.core import ConfigError, DataError
from topoqa_nb.ground.settings import Config, CoverageConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny", targets=4, decoys=6)


@pytest.fixture(scope="module")
def store(tiny):
    return open_store(tiny.graph_dir)


@pytest.fixture(scope="module")
def train(tiny, store):
    return load_split("train", tiny.train_labels, store)


@pytest.fixture
def csv(tmp_path):
    def write(content: str | bytes, name="labels.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# --- label files


@in_turn(
    "content, part",
    [
        ("", "found an empty file"),
        ("\n\n", "found an empty file"),
        ("dockq\n0.5\n", "one column MODEL, found columns 'dockq'"),
        ("MODEL,dock\na,0.5\n", "one column dockq"),
        ("MODEL,MODEL,dockq\na,b,0.5\n", "one column MODEL, found 2 of them"),
        ("MODEL\tdockq\na\t0.5\n", "separate columns by commas"),
        ("MODEL,dockq\n", "a header and no rows"),
        ("MODEL,dockq\na,\nb,nan\nc,-inf\nd,none\n", "4 rows, none with a finite dockq"),
        ("MODEL,dockq\na,0.5,0.6\n", "expected a CSV file, found"),
        ('MODEL,dockq\n"a,0.5\n', "expected"),
        (b"PK\x03\x04\x00\x00\xff\xfe\x80", "expected"),
        ("MODEL,dockq\na,0.5\na,0.7\n", "rows 1, 2: expected one dockq for a, found values from 0.5 to 0.7"),
        ("MODEL,dockq\na,1.0001\n", "row 1: expected dockq from 0 to 1, found 1.0001 for a"),
        ("MODEL,dockq\na,1.0000011\n", "expected dockq from 0 to 1, found 1.0000011 for a"),
        ("MODEL,dockq\na,0.5\na,0.50000001\n", "found values from 0.5 to 0.50000001"),
        ("MODEL,dockq\na,0.5\nb,-0.001\n", "row 2: expected dockq from 0 to 1"),
        ("MODEL,dockq\n/etc/a,0.5\n", "inside the graph directory, found /etc/a"),
        ("MODEL,dockq\n1ACB/../../a,0.5\n", "inside the graph directory"),
        ("MODEL,dockq\nC:\\data\\a,0.5\n", "inside the graph directory"),
        ("MODEL,dockq\n  ,0.5\n", "expected a MODEL, found an empty cell"),
    ],
)
def test_a_bad_label_file_is_one_line_that_names_it(csv, content, part):
    path = csv(content)
    with pytest.raises(DataError) as problem:
        read_labels(path)
    assert part in str(problem.value)
    assert str(path) in str(problem.value)
    assert "\n" not in str(problem.value)


@in_turn(
    "written, read",
    [("1.0000001", 1), ("1.000001", 1), ("-0.000001", 0), ("-1e-12", 0), ("1", 1), ("0.9999999", 0.9999999)],
)
def test_round_off_beyond_the_ends_is_clipped_and_noted(csv, written, read):
    labels = read_labels(csv(f"MODEL,dockq\na,{written}\nb,0.5\na,{read}\n"))
    assert labels.table.dockq.tolist() == [read, 0.5]
    is_noted = any("1 row clipped, dockq was up to 1e-6 outside of 0 to 1" in note for note in labels.notes)
    assert is_noted == (float(written) != read)


def test_a_missing_label_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.csv", tmp_path):
        with pytest.raises(DataError, match="expected a CSV file"):
            read_labels(path)


def test_models_stay_text(csv):
    names = ["1E10", "001", "1.0", "NA", "nan", "None", "True", "2024-01-01", "inf"]
    rows = "".join(f"{name},0.5\n" for name in names)
    assert read_labels(csv(f"MODEL,dockq\n{rows}")).table.MODEL.tolist() == names


@in_turn("start", ["MODEL,dockq", "\ufeffMODEL,dockq", " MODEL , dockq ", '"MODEL","dockq"'])
@in_turn("end", ["\n", "\r\n"])
def test_headers_as_spreadsheets_write_them(csv, start, end):
    labels = read_labels(csv(end.join([start, " 001 , 0.5 ", "b,1e-1", ""])))
    assert labels.table.to_dict("list") == {"MODEL": ["001", "b"], "dockq": [0.5, 0.1]}


def test_other_columns_are_ignored_and_short_rows_are_dropped(csv):
    labels = read_labels(csv("rank,dockq,MODEL,note\n1,0.5,a,x\n2,,b\n3,0.25,c,\n"))
    assert labels.table.MODEL.tolist() == ["a", "c"]
    assert labels.dropped == 1


def test_dropped_and_collapsed_rows_are_counted(csv):
    labels = read_labels(csv("MODEL,dockq\na,0.50\na,0.5\na,nan\nb,1\nb,1\nb,1.0\nc,n/a\n"))
    assert labels.table.MODEL.tolist() == ["a", "b"]
    assert labels.dropped == 2
    assert labels.notes == [
        "labels.csv: 2 rows dropped, dockq is not a finite number",
        "labels.csv: 3 identical duplicate rows collapsed",
    ]


def test_labels_keep_every_digit(csv):
    assert read_labels(csv("MODEL,dockq\na,0.017188437283039093\n")).table.dockq[0] == 0.017188437283039093


# --- names


def match(csv, models, names):
    rows = "".join(f"{model},0.{number + 1}\n" for number, model in enumerate(models))
    return match_labels(read_labels(csv(f"MODEL,dockq\n{rows}")), names)


@in_turn(
    "model, graph",
    [
        ("top", "top"),  # the file in the graph directory goes before stems in folders
        ("A/a_1", "A/a_1"),
        ("./A//a_1", "A/a_1"),
        ("A/a_1.pt", "A/a_1"),
        ("a_1", "A/a_1"),
        ("a_1.pt", "A/a_1"),
        ("A__a_1", "A/a_1"),
        ("B__c", "B__c"),  # a file of that very name goes before `__` read as `/`
        ("A/deep/d", "A/deep/d"),
        ("A__deep__d", "A/deep/d"),
        ("v1.2", "A/v1.2"),
    ],
)
def test_lookup_order(csv, model, graph):
    names = ["top", "A/top", "A/a_1", "B__c", "B/c", "A/deep/d", "A/v1.2"]
    assert match(csv, [model], names).names == [graph]


def test_a_stem_of_several_files_names_them(csv):
    with pytest.raises(
        DataError, match=r"MODEL a: expected one graph .* found 2: A/a.pt, B/a.pt; .* such as A/a"
    ):
        match(csv, ["a"], ["B/a", "A/a"])
    with pytest.raises(DataError, match=r"found 7: 0/a.pt, 1/a.pt, 2/a.pt, 3/a.pt, 4/a.pt, \.\.\.;"):
        match(csv, ["a"], [f"{number}/a" for number in range(7)])


def test_two_rows_of_one_graph(csv):
    with pytest.raises(DataError, match="one label for the graph A/a.pt, found a and A__a"):
        match(csv, ["a", "A__a"], ["A/a"])


def test_no_label_with_a_graph(csv):
    with pytest.raises(
        DataError, match="labels of graphs such as A/a, found 2 labels without a graph, such as x"
    ):
        match(csv, ["x", "y"], ["A/a"])


def test_matches_keep_the_order_of_the_file(csv):
    matched = match(csv, ["c", "x", "a", "b"], ["A/a", "A/b", "A/c"])
    assert (matched.names, matched.dockq, matched.missing) == (["A/c", "A/a", "A/b"], [0.1, 0.3, 0.4], ["x"])


def test_names_follow_case_exactly(csv):
    assert match(csv, ["a", "A"], ["T/a"]).missing == ["A"]


def test_targets():
    assert target_of("set/1ACB/1ACB_00") == "set/1ACB"
    assert target_of("1ACB/1ACB_00", r"^(x)") == "1ACB"
    assert target_of("1ACB_00", r"(?:([A-Z]+)|(\d\w+?))_") is None  # the first group took no part
    with pytest.raises(ConfigError, match="paths.target_regex"):
        target_of("1ACB_00", "[")


# --- splits


def test_split_holds_its_own_labels(train, tiny):
    table = pd.read_csv(tiny.train_labels)
    assert [name.split("/")[-1] for name in train.names] == [
        str(model).split("/")[-1] for model in table.MODEL
    ]
    assert torch.equal(train.dockq, torch.tensor(table.dockq.tolist(), dtype=torch.float32))
    assert train.targets == [name.split("/")[0] for name in train.names]


def test_an_empty_validation_split_is_refused(csv, store):
    with pytest.raises(DataError, match="a header and no rows"):
        load_split("val", csv("MODEL,dockq\n"), store)
    with pytest.raises(DataError, match="labels without a graph"):
        load_split("val", csv("MODEL,dockq\nx,0.5\ny,0.1\n"), store)


def test_coverage_names_every_missing_graph(csv, store, train):
    names = [f"absent_{number}" for number in range(30)]
    rows = "".join(f"{name},0.5\n" for name in [*names, train.names[0]])
    val = load_split("val", csv(f"MODEL,dockq\n{rows}bad,nan\n"), store)
    report = coverage_report([train, val])
    labels = report["val"].pop("labels")
    assert (labels["mean"], labels["at_least_0.49"], labels["at_least_0.80"]) == (0.5, 1, 0)
    assert report["val"] == {
        "total": 31,
        "usable": 1,
        "coverage": 1 / 31,
        "missing": names,
        "dropped_rows": 1,
    }
    assert any("30 of 31 labels have no graph: absent_0," in note for note in report["notes"])
    assert report["leaks"] == [train.targets[0]]
    assert report["shared_graphs"] == [train.names[0]]
    assert any(note.startswith("warning: targets shared") for note in report["notes"])


def test_unknown_targets_are_no_leak(tmp_path):
    graphs = write_tiny_dataset(tmp_path / "nested", targets=2, decoys=2)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in graphs.graph_dir.rglob("*.pt"):
        (flat / file.name).write_bytes(file.read_bytes())
    store = open_store(flat)
    splits = [load_split("train", graphs.train_labels, store), load_split("val", graphs.val_labels, store)]
    assert splits[0].targets == [None] * len(splits[0])
    assert coverage_report(splits)["leaks"] == []
    regex = r"^([^_]+)_"
    assert None not in load_split("train", graphs.train_labels, store, target_regex=regex).targets


@in_turn("percent, refused", [(0, False), (0.5, False), (50, False), (0.51, True), (51, True), (1, True)])
def test_minimum_coverage(percent, refused):
    report = {
        "val": {"total": 4, "usable": 2, "coverage": 0.5, "missing": ["a", "b"], "dropped_rows": 0},
        "leaks": [],
    }
    config = CoverageConfig(minimum_percent=percent)
    if refused:
        with pytest.raises(
            DataError, match=r"found 2 of 4 \(50.0%\), missing a, b; .*coverage.minimum_percent"
        ):
            check_coverage(report, config)
    else:
        check_coverage(report, config)


def test_fingerprint_sees_labels_and_files(tmp_path, csv):
    tiny = write_tiny_dataset(tmp_path / "tiny", targets=2, decoys=4)

    def fingerprint(labels=tiny.train_labels):
        store = open_store(tiny.graph_dir)
        return data_fingerprint([load_split("train", labels, store)], store)

    first = fingerprint()
    assert fingerprint() == first
    rows = tiny.train_labels.read_text().splitlines()
    assert fingerprint(csv("\n".join(rows))) == first  # where the labels lie does not matter
    assert fingerprint(csv("\n".join(rows[:-1]))) != first
    assert fingerprint(csv("\n".join([*rows[:-1], rows[-1].split(",")[0] + ",0.123"]))) != first
    unlabelled = next(iter(list_graphs(tiny.graph_dir).values()))
    (tiny.graph_dir / "extra.pt").write_bytes(unlabelled.read_bytes())
    assert fingerprint() != first


# --- the order of epochs


def test_order_depends_on_seed_and_epoch_alone():
    before = epoch_order(50, 222, 3)
    np.random.seed(0), random.seed(0), torch.manual_seed(0)
    torch.rand(5), np.random.rand(5)
    assert torch.equal(epoch_order(50, 222, 3), before)
    code = "from topoqa_nb.data.batches import epoch_order; print(epoch_order(50, 222, 3).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(before.tolist())


def test_orders_of_neighbouring_seeds_and_epochs_differ():
    orders = {tuple(epoch_order(20, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def epochs_of(split, num_workers, epochs=(0, 1, 2)):
    loader = make_loader(split, batch_size=5, shuffle=True, seed=222, num_workers=num_workers)
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        yield [batch.clone() for batch in loader]


def test_loader_processes_do_not_change_a_batch(train):
    for alone, helped in zip(epochs_of(train, 0), epochs_of(train, 2), strict=True):
        assert len(alone) == len(helped) == 4
        for a, b in zip(alone, helped, strict=True):
            assert sorted(a.keys()) == sorted(b.keys())
            assert a.name == b.name
            for key in ("x", "edge_index", "edge_attr", "batch", "ptr", "graph_index", "y", "position"):
                assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(train, num_workers):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    list(epochs_of(train, num_workers))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_batches_are_what_pyg_makes(train):
    batch = next(iter(make_loader(train, batch_size=5, shuffle=True, seed=1)))
    numbers = train.index[batch.position]
    expected = Batch.from_data_list([train.store.graph(number) for number in numbers.tolist()])
    expected.edge_index = expected.edge_index[:, batch.edge_order]
    expected.edge_attr = expected.edge_attr[batch.edge_order]
    for key in ("x", "edge_index", "edge_attr", "batch", "ptr"):
        assert torch.equal(batch[key], expected[key]), key
    assert batch.num_graphs == 5
    assert torch.equal(batch.y, train.dockq[batch.position])
    assert batch.y.shape == (5,)


def test_changing_a_batch_does_not_change_the_split(train):
    loader = make_loader(train, batch_size=100, shuffle=False, seed=0)
    first = next(iter(loader))
    labels, features = train.dockq.clone(), first.x.clone()
    first.y.zero_(), first.x.zero_()
    again = next(iter(loader))
    assert torch.equal(train.dockq, labels)
    assert torch.equal(again.x, features)


class Recorder(LightningModule):
    "Remembers which decoys each epoch was shown."

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), {}

    def training_step(self, batch, batch_index):
        self.seen.setdefault(self.current_epoch, []).extend(batch.position.tolist())
        return (self.weight * batch.y.mean()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_tells_the_sampler_its_epoch(train):
    module = Recorder()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=3, accelerator="cpu", devices=1, **quiet)
    trainer.fit(module, make_loader(train, batch_size=5, shuffle=True, seed=222))
    assert module.seen == {epoch: epoch_order(len(train), 222, epoch).tolist() for epoch in range(3)}


# --- where the data lie


def configured(**paths):
    return Config(paths=paths)


def test_given_paths_are_left_alone(tiny):
    config = configured(graph=tiny.graph_dir, train_labels=tiny.train_labels, val_labels=tiny.val_labels)
    assert locate_data(config) == (config, [])


@pytest.mark.parametrize("inside", [True, False])
def test_labels_beside_the_graphs(tmp_path, inside):
    graphs = tmp_path / "set" / "graphs"
    graphs.mkdir(parents=True)
    folder = graphs if inside else graphs.parent
    for name in ("train", "val", "test"):
        (folder / f"{name}.csv").write_text("MODEL,dockq\n")
    config, notes = locate_data(configured(graph=graphs))
    found = [config.paths.train_labels, config.paths.val_labels, config.paths.test_labels]
    assert found == [folder / f"{name}.csv" for name in ("train", "val", "test")]
    assert [str(path) in note for path, note in zip(found, notes, strict=True)] == [True] * 3
    given, _ = locate_data(configured(graph=graphs, test_labels=tmp_path / "mine.csv"))
    assert given.paths.test_labels == tmp_path / "mine.csv"


def test_graphs_without_labels(tmp_path):
    graphs = tmp_path / "set" / "graphs"
    graphs.mkdir(parents=True)
    (tmp_path / "demo_data").mkdir()
    (tmp_path / "set" / "train.csv").write_text("MODEL,dockq\n")  # half a pair is none
    with pytest.raises(
        ConfigError, match="paths.train_labels, paths.val_labels: .*set paths.train_labels and"
    ):
        locate_data(configured(graph=graphs), tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        locate_data(configured(graph=tmp_path / "absent"), tmp_path)


@in_turn("key", ["train_labels", "val_labels", "test_labels"])
def test_labels_without_graphs(tmp_path, key):
    with pytest.raises(ConfigError, match="paths.graph"):
        locate_data(configured(**{key: tmp_path / "a.csv"}), tmp_path)
    assert not (tmp_path / "demo_data").exists()


@in_turn("given, absent", [("train_labels", "val_labels"), ("val_labels", "train_labels")])
def test_half_of_the_labels(tiny, given, absent):
    with pytest.raises(ConfigError, match=f"paths.{absent}: .*set paths.{absent}"):
        locate_data(configured(graph=tiny.graph_dir, **{given: getattr(tiny, given)}))


def test_demo_data_are_made_once_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "write_demo", partial(demo_module.write_demo, targets=2, decoys=2))
    config, notes = locate_data(Config(), tmp_path)
    assert config.paths.graph.is_relative_to(tmp_path / "demo_data")
    assert config.paths.train_labels.is_file() and config.paths.val_labels.is_file()
    assert f"created the synthetic demo data set in {tmp_path / 'demo_data'}" in notes[0]
    times = {file: file.stat().st_mtime_ns for file in config.paths.graph.rglob("*.pt")}
    again, notes = locate_data(Config(), tmp_path)
    assert again == config and "using the synthetic demo data set" in notes[0]
    assert {file: file.stat().st_mtime_ns for file in config.paths.graph.rglob("*.pt")} == times


# --- real graphs


def test_real_labels_find_their_graphs(shared_dir):
    graphs = list_graphs(shared_dir / "data" / "graphs")
    for name in ("train", "val"):
        matched = match_labels(read_labels(shared_dir / "data" / f"{name}.csv"), graphs)
        assert matched.missing == []
        assert all(target_of(graph) for graph in matched.names)


def test_a_label_file_that_may_be_cut_short_is_noted(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("MODEL,dockq\na,0.5\nb,0.0739")
    assert "may be cut short" in read_labels(file).notes[0]
    file.write_text("MODEL,dockq\na,0.5\nb,0.0739\n")
    assert read_labels(file).notes == []
