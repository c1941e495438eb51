"""The one reader of graph files, and batches cut out of the store."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch_geometric.data import Batch, Data

from topoqa_nb.core import DataError, SchemaError
from topoqa_nb.store import GraphStore, list_graphs, open_store, read_graph

TENSORS = ("x", "edge_index", "edge_attr", "batch", "ptr")


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


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
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


@pytest.mark.parametrize("kept", [1, 100, 0.5, 0.95], ids=str)
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_truncated_at_any_place(tmp_path: Path, kept: float, options: dict):
    path = save(graph(), tmp_path / "cut.pt", **options)
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept >= 1 else int(kept * len(content))])
    with pytest.raises(
        DataError, match=r"cut\.pt: expected a graph saved with torch.save, found .*truncated"
    ):
        read_graph(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world\n",
        b"PK\x03\x04 not a zip",
        bytes(range(128, 256)) * 4,
        pickle.dumps({"x": 1}, protocol=4),
    ],
    ids=["empty", "text", "broken zip", "random", "pickle"],
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


@pytest.mark.parametrize(
    "content, found",
    [
        ({"x": torch.zeros(2, 3)}, "a dict"),
        ([graph()], "a list"),
        (torch.zeros(2, 3), r"float32 \[2, 3\]"),
        (None, "nothing"),
    ],
    ids=["dict", "list", "tensor", "none"],
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


@pytest.mark.parametrize(
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


@pytest.mark.parametrize("edges", [0, 4])
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


@pytest.mark.parametrize(
    "chosen",
    [[0], [1], [1, 3], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 2, 1, 1, 2], [1, 0, 3]],
    ids=str,
)
def test_a_batch_equals_collation(tmp_path: Path, originals: list[Data], chosen: list[int]):
    store = open_store(tmp_path)
    collated = Batch.from_data_list([originals[number] for number in chosen])
    for indices in (chosen, torch.tensor(chosen)):
        batch = store.batch(indices)
        for key in TENSORS:
            assert batch[key].dtype == collated[key].dtype, key
            assert torch.equal(batch[key], collated[key]), key
        assert isinstance(batch, Batch) and batch.num_graphs == len(chosen)
        assert batch.graph_index.tolist() == chosen
        assert batch.name == [f"T/T_{number}" for number in chosen]


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


def test_a_store_survives_pickling_for_loader_processes(tmp_path: Path, originals: list[Data]):
    store = pickle.loads(pickle.dumps(open_store(tmp_path)))
    assert isinstance(store, GraphStore)
    assert torch.equal(store.batch([2, 0]).x, torch.cat([originals[2].x, originals[0].x]))


def test_real_graphs(shared_dir: Path):
    store = open_store(shared_dir / "data" / "graphs")
    assert (len(store), store.edge_width) == (1044, 11)
    chosen = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))[:64]
    batch = store.batch(chosen)
    collated = Batch.from_data_list([store.graph(number) for number in chosen.tolist()])
    assert all(torch.equal(batch[key], collated[key]) for key in TENSORS)


def test_parity_graphs(shared_dir: Path):
    widths = [open_store(folder).edge_width for folder in sorted((shared_dir / "parity").glob("*_h*"))]
    assert widths == [11, 11, 24]
