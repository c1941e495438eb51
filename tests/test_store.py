"""The one reader of graph files, the packed store on the disk, and batches cut out of it."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import PATIENCE, in_turn, is_running, until
from torch_geometric.data import Batch, Data

from topoqa_nb.data import packing as packing_module
from topoqa_nb.data import store as store_module
from topoqa_nb.data.graphs import list_graphs, read_graph
from topoqa_nb.data.store import GraphStore, open_store
from topoqa_nb.ground.core import DataError, SchemaError, TrainingError

TENSORS = ("x", "edge_index", "edge_attr", "batch", "ptr")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forked processes are used on Linux only")


def graph(nodes: int = 5, edges: int = 8, *, node_width: int = 4, edge_width: int = 3, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return Data(
        x=torch.randn(nodes, node_width, generator=generator),
        edge_index=torch.randint(nodes, (2, edges), generator=generator),
        edge_attr=torch.randn(edges, edge_width, generator=generator),
    )


def save(content: object, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


class Executes:
    "A pickle of this creates a directory when it is loaded without restrictions."

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


# --- one file ---


def test_a_file_cannot_run_code_unless_trusted(tmp_path: Path):
    proof = tmp_path / "code_ran"
    unsafe = graph()
    unsafe.metadata = {"builder": Executes(proof)}
    path = save(unsafe, tmp_path / "unsafe.pt")
    with pytest.raises(DataError, match=r"unsafe\.pt: .*needs posix\.mkdir.*paths\.trust_pickles"):
        read_graph(path)
    assert not proof.exists()
    read_graph(path, trust_pickle=True)
    assert proof.exists()


def test_reading_leaves_no_class_on_the_global_allow_list(tmp_path: Path):
    before = set(torch.serialization.get_safe_globals())
    read_graph(save(graph(), tmp_path / "g.pt"))
    assert set(torch.serialization.get_safe_globals()) == before


@in_turn("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_both_torch_formats(tmp_path: Path, options: dict):
    original = graph()
    found = read_graph(save(original, tmp_path / "g.pt", **options))
    assert torch.equal(found.x, original.x) and torch.equal(found.edge_index, original.edge_index)


def test_legacy_unsafe_pickle_is_refused_by_name(tmp_path: Path):
    unsafe = graph()
    unsafe.metadata = Executes(tmp_path / "code_ran")
    path = save(unsafe, tmp_path / "unsafe.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match="needs posix.mkdir"):
        read_graph(path)


@in_turn("kept", [1, 100, 0.5, 0.95])
@in_turn("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_truncated_at_any_place(tmp_path: Path, kept: float, options: dict):
    path = save(graph(), tmp_path / "cut.pt", **options)
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept >= 1 else int(kept * len(content))])
    with pytest.raises(
        DataError, match=r"cut\.pt: expected a graph saved with torch.save, found .*truncated"
    ):
        read_graph(path)


@in_turn(
    "content",
    [
        b"",
        b"hello world\n",
        b"PK\x03\x04 not a zip",
        bytes(range(128, 256)) * 4,
        pickle.dumps({"x": 1}, protocol=4),
    ],
)
def test_what_is_no_torch_file(tmp_path: Path, content: bytes, recwarn: pytest.WarningsRecorder):
    path = tmp_path / "odd.pt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.pt: expected a graph saved with torch.save"):
        read_graph(path)
    assert not recwarn.list


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        read_graph(tmp_path / "absent.pt")


def graph_of_pyg_1() -> Data:
    "PyG 1 kept its tensors directly on the object."
    old = Data.__new__(Data)
    old.__dict__.update(x=torch.zeros(2, 3), edge_index=torch.zeros(2, 1, dtype=torch.int64))
    return old


@in_turn(
    "content, found",
    [
        ({"x": torch.zeros(2, 3)}, "a dict"),
        ([graph()], "a list"),
        (torch.zeros(2, 3), r"float32 \[2, 3\]"),
        (None, "nothing"),
    ],
)
def test_not_a_graph(tmp_path: Path, content: object, found: str):
    with pytest.raises(DataError, match=f"expected one torch_geometric Data object, found {found}"):
        read_graph(save(content, tmp_path / "odd.pt"))


def test_a_batch_is_not_a_graph(tmp_path: Path):
    path = save(Batch.from_data_list([graph(), graph()]), tmp_path / "batch.pt")
    with pytest.raises(DataError):
        read_graph(path)
    with pytest.raises(DataError, match="expected one torch_geometric Data object, found a DataBatch"):
        read_graph(path, trust_pickle=True)


def test_a_graph_of_pyg_1(tmp_path: Path):
    path = tmp_path / "old.pt"
    save(graph_of_pyg_1(), path)
    with pytest.raises(DataError, match="found one of PyG 1"):
        read_graph(path)


def put(key: str, change: Callable[[torch.Tensor], object]) -> Data:
    "A graph with one attribute changed."
    changed = graph()
    changed[key] = change(changed[key])
    return changed


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    return change


@in_turn(
    "key, change, message",
    [
        ("x", lambda x: None, "found nothing"),
        ("x", lambda x: x.tolist(), "found a list"),
        ("x", lambda x: x[0], r"found float32 \[4\]"),
        ("x", lambda x: x.long(), r"found int64 \[5, 4\]"),
        ("x", lambda x: x.bool(), r"found bool \[5, 4\]"),
        ("x", lambda x: x.to_sparse(), r"found sparse float32 \[5, 4\]"),
        ("x", lambda x: x[:, :0], r"at least one feature, found float32 \[5, 0\]"),
        ("x", lambda x: x[:0], "expected at least one node, found none"),
        ("x", with_value(float("nan")), "found NaN or infinity in 1 of 5 rows"),
        ("x", lambda x: x.double() + 1e300, "found NaN or infinity in 5 of 5 rows"),
        ("edge_index", lambda e: None, "found nothing"),
        ("edge_index", lambda e: e.int(), r"found int32 \[2, 8\]"),
        ("edge_index", lambda e: e.float(), r"found float32 \[2, 8\]"),
        ("edge_index", lambda e: e.t(), r"found int64 \[8, 2\]"),
        ("edge_index", lambda e: e[0], r"found int64 \[8\]"),
        ("edge_index", lambda e: e + 5, "expected node numbers from 0 to 4, found"),
        ("edge_index", lambda e: e - 5, "expected node numbers from 0 to 4, found -"),
        ("edge_attr", lambda a: None, "found nothing"),
        ("edge_attr", lambda a: a[:-1], "expected 8 rows, one per edge, found 7"),
        ("edge_attr", lambda a: a.unsqueeze(0), r"found float32 \[1, 8, 3\]"),
        ("edge_attr", with_value(float("inf")), "found NaN or infinity in 1 of 8 rows"),
    ],
)
def test_wrong_content_names_file_and_attribute(tmp_path: Path, key: str, change: Callable, message: str):
    path = save(put(key, change), tmp_path / "wrong.pt")
    with pytest.raises(DataError, match=rf"wrong\.pt: {key}: .*{message}") as caught:
        read_graph(path)
    assert "\n" not in str(caught.value)


def test_only_what_is_needed_is_kept(tmp_path: Path):
    full = graph()
    full.batch, full.y, full.coordinates = None, torch.tensor(0.3), torch.rand(5, 3)
    full.metadata, full.name = {"edge_module": "edge/toy/v3"}, "1ACB_03"
    found = read_graph(save(full, tmp_path / "full.pt"))
    assert set(found.keys()) == {"x", "edge_index", "edge_attr", "metadata", "name"}
    assert found.metadata == {"edge_module": "edge/toy/v3"}


def test_features_become_float32_without_gradient(tmp_path: Path):
    wide = graph()
    wide.x, wide.edge_attr = wide.x.double().requires_grad_(), wide.edge_attr.half()
    found = read_graph(save(wide, tmp_path / "wide.pt"))
    assert found.x.dtype == found.edge_attr.dtype == torch.float32
    assert not found.x.requires_grad


@in_turn("edges", [0, 4])
def test_flat_edge_features_are_one_column(tmp_path: Path, edges: int):
    flat = graph(edges=edges)
    flat.edge_attr = torch.rand(edges)
    assert read_graph(save(flat, tmp_path / "flat.pt")).edge_attr.shape == (edges, 1)


# --- a directory ---


def test_names_are_sorted_and_hidden_files_passed_over(tmp_path: Path):
    for name in ("b/b_1", "a/deep/er/x", "a_0", "b/b_0", "v1.2/decoy.7"):
        save(graph(), tmp_path / f"{name}.pt")
    for hidden in ("b/._b_1.pt", ".ipynb_checkpoints/b_1.pt"):
        save(graph(), tmp_path / hidden)
    (tmp_path / "notes.txt").write_text("no graph")
    assert list(list_graphs(tmp_path)) == ["a/deep/er/x", "a_0", "b/b_0", "b/b_1", "v1.2/decoy.7"]


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path):
    save(graph(), tmp_path / "elsewhere" / "1ACB" / "1ACB_00.pt")
    graph_dir = tmp_path / "graphs"
    graph_dir.mkdir()
    (graph_dir / "1ACB").symlink_to(tmp_path / "elsewhere" / "1ACB")
    (graph_dir / "loop").symlink_to(graph_dir)
    assert list(list_graphs(graph_dir)) == ["1ACB/1ACB_00"]


def test_missing_empty_and_file_for_a_directory(tmp_path: Path):
    with pytest.raises(DataError, match="absent: .*no such directory; check paths.graph"):
        list_graphs(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: .*found none; check paths.graph"):
        open_store(tmp_path / "empty")
    with pytest.raises(DataError, match="found a file"):
        list_graphs(save(graph(), tmp_path / "single.pt"))


# --- the store ---

SHAPES = [(5, 8), (1, 0), (7, 20), (3, 0), (4, 2), (2, 1)]


@pytest.fixture
def originals(tmp_path: Path) -> list[Data]:
    graphs = [graph(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    for number, item in enumerate(graphs):
        save(item, tmp_path / f"T/T_{number}.pt")
    return graphs


@in_turn(
    "chosen",
    [[0], [1], [1, 3], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 2, 1, 1, 2], [1, 0, 3]],
)
def test_a_batch_equals_collation(tmp_path: Path, originals: list[Data], chosen: list[int]):
    store = open_store(tmp_path)
    collated = Batch.from_data_list([originals[number] for number in chosen])
    for indices in (chosen, torch.tensor(chosen)):
        batch = store.batch(indices)
        assert_same_batch(batch, collated)
        assert isinstance(batch, Batch) and batch.num_graphs == len(chosen)
        assert batch.graph_index.tolist() == chosen
        assert batch.name == [f"T/T_{number}" for number in chosen]


def assert_same_batch(batch: Batch, collated: Batch) -> None:
    "Identical in every bit once the order of the edges is undone."
    order, batch = batch.edge_order, batch.clone()
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(collated.num_edges))
    targets = batch.edge_index[1]
    assert (targets.diff() >= 0).all()
    assert (order.diff() > 0)[targets.diff() == 0].all(), "edges of one target left their order"
    in_file_order = order.argsort()
    batch.edge_index, batch.edge_attr = batch.edge_index[:, in_file_order], batch.edge_attr[in_file_order]
    for key in TENSORS:
        assert batch[key].dtype == collated[key].dtype, key
        assert batch[key].is_contiguous(), key
        assert torch.equal(batch[key], collated[key]), key


def test_a_graph_is_as_in_its_file(tmp_path: Path, originals: list[Data]):
    store = open_store(tmp_path)
    for number, original in enumerate(originals):
        assert all(torch.equal(store.graph(number)[key], original[key]) for key in TENSORS[:3])


def test_writing_to_a_batch_or_graph_leaves_the_store_alone(tmp_path: Path, originals: list[Data]):
    store = open_store(tmp_path)
    for drawn in (store.batch([0]), store.graph(0)):
        drawn.x.zero_(), drawn.edge_attr.zero_(), drawn.edge_index.zero_()
        drawn.y = torch.tensor([1.0])
    assert torch.equal(store.batch([0]).x, originals[0].x)
    assert torch.equal(store.graph(0).edge_index, originals[0].edge_index)
    assert "y" not in store.batch([0]) and "y" not in store.graph(0)


def test_a_number_past_the_end_is_an_error(tmp_path: Path, originals: list[Data]):
    store = open_store(tmp_path)
    with pytest.raises(IndexError):
        store.batch([0, len(SHAPES)])
    with pytest.raises(IndexError):
        store.graph(len(SHAPES))


def test_counts_sizes_and_index(tmp_path: Path, originals: list[Data]):
    store = open_store(tmp_path)
    assert list(zip(store.node_counts.tolist(), store.edge_counts.tolist(), strict=True)) == SHAPES
    assert store.file_sizes == [(tmp_path / f"{name}.pt").stat().st_size for name in store.names]
    assert [store.index[name] for name in store.names] == list(range(len(store)))


def test_chosen_graphs_keep_their_order_and_only_they_are_read(tmp_path: Path, originals: list[Data]):
    (tmp_path / "T" / "damaged.pt").write_bytes(b"")
    store = open_store(tmp_path, ["T/T_4", "T/T_0", "T/T_4"])
    assert store.names == ["T/T_4", "T/T_0"]
    with pytest.raises(DataError, match="damaged.pt"):
        open_store(tmp_path)


def test_unknown_and_no_names(tmp_path: Path, originals: list[Data]):
    with pytest.raises(DataError, match=r"expected a file T/T_9\.pt, found no such graph; did you mean T/T_"):
        open_store(tmp_path, ["T/T_9"])
    with pytest.raises(DataError, match="at least one graph name"):
        open_store(tmp_path, [])


@pytest.mark.parametrize("owner", ["node", "edge"])
def test_two_widths_list_at_most_five_files_each(tmp_path: Path, owner: str):
    for number in range(7):
        save(graph(), tmp_path / f"a_{number}.pt")
    save(graph(edges=0, **{f"{owner}_width": 9}), tmp_path / "z.pt")
    usual = 4 if owner == "node" else 3
    listed = ", ".join(f"a_{number}.pt" for number in range(5))
    expected = rf"one {owner} width in all graphs, found {usual} in 7 files \({listed}, \.\.\.\); 9 in 1 file \(z\.pt\)"
    with pytest.raises(SchemaError, match=expected):
        open_store(tmp_path)


def test_real_graphs(shared_dir: Path):
    graph_dir = shared_dir / "data" / "graphs"
    store = open_store(graph_dir)
    assert (len(store), store.edge_width) == (1044, 11)
    chosen = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))[:64]
    files = [graph_dir / f"{store.names[number]}.pt" for number in chosen.tolist()]
    assert_same_batch(store.batch(chosen), Batch.from_data_list([read_graph(file) for file in files]))


# --- the packed files ---


@pytest.fixture
def graph_dir(tmp_path: Path, originals: list[Data]) -> Path:
    "The graphs of `originals` in a directory without anything else."
    (tmp_path / "graphs").mkdir()
    (tmp_path / "T").rename(tmp_path / "graphs" / "T")
    return tmp_path / "graphs"


@pytest.fixture
def opened(graph_dir: Path, tmp_path: Path) -> Callable[..., GraphStore]:
    "Opens the store of `graph_dir`, kept beside it."
    return lambda names=None, **options: open_store(
        graph_dir, names, store_dir=tmp_path / "stores", **options
    )


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a graph file was read")


def left_behind(folder: Path) -> list[str]:
    "Names of what is neither a lock nor a note of origin, in the folder of one graph directory."
    return sorted(path.name for path in folder.iterdir() if path.name not in ("lock", "origin"))


def assert_holds(store: GraphStore, originals: list[Data]) -> None:
    assert_same_batch(store.batch(range(len(store))), Batch.from_data_list(originals))


def test_the_second_opening_reads_no_graph(opened, originals: list[Data], monkeypatch: pytest.MonkeyPatch):
    first = opened()
    monkeypatch.setattr(packing_module, "read_graph", refuse)
    second = opened()
    assert second.folder == first.folder is not None
    assert_holds(second, originals)


def test_it_lives_in_the_cache_folder_and_never_with_the_graphs(graph_dir: Path, cache_folder: Path):
    before = sorted(graph_dir.rglob("*"))
    store = open_store(graph_dir)
    assert store.folder.is_relative_to(cache_folder / "topoqa_nb" / "stores")
    assert sorted(graph_dir.rglob("*")) == before


def test_one_store_directory_serves_several_graph_directories(opened, graph_dir: Path, tmp_path: Path):
    first = opened()
    save(graph(9, 9), tmp_path / "others" / "a.pt")
    other = open_store(tmp_path / "others", store_dir=tmp_path / "stores")
    assert (len(first), len(other)) == (len(SHAPES), 1)
    assert opened().folder == first.folder and first.folder.is_dir()


def test_relative_and_linked_paths_share_a_store(opened, graph_dir: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "link").symlink_to(graph_dir)
    monkeypatch.chdir(tmp_path)
    for path in ("graphs", "link"):
        assert open_store(path, store_dir=tmp_path / "stores").folder == opened().folder


def change_content(file: Path) -> None:
    save(graph(5, 8, seed=99), file)


def change_date(file: Path) -> None:
    os.utime(file, (1e9, 1e9))


@pytest.mark.parametrize(
    "change", [change_content, change_date, Path.unlink, lambda file: save(graph(), file.with_name("new.pt"))]
)
def test_any_change_of_the_files_makes_a_new_store(opened, graph_dir: Path, change: Callable):
    first = opened()
    kept = first.batch([0]).x
    change(graph_dir / "T" / "T_0.pt")
    second = opened()
    assert second.folder != first.folder
    assert second.names == list(list_graphs(graph_dir))
    for number, file in enumerate(list_graphs(graph_dir).values()):
        assert torch.equal(second.graph(number).x, read_graph(file).x)
    assert left_behind(second.folder.parent) == [second.folder.name], "the old store was kept"
    assert torch.equal(first.batch([0]).x, kept), "a run lost the store that it has open"


def test_a_store_of_another_format_is_replaced(
    opened, originals: list[Data], monkeypatch: pytest.MonkeyPatch
):
    old = opened()
    monkeypatch.setattr(store_module, "_FORMAT", store_module._FORMAT + 1)
    new = opened()
    assert new.folder != old.folder and not old.folder.exists()
    assert_holds(new, originals)


def test_trusted_pickles_do_not_reach_who_does_not_trust(opened, graph_dir: Path, tmp_path: Path):
    unsafe = graph()
    unsafe.metadata = {"builder": Executes(tmp_path / "code_ran")}
    save(unsafe, graph_dir / "unsafe.pt")
    trusting = opened(trust_pickles=True)
    with pytest.raises(DataError, match="paths.trust_pickles"):
        opened()
    assert trusting.folder.is_dir()


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def overwrite(file: Path) -> None:
    with file.open("r+b") as opened_file:
        opened_file.seek(file.stat().st_size // 2)
        opened_file.write(b"\xff")


def make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [cut, empty, overwrite, Path.unlink, make_directory])
@in_turn("name", ["header", "x", "edges", "edge_attr"])
def test_a_damaged_store_is_packed_again(opened, originals: list[Data], damage: Callable, name: str):
    damage(opened().folder / name)
    store = opened()
    assert store.folder is not None
    assert_holds(store, originals)


def test_a_header_that_says_something_else(opened, originals: list[Data]):
    folder = opened().folder
    header = (folder / "header").read_text()
    counts = [nodes for nodes, _ in SHAPES]
    assert f"{counts}" in header
    (folder / "header").write_text(header.replace(f"{counts}", f"{counts[::-1]}"))
    assert_holds(opened(), originals)


def test_a_deleted_store_is_packed_again(opened, originals: list[Data], tmp_path: Path):
    shutil.rmtree(opened().folder)
    assert_holds(opened(), originals)
    shutil.rmtree(tmp_path / "stores")
    assert_holds(opened(), originals)


def test_stores_of_directories_that_are_gone_are_removed(opened, tmp_path: Path):
    save(graph(), tmp_path / "gone" / "a.pt")
    gone = open_store(tmp_path / "gone", store_dir=tmp_path / "stores").folder.parent
    elsewhere = tmp_path / "stores" / "of_another_host"
    elsewhere.mkdir()
    (elsewhere / "origin").write_text(json.dumps({"graph_dir": "/nowhere", "host": "another"}))
    shutil.rmtree(tmp_path / "gone")
    opened()
    assert not gone.exists()
    assert elsewhere.exists()


def test_graphs_without_edges_alone(tmp_path: Path):
    lonely = [graph(2, 0), graph(3, 0, seed=1)]
    for number, item in enumerate(lonely):
        save(item, tmp_path / "graphs" / f"{number}.pt")
    for _ in ("packing", "opening"):
        assert_holds(open_store(tmp_path / "graphs", store_dir=tmp_path / "stores"), lonely)


def test_unreadable_graphs_leave_no_store(opened, graph_dir: Path):
    folder = opened().folder.parent
    whole = (graph_dir / "T" / "T_3.pt").read_bytes()
    (graph_dir / "T" / "T_3.pt").write_bytes(whole[:100])
    (folder / "packing-killed").mkdir()
    for _ in range(2):
        with pytest.raises(DataError, match=r"T_3\.pt: .*truncated"):
            opened()
    assert len(left_behind(folder)) == 1, "only the store of the files as they were before"


def test_a_link_that_leads_nowhere_is_named(opened, graph_dir: Path):
    (graph_dir / "dangling.pt").symlink_to(graph_dir / "absent")
    with pytest.raises(DataError, match=r"dangling\.pt: expected a graph file, found no such file"):
        opened()
    assert opened(["T/T_0"]).names == ["T/T_0"]


# --- some of the graphs ---


def test_chosen_graphs_come_from_the_store_of_all(
    opened, originals: list[Data], monkeypatch: pytest.MonkeyPatch
):
    opened()
    monkeypatch.setattr(packing_module, "read_graph", refuse)
    store = opened(["T/T_4", "T/T_0"])
    assert store.index == {"T/T_4": 0, "T/T_0": 1}
    assert store.node_counts.tolist() == [SHAPES[4][0], SHAPES[0][0]]
    assert_holds(store, [originals[4], originals[0]])


def test_chosen_graphs_alone_pack_nothing(opened, originals: list[Data], tmp_path: Path):
    store = opened(["T/T_4", "T/T_0"])
    assert store.folder is None and not (tmp_path / "stores").exists()
    assert_holds(store, [originals[4], originals[0]])


# --- handing a store to another process ---


def test_pickling_sends_the_place_and_not_the_graphs(tmp_path: Path):
    save(graph(2000, 3000), tmp_path / "graphs" / "a.pt")
    store = open_store(tmp_path / "graphs", store_dir=tmp_path / "stores")
    sent = pickle.dumps(store)
    assert len(sent) < 5000 < store.x.nbytes
    received = pickle.loads(sent)
    assert torch.equal(received.batch([0]).x, store.batch([0]).x)


def test_a_private_store_is_pickled_whole(opened, originals: list[Data]):
    received = pickle.loads(pickle.dumps(opened(["T/T_2", "T/T_0"])))
    assert_holds(received, [originals[2], originals[0]])


def test_the_mapped_arrays_cannot_be_written(opened):
    store = opened()
    for array in (store.x, store.edges, store.edge_attr):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_file_that_is_cut_while_it_is_mapped_is_named(opened, originals: list[Data]):
    "Reading what is gone would end the process by SIGBUS; a file that is only removed stays readable."
    store = opened()
    shutil.rmtree(store.folder)
    assert_holds(store, originals)
    store = opened()
    file, whole = store.folder / "x", store.x.nbytes
    os.truncate(file, whole // 2)
    with pytest.raises(TrainingError) as caught:
        store.subset(store.names[:1]).graph(0)
    assert str(caught.value).startswith(
        f"{file}: expected {whole} bytes, as when it was opened, found {whole // 2};"
    )
    assert_holds(opened(), originals)


# --- no place to write ---


@contextmanager
def small_files() -> Iterator[None]:
    "Writing more than a few bytes to a file fails, as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def raising(number: int) -> Callable:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def assert_private(
    store: GraphStore, originals: list[Data], caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    assert store.folder is None
    assert_holds(store, originals)
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert reason in record.getMessage() and "paths.store" in record.getMessage()


def test_a_file_size_limit_is_met_in_the_middle(opened, originals: list[Data], tmp_path: Path, caplog):
    with small_files():
        store = opened()
    assert_private(store, originals, caplog, "File too large")
    [place] = (tmp_path / "stores").iterdir()
    assert left_behind(place) == []


@pytest.mark.parametrize(
    "call, number",
    [("fsync", errno.ENOSPC), ("fsync", errno.EDQUOT), ("utime", errno.EPERM), ("mkdir", errno.EROFS)],
)
def test_a_full_or_forbidden_disk(
    opened, originals, tmp_path: Path, caplog, monkeypatch, call: str, number: int
):
    monkeypatch.setattr(os, call, raising(number))
    store = opened()
    monkeypatch.undo()
    assert_private(store, originals, caplog, os.strerror(number))
    assert [left_behind(place) for place in (tmp_path / "stores").glob("*")] in ([], [[]])


def test_no_permission_for_the_lock(opened, originals: list[Data], caplog, monkeypatch):
    monkeypatch.setattr(store_module.FileLock, "acquire", raising(errno.EACCES))
    store = opened()
    assert_private(store, originals, caplog, "Permission denied")


def test_a_file_in_place_of_the_store_directory(opened, originals: list[Data], tmp_path: Path, caplog):
    (tmp_path / "stores").write_text("a file")
    assert_private(opened(), originals, caplog, "Not a directory")


def test_files_that_cannot_be_mapped_back(opened, originals: list[Data], caplog, monkeypatch):
    monkeypatch.setattr(np, "memmap", raising(errno.ENODEV))
    assert_private(opened(), originals, caplog, "cannot be read back")


def test_a_full_disk_does_not_hide_a_bad_graph(opened, graph_dir: Path, monkeypatch):
    (graph_dir / "T" / "T_3.pt").write_bytes(b"")
    monkeypatch.setattr(os, "fsync", raising(errno.ENOSPC))
    with pytest.raises(DataError, match=r"T_3\.pt: .*an empty file"):
        opened()


# --- files that change while they are packed ---


def after_reading(
    monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[Path], None], times: int
) -> None:
    "Let something happen to a file as soon as it has been read, this many times."
    original, left = packing_module.read_graph, [times]

    def read(path: Path, **options: object) -> Data:
        found = original(path, **options)
        if path.name == name and left[0]:
            left[0] -= 1
            action(path)
        return found

    monkeypatch.setattr(packing_module, "read_graph", read)


def replace_unseen(file: Path) -> None:
    "Another graph of the same size, with the date of the old one."
    before = file.stat()
    save(graph(5, 8, seed=99), file.with_name("new"))
    os.utime(file.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    file.with_name("new").rename(file)
    assert file.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("action", [change_content, replace_unseen])
def test_a_graph_replaced_while_it_is_packed(opened, monkeypatch, action: Callable):
    after_reading(monkeypatch, "T_0.pt", action, times=1)
    assert torch.equal(opened().graph(0).x, graph(5, 8, seed=99).x)


def test_a_graph_that_appears_while_others_are_packed(opened, graph_dir: Path, monkeypatch):
    after_reading(monkeypatch, "T_0.pt", lambda file: save(graph(2, 2), file.with_name("new.pt")), times=1)
    assert opened().names == list(list_graphs(graph_dir))


def test_a_graph_that_is_half_written_at_first(opened, graph_dir: Path, originals: list[Data], monkeypatch):
    file = graph_dir / "T" / "T_3.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    after_reading(monkeypatch, "T_0.pt", lambda _: file.write_bytes(whole), times=1)
    assert_holds(opened(), originals)


def test_a_builder_that_never_rests_is_one_clear_line(opened, tmp_path: Path, monkeypatch):
    after_reading(monkeypatch, "T_0.pt", Path.touch, times=100)
    expected = (
        r"stay as they are while they are read, found changes in 1 file \(T/T_0\.pt\); start again when"
    )
    with pytest.raises(DataError, match=expected):
        opened()
    assert [left_behind(place) for place in (tmp_path / "stores").iterdir()] == [[]]


# --- several processes ---


@contextmanager
def forked(action: Callable[[], object], count: int) -> Iterator[list[multiprocessing.Process]]:
    "Processes that do the same; killed in the end if they still run."
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=action) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


@needs_fork
def test_processes_that_start_together_pack_once(opened, originals: list[Data], tmp_path: Path, monkeypatch):
    original, barrier = store_module._write_store, multiprocessing.get_context("fork").Barrier(4)
    packed, good = tmp_path / "packed", tmp_path / "good"

    def write(*arguments: object) -> object:
        with packed.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.1)
        return original(*arguments)

    def work() -> None:
        barrier.wait(PATIENCE)
        assert_holds(opened(), originals)
        with good.open("a") as file:
            file.write("good\n")

    monkeypatch.setattr(store_module, "_write_store", write)
    with forked(work, 4) as processes:
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0] * 4
    assert len(packed.read_text().split()) == 1
    assert len(good.read_text().split()) == 4


@needs_fork
def test_a_packer_that_is_killed_half_way(opened, originals: list[Data], tmp_path: Path, monkeypatch):
    place = lambda: next((tmp_path / "stores").iterdir())  # noqa: E731
    half_way, done = tmp_path / "half_way", tmp_path / "done"

    def stop(_: Path) -> None:
        half_way.touch()
        time.sleep(600)

    def work() -> None:
        with monkeypatch.context() as patch:
            after_reading(patch, "T_3.pt", stop, times=1)
            opened()

    def wait_and_open() -> None:
        assert_holds(opened(), originals)
        done.touch()

    with forked(work, 1) as [packer]:
        until(half_way.exists)
        with forked(wait_and_open, 1) as [waiting]:
            time.sleep(0.1)
            assert not done.exists()
            os.kill(packer.pid, signal.SIGKILL)
            packer.join()
            waiting.join(PATIENCE)
            assert waiting.exitcode == 0 and done.exists()
    assert len(left_behind(place())) == 1


@needs_fork
def test_what_a_killed_packer_left_is_not_used(opened, originals: list[Data]):
    store = opened()
    half = store.folder.with_name("packing-killed") / "store"
    half.parent.mkdir()
    store.folder.rename(half)
    os.truncate(half / "x", 8)
    again = opened()
    assert_holds(again, originals)
    assert left_behind(again.folder.parent) == [again.folder.name]


@pytest.fixture
def three_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "_reader_count", lambda graphs: 3)
    monkeypatch.setattr(packing_module, "_GROUP", 1)


@needs_fork
def test_several_readers_give_the_same_store(opened, originals: list[Data], three_readers: None):
    assert_holds(opened(), originals)
    assert multiprocessing.active_children() == []


@needs_fork
def test_several_readers_give_the_same_error(opened, graph_dir: Path, three_readers: None):
    for name in ("T_2", "T_3"):
        (graph_dir / "T" / f"{name}.pt").write_bytes(b"")
    with pytest.raises(DataError, match=r"T_2\.pt: .*an empty file; build or copy the file again"):
        opened()
    assert multiprocessing.active_children() == []


@needs_fork
def test_a_reader_that_is_killed_is_one_clear_line(opened, three_readers: None, monkeypatch):
    after_reading(monkeypatch, "T_4.pt", lambda _: os.kill(os.getpid(), signal.SIGKILL), times=1)
    with pytest.raises(DataError, match=r"T_4\.pt: .*one that was killed \(out of memory\?\)"):
        opened()


@needs_fork
def test_readers_end_with_a_packer_that_is_killed(
    opened, graph_dir, tmp_path, three_readers: None, monkeypatch
):
    half_way = tmp_path / "half_way"
    for number in range(6):
        save(graph(10_000, 1), graph_dir / "T" / f"T_{number}.pt")  # more than a pipe holds

    def stop(piece: object, *_: object) -> None:
        half_way.touch()
        time.sleep(600)

    monkeypatch.setattr(packing_module, "_receive", stop)
    with forked(opened, 1) as [packer]:
        until(half_way.exists)
        readers = psutil.Process(packer.pid).children()
        os.kill(packer.pid, signal.SIGKILL)
        packer.join()
        try:
            until(lambda: not any(is_running(each.pid) for each in readers))
        finally:
            for reader in readers:
                with suppress(psutil.NoSuchProcess):
                    reader.kill()


# --- what is shown ---


def test_small_directories_are_packed_without_a_word(opened, capsys: pytest.CaptureFixture):
    opened()
    assert capsys.readouterr() == ("", "")


def test_lines_of_progress_where_there_is_no_terminal(opened, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr(packing_module, "_QUIET", 1)
    opened()
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2
    assert err.startswith("packing ") and "6 graphs" in err and "done in" in err


def test_a_bar_in_a_terminal(opened, originals: list[Data], capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr(packing_module, "_QUIET", 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert_holds(opened(), originals)
    assert capsys.readouterr().out == ""


def test_the_lines_go_to_the_log_of_a_run(opened, capsys: pytest.CaptureFixture, caplog, monkeypatch):
    monkeypatch.setattr(packing_module, "_QUIET", 1)
    with caplog.at_level(logging.INFO, logger="topoqa_nb"):
        opened()
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert capsys.readouterr().err == ""


def test_parity_graphs(shared_dir: Path):
    widths = [open_store(folder).edge_width for folder in sorted((shared_dir / "parity").glob("*_h*"))]
    assert widths == [11, 11, 24]
