"""The schema of a graph directory: tensors, sidecar, graph files, builder summary."""

import json
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_turn
from torch_geometric.data import Data

from topoqa_nb.build.build import build
from topoqa_nb.build.example import helix_pair, write_example
from topoqa_nb.build.interface import node_columns
from topoqa_nb.build.recipe import load_recipe
from topoqa_nb.data import sidecar as sidecar_module
from topoqa_nb.data.schema import (
    EdgeSchema,
    FeatureSchema,
    NodeSchema,
    check_features,
    known_recipe,
    resolve_schema,
    schema_differences,
)
from topoqa_nb.data.store import GraphStore, open_store
from topoqa_nb.ground.core import DataError, SchemaError, to_json

COLUMNS = ["rasa", "phi", "psi", "AA_0"]
NAMES = ["A/A_0", "A/A_1", "B/B_0"]
ENTRY = {
    "edge_module": "edge/toy/v3",
    "edge_params": {"distance_max": 10.0},
    "edge_metadata": {"feature_dim": 3, "edge_feature_variant": "toy", "bands": [[0, 5], [5, 10]]},
    "node_feature_columns": COLUMNS,
    "node_feature_dim": 4,
}
STAGES = {
    "interface": {"id": "interface/polar_cutoff/v1", "defaults": {"cutoff": 10.0}},
    "topology": {"id": "topology/persistence_basic/v1", "alias": "ph", "jobs": {"n": 1}},
    "node": {"id": "node/dssp_topo_merge/v1"},
    "edge": {"id": "edge/toy/v3", "alias": "toy", "jobs": {"distance_max": 12.0}, "summary": "toy edges"},
}


def save(path: Path, nodes: int = 4, edges: int = 6, edge_width: int = 3, **extra: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    edge_index = torch.zeros(2, edges, dtype=torch.int64)
    torch.save(Data(torch.zeros(nodes, 4), edge_index, torch.zeros(edges, edge_width), **extra), path)


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def graph_dir(tmp_path: Path) -> Path:
    "Three graphs, the first without edges; no sidecar, no summary."
    folder = tmp_path / "builds" / "one" / "graph_data"
    for number, name in enumerate(NAMES):
        save(folder / f"{name}.pt", edges=6 * number)
    return folder


def quiet(graph_dir: Path, **options: object) -> FeatureSchema:
    "Resolve; any warning fails the test."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return resolve_schema(graph_dir, **options)


# --- sidecar ---


def test_with_a_sidecar(graph_dir: Path):
    path = write(
        graph_dir / "graph_metadata.json",
        {"_builder": {"id": "b", "version": "2"}} | dict.fromkeys(NAMES, ENTRY),
    )
    found = quiet(graph_dir)
    edge = found.edge_schema
    assert (edge.dim, edge.module, edge.variant) == (3, "edge/toy/v3", "toy")
    assert (edge.module_params, edge.bands) == ({"distance_max": 10.0}, [[0, 5], [5, 10]])
    assert edge.source == found.node_schema.source == str(path)
    assert (found.node_schema.dim, found.node_schema.columns) == (4, COLUMNS)
    assert (found.metadata_path, found.builder) == (path, {"id": "b", "version": "2"})
    assert (found.sample_graph, found.sample_edge_count, found.sample_node_count) == ("A/A_1", 6, 4)


def test_without_anything_the_widths_are_known(graph_dir: Path):
    found = quiet(graph_dir)
    assert found.edge_schema == EdgeSchema(dim=3)
    assert found.node_schema == NodeSchema(dim=4)
    assert (found.metadata_path, found.summary_path, found.builder) == (None, None, {})
    assert any("no sidecar" in note for note in found.notes)


@in_turn(
    "content, note",
    [
        ("{", "expected valid JSON"),
        ("", "expected valid JSON"),
        ("{}", "found an empty object"),
        ("[]", "found a list"),
        ("3", "found a int"),
        ({"_builder": {"id": "b"}}, "no entry for 3 of 3 graphs"),
        ({"C/C_9": ENTRY}, "no entry for 3 of 3 graphs"),
        (dict.fromkeys(NAMES, None), "edge_module missing or of a wrong type in 3 of 3"),
        (dict.fromkeys(NAMES, "text"), "edge_module missing or of a wrong type in 3 of 3"),
        (dict.fromkeys(NAMES, {"edge_metadata": []}), "edge_metadata.feature_dim missing or of a wrong type"),
        (
            dict.fromkeys(NAMES, {"node_feature_dim": "4"}),
            "node_feature_dim missing or of a wrong type in 3 of 3",
        ),
        (
            dict.fromkeys(NAMES, {"node_feature_dim": True}),
            "node_feature_dim missing or of a wrong type in 3 of 3",
        ),
    ],
)
def test_a_bad_sidecar_is_a_note_and_the_tensors_answer(graph_dir: Path, content: object, note: str):
    write(graph_dir / "graph_metadata.json", content)
    found = quiet(graph_dir)
    assert (found.edge_schema.dim, found.node_schema.dim) == (3, 4)
    assert any(note in line and "graph_metadata.json" in line for line in found.notes), found.notes


def test_a_sidecar_that_is_not_text_is_a_note(graph_dir: Path):
    (graph_dir / "graph_metadata.json").write_bytes(b"\xff\xfe\x00")
    assert any("expected valid JSON" in note for note in quiet(graph_dir).notes)


@in_turn("key", ["edge_module", "edge_params", "edge_metadata", "node_feature_columns", "node_feature_dim"])
def test_each_missing_key_is_named_and_the_others_are_used(graph_dir: Path, key: str):
    lacking = {name: value for name, value in ENTRY.items() if name != key}
    write(graph_dir / "graph_metadata.json", {NAMES[0]: lacking, NAMES[1]: lacking, NAMES[2]: lacking})
    found = quiet(graph_dir)
    assert any(f"{key}" in note and "in 3 of 3 entries" in note for note in found.notes)
    assert found.edge_schema.module == (None if key == "edge_module" else "edge/toy/v3")
    assert found.node_schema.columns == ([] if key == "node_feature_columns" else COLUMNS)


def test_bands_may_be_absent(graph_dir: Path):
    entry = ENTRY | {"edge_metadata": {"feature_dim": 3, "edge_feature_variant": "toy", "bands": None}}
    write(graph_dir / "graph_metadata.json", dict.fromkeys(NAMES, entry))
    found = quiet(graph_dir)
    assert found.edge_schema.bands is None
    assert len(found.notes) == 1 and "no builder summary" in found.notes[0]


@in_turn("option, key", [("metadata_path", "paths.metadata"), ("summary_path", "paths.summary")])
def test_an_explicit_file_must_exist(graph_dir: Path, option: str, key: str):
    with pytest.raises(DataError, match=rf"absent\.json: .*{key} names, found no such file"):
        resolve_schema(graph_dir, **{option: graph_dir / "absent.json"})


def test_an_explicit_sidecar_is_used(graph_dir: Path, tmp_path: Path):
    write(graph_dir / "graph_metadata.json", dict.fromkeys(NAMES, ENTRY | {"edge_module": "edge/beside/v1"}))
    path = write(tmp_path / "elsewhere.json", dict.fromkeys(NAMES, ENTRY))
    found = quiet(graph_dir, metadata_path=path)
    assert (found.edge_schema.module, found.metadata_path) == ("edge/toy/v3", path)


# --- tensors win ---


@in_turn(
    "change, said",
    [
        (
            {"edge_metadata": ENTRY["edge_metadata"] | {"feature_dim": 24}},
            "24 features per edge .* tensors have 3",
        ),
        ({"node_feature_dim": 172}, "172 features per node .* tensors have 4"),
        ({"node_feature_columns": COLUMNS[:2]}, "2 names of node columns .* tensors have 4"),
    ],
)
def test_tensors_win_with_both_numbers_and_the_file(graph_dir: Path, change: dict, said: str):
    write(graph_dir / "graph_metadata.json", dict.fromkeys(NAMES, ENTRY | change))
    with pytest.warns(UserWarning, match=rf"graph_metadata\.json: {said}") as caught:
        found = resolve_schema(graph_dir)
    assert (found.edge_schema.dim, found.node_schema.dim) == (3, 4)
    assert found.notes[0] == str(caught[0].message)
    assert caught[0].filename == __file__  # the warning points at the caller
    assert found.node_schema.columns in (COLUMNS, [])


def test_one_wrong_entry_among_many_is_found(graph_dir: Path):
    wrong = ENTRY | {"edge_metadata": ENTRY["edge_metadata"] | {"feature_dim": 24}}
    write(graph_dir / "graph_metadata.json", {NAMES[0]: ENTRY, NAMES[1]: ENTRY, NAMES[2]: wrong})
    with pytest.warns(UserWarning, match="24 features per edge for B/B_0, but the tensors have 3"):
        resolve_schema(graph_dir)


def test_entries_that_disagree_about_names(graph_dir: Path):
    other = ENTRY | {"edge_module": "edge/other/v1"}
    write(graph_dir / "graph_metadata.json", {NAMES[0]: other, NAMES[1]: ENTRY, NAMES[2]: ENTRY})
    expected = r"2 values of edge_module \(edge/toy/v3 for A/A_1 and 1 more, edge/other/v1 for A/A_0\)"
    with pytest.warns(UserWarning, match=expected):
        found = resolve_schema(graph_dir)
    assert found.edge_schema.module == "edge/toy/v3"


def test_columns_that_are_not_text_are_dropped(graph_dir: Path):
    write(
        graph_dir / "graph_metadata.json",
        dict.fromkeys(NAMES, ENTRY | {"node_feature_columns": [1, 2, 3, 4]}),
    )
    assert quiet(graph_dir).node_schema == NodeSchema(4)


def test_graphs_of_two_widths_are_an_error(graph_dir: Path):
    save(graph_dir / "C/C_0.pt", edges=0, edge_width=5)
    with pytest.raises(SchemaError, match=r"found 3 in 3 files \(A/A_0.pt, .*; 5 in 1 file \(C/C_0.pt\)"):
        resolve_schema(graph_dir)


def test_a_directory_of_graphs_without_edges(tmp_path: Path):
    save(tmp_path / "a.pt", edges=0, edge_width=24)
    found = quiet(tmp_path)
    assert (found.edge_schema.dim, found.sample_graph, found.sample_edge_count) == (24, "a", 0)


def test_flat_edge_features_have_width_one(tmp_path: Path):
    flat = Data(torch.zeros(2, 4), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5))
    torch.save(flat, tmp_path / "a.pt")
    assert quiet(tmp_path).edge_schema.dim == 1


def test_only_the_named_graphs_count(graph_dir: Path):
    wrong = ENTRY | {"edge_module": "edge/other/v1"}
    write(graph_dir / "graph_metadata.json", {NAMES[0]: ENTRY, NAMES[2]: wrong})
    store = open_store(graph_dir)
    assert quiet(graph_dir, models=["B/B_0"]).edge_schema.module == "edge/other/v1"
    assert quiet(graph_dir, models=["A/A_0"], store=store).edge_schema.module == "edge/toy/v3"
    with pytest.raises(DataError, match="X/X_0"):
        resolve_schema(graph_dir, models=["X/X_0"], store=store)


# --- inside the graphs ---


def test_metadata_inside_a_graph_fills_gaps(graph_dir: Path):
    inside = {"edge_module": "edge/inside/v1", "edge_info": {"edge_feature_variant": "in", "feature_dim": 3}}
    save(graph_dir / "A/A_1.pt", metadata=inside)
    found = quiet(graph_dir)
    assert (found.edge_schema.module, found.edge_schema.variant) == ("edge/inside/v1", "in")
    assert found.edge_schema.source.endswith("A_1.pt")
    lacking = {key: ENTRY[key] for key in ENTRY if key != "edge_module"}
    write(graph_dir / "graph_metadata.json", dict.fromkeys(NAMES, lacking))
    found = quiet(graph_dir)
    assert (found.edge_schema.module, found.edge_schema.variant) == ("edge/inside/v1", "toy")


# --- builder summary ---


def summary(path: Path, output_dir: object, **more: object) -> Path:
    return write(
        path / "graph_builder_summary.json", {"edge": {"output_dir": output_dir}, "modules": STAGES} | more
    )


def test_the_newest_summary_of_this_directory(graph_dir: Path, tmp_path: Path):
    old = summary(tmp_path / "builds" / "logs" / "a", str(graph_dir))
    new = summary(tmp_path / "logs" / "deep" / "er", str(graph_dir))
    other = summary(tmp_path / "logs" / "b", str(tmp_path / "other"))
    for age, path in enumerate([other, new, old]):
        os.utime(path, (1e9 - age, 1e9 - age))
    found = quiet(graph_dir)
    assert found.summary_path == new
    assert found.module_registry["interface"] == STAGES["interface"]
    assert found.topology_schema == {
        "module": "topology/persistence_basic/v1",
        "alias": "ph",
        "jobs": {"n": 1},
    }
    edge = found.edge_schema
    assert (edge.module, edge.alias, edge.jobs, edge.summary) == (
        "edge/toy/v3",
        "toy",
        {"distance_max": 12.0},
        "toy edges",
    )
    os.utime(old, (2e9, 2e9))
    assert quiet(graph_dir).summary_path == old


@in_turn("output", ["one/graph_data", "./one/../one/graph_data", "builds/one/graph_data"])
def test_a_relative_output_directory(graph_dir: Path, output: str):
    path = summary(graph_dir.parent.parent / "logs", output)
    assert quiet(graph_dir).summary_path == path


def test_output_directory_inside_modules(graph_dir: Path, tmp_path: Path):
    modules = STAGES | {"edge": STAGES["edge"] | {"output_dir": str(graph_dir)}}
    path = write(tmp_path / "logs" / "graph_builder_summary.json", {"modules": modules})
    found = quiet(graph_dir)
    assert found.summary_path == path and "output_dir" not in found.module_registry["edge"]


def test_a_linked_graph_directory_finds_its_summary(graph_dir: Path, tmp_path: Path):
    path = summary(tmp_path / "builds" / "logs", str(graph_dir))
    link = tmp_path / "link"
    link.symlink_to(graph_dir)
    assert quiet(link).summary_path == path


@in_turn("content", ["{", "", "[]", '{"edge": 3}', '{"edge": {"output_dir": 5}, "modules": []}'])
def test_a_bad_summary_is_passed_over(graph_dir: Path, tmp_path: Path, content: str):
    write(tmp_path / "logs" / "bad" / "graph_builder_summary.json", content)
    good = summary(tmp_path / "logs" / "good", str(graph_dir))
    os.utime(good, (1e9, 1e9))
    assert quiet(graph_dir).summary_path == good


@in_turn(
    "content, note",
    [
        ("{", "expected valid JSON"),
        ({"x": 1}, "modules.interface"),
        ({"modules": {"edge": STAGES["edge"]}}, "modules.node"),
    ],
)
def test_a_bad_explicit_summary_is_a_note(graph_dir: Path, tmp_path: Path, content: object, note: str):
    path = write(tmp_path / "given.json", content)
    found = quiet(graph_dir, summary_path=path)
    assert any("given.json" in line and note in line for line in found.notes)


def test_an_explicit_summary_of_a_moved_build_is_used(graph_dir: Path, tmp_path: Path):
    path = summary(tmp_path / "kept", "/not/here/any/more")
    assert quiet(graph_dir).summary_path is None
    assert quiet(graph_dir, summary_path=path / "").edge_schema.alias == "toy"


def test_only_the_stages_of_a_large_summary_are_kept(graph_dir: Path, tmp_path: Path):
    bulk = [{"graph": f"decoy_{number}", "seconds": 0.1} for number in range(50_000)]
    stages = {name: stage | {"per_graph": bulk[:1000]} for name, stage in STAGES.items()}
    path = summary(tmp_path / "logs", str(graph_dir), modules=stages, graphs=bulk)
    assert path.stat().st_size > 2e6
    found = quiet(graph_dir)
    assert found.module_registry == STAGES
    assert len(to_json(found.to_dict())) < 5000


def test_sidecar_wins_over_summary(graph_dir: Path, tmp_path: Path):
    write(graph_dir / "graph_metadata.json", dict.fromkeys(NAMES, ENTRY | {"edge_module": "edge/newer/v9"}))
    summary(tmp_path / "logs", str(graph_dir))
    with pytest.warns(
        UserWarning, match="edge module edge/toy/v3, but edge/newer/v9 in .*graph_metadata.json, which wins"
    ):
        found = resolve_schema(graph_dir)
    assert found.edge_schema.module == "edge/newer/v9"


# --- the record ---


def test_the_keys_of_feature_metadata_json(graph_dir: Path):
    content = quiet(graph_dir).to_dict()
    assert set(content) == {
        *("edge_schema", "node_schema", "module_registry", "metadata_path", "summary_path", "notes"),
        *(
            "sample_graph",
            "sample_edge_count",
            "sample_node_count",
            "topology_schema",
            "builder",
            "schema_sha256",
        ),
    }
    edge_keys = "dim module variant module_params bands alias jobs summary use_layer_norm source"
    assert set(content["edge_schema"]) == set(edge_keys.split())
    assert set(content["node_schema"]) == {"dim", "columns", "source"}


def test_round_trip_through_json_and_a_safe_checkpoint(graph_dir: Path, tmp_path: Path):
    write(graph_dir / "graph_metadata.json", dict.fromkeys(NAMES, ENTRY))
    summary(tmp_path / "logs", str(graph_dir))
    found = quiet(graph_dir)
    assert FeatureSchema.from_dict(json.loads(to_json(found.to_dict()))) == found
    torch.save({"features": found.to_dict()}, tmp_path / "c.chkpt")
    loaded = torch.load(tmp_path / "c.chkpt", weights_only=True)["features"]
    assert FeatureSchema.from_dict(loaded) == found


def test_a_record_of_the_original_is_read():
    found = FeatureSchema.from_dict(
        {
            "edge_schema": {"dim": 24, "source": "x", "extra": 1},
            "node_schema": {"dim": 172},
            "module_registry": None,
        }
    )
    assert (found.edge_schema.dim, found.node_schema.columns, found.module_registry) == (24, [], {})


@in_turn(
    "content",
    [None, {}, {"edge_schema": {"dim": 3}}, {"edge_schema": {"dim": "3"}, "node_schema": {"dim": 4}}],
)
def test_a_record_without_widths_is_an_error(content: object):
    with pytest.raises(SchemaError, match="expected a width"):
        FeatureSchema.from_dict(content)


def test_the_fingerprint_covers_what_matters():
    def make(edge: dict, node: dict, **other: object) -> str:
        return FeatureSchema(EdgeSchema(**edge), NodeSchema(**node), **other).sha256

    base = make({"dim": 3, "module": "m", "variant": "v"}, {"dim": 2, "columns": ["a", "b"]})
    assert base == make(
        {"dim": 3, "module": "m", "variant": "v", "source": "s"},
        {"dim": 2, "columns": ["a", "b"]},
        notes=["n"],
    )
    changed = [
        make({"dim": 4, "module": "m", "variant": "v"}, {"dim": 2, "columns": ["a", "b"]}),
        make({"dim": 3, "module": "n", "variant": "v"}, {"dim": 2, "columns": ["a", "b"]}),
        make({"dim": 3, "module": "m", "variant": "w"}, {"dim": 2, "columns": ["a", "b"]}),
        make({"dim": 3, "module": "m", "variant": "v"}, {"dim": 2, "columns": ["b", "a"]}),
    ]
    assert len({base, *changed}) == 5


def test_differences():
    ours = FeatureSchema(EdgeSchema(11, "edge/a/v1"), NodeSchema(172, node_columns()))
    unknown = FeatureSchema(EdgeSchema(11), NodeSchema(172))
    assert (
        schema_differences(ours, ours)
        == schema_differences(ours, unknown)
        == schema_differences(unknown, ours)
        == []
    )
    wider = FeatureSchema(EdgeSchema(24), NodeSchema(52, node_columns()[::-1][:52]))
    assert schema_differences(ours, wider) == [
        "edge_schema.dim: 11 in the checkpoint, 24 in the graphs",
        "node_schema.dim: 172 in the checkpoint, 52 in the graphs",
    ]
    reordered = FeatureSchema(EdgeSchema(11), NodeSchema(172, node_columns()[::-1]))
    lines = schema_differences(ours, reordered)
    assert lines[0] == "node_schema.columns[0]: rasa in the checkpoint, f1_CNO_death_std in the graphs"
    assert len(lines) == 7 and lines[-1] == "and 166 more"


def test_stage_lines(graph_dir: Path, tmp_path: Path):
    assert quiet(graph_dir).stage_lines()[0] == "interface: module unknown"
    summary(tmp_path / "logs", str(graph_dir))
    lines = quiet(graph_dir).stage_lines()
    assert [line.split(":")[0] for line in lines[:4]] == ["interface", "topology", "node", "edge"]
    assert lines[3] == "edge: edge/toy/v3, variant unknown, 3 features"
    assert "node 4, edge 3" in lines[4]


# --- cost ---


def test_the_sidecar_is_read_once_and_no_graph_when_it_is_complete(
    graph_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    write(graph_dir / "graph_metadata.json", dict.fromkeys(NAMES, ENTRY))
    store, read = open_store(graph_dir), []
    original = sidecar_module.read_json
    monkeypatch.setattr(sidecar_module, "read_json", lambda path: read.append(path) or original(path))
    monkeypatch.setattr(sidecar_module, "read_graph", lambda *_, **__: pytest.fail("a graph file was read"))
    quiet(graph_dir, store=store)
    assert read == [graph_dir / "graph_metadata.json"]


def test_ten_thousand_graphs_resolve_fast(tmp_path: Path):
    count, columns = 10_000, node_columns()
    names = [f"T{number // 20}/D{number}" for number in range(count)]
    entry = ENTRY | {"node_feature_columns": columns, "node_feature_dim": len(columns)}
    write(tmp_path / "graph_metadata.json", dict.fromkeys(names, entry))
    store = GraphStore(
        graph_dir=tmp_path,
        names=names,
        file_sizes=[0] * count,
        digests=[""] * count,
        x=np.zeros((count, len(columns)), dtype=np.float32),
        edges=np.zeros(0, dtype=np.int32),
        edge_attr=np.zeros((0, 3), dtype=np.float32),
        node_counts=torch.ones(count, dtype=torch.int64),
        edge_counts=torch.zeros(count, dtype=torch.int64),
        node_starts=torch.arange(count),
        edge_starts=torch.zeros(count, dtype=torch.int64),
    )
    start = time.process_time()
    found = quiet(tmp_path, store=store)
    assert time.process_time() - start < 20  # about 0.5 s; if every graph were compared with all, minutes
    assert found.node_schema.columns == columns


# --- TopoQA's columns ---


def test_topoqa_columns_are_those_of_a_real_build(shared_dir: Path):
    found = quiet(shared_dir / "data" / "graphs")
    assert found.node_schema.columns == node_columns()
    assert (found.edge_schema.dim, found.edge_schema.module) == (11, "edge/legacy_band/v11")


def test_parity_graphs_resolve_without_a_sidecar(shared_dir: Path):
    widths = [quiet(folder).edge_schema.dim for folder in sorted((shared_dir / "parity").glob("*_h*"))]
    assert widths == [11, 11, 24]


# --- parameters of the stages ---


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureSchema]:
    "Schemas of builds that differ in one parameter, and of one whose summary and recipe were lost."
    folder, schemas = tmp_path_factory.mktemp("builds"), {}
    for number in range(2):
        write_example(folder / "decoys" / f"1HEL_{number}.pdb", helix_pair(8.5 + number))
    for name, params in {
        "plain": [],
        "wide": ["interface.cutoff=14"],
        "dry": ["topology.hetero=no_water"],
        "xyy": ["edge.coordinates=xyy"],
        "split": ["interface.split_on_ter=true"],
    }.items():
        out = folder / name
        build([folder / "decoys"], out, load_recipe(params=params), jobs=1, tell=False)
        schemas[name] = quiet(out / "graph_data")
    shutil.copytree(folder / "plain" / "graph_data", folder / "copied" / "graph_data")
    schemas["copied"] = quiet(folder / "copied" / "graph_data")
    return schemas


@in_turn(
    "name, differences",
    [
        ("wide", ["interface.cutoff: 10.0 in the checkpoint, 14.0 in the graphs"]),
        ("dry", ['topology.hetero: "all" in the checkpoint, "no_water" in the graphs']),
        ("xyy", ["edge_schema.variant: legacy_v11_xyz in the checkpoint, legacy_v11_xyy in the graphs",
                 'edge.coordinates: "xyz" in the checkpoint, "xyy" in the graphs']),
        ("split", []),  # says how files are read
        ("copied", []),  # without its logs: the sidecar has the recipe, too
    ],
)  # fmt: skip
def test_a_parameter_of_a_stage_is_a_difference_that_is_named(builds, name, differences):
    saved = FeatureSchema.from_dict(json.loads(to_json(builds["plain"].to_dict())))  # as a checkpoint has it
    assert schema_differences(saved, builds[name]) == differences
    assert list(known_recipe(builds[name])) == ["interface", "topology", "node", "edge"]


def test_a_checkpoint_without_parameters_is_read_and_that_is_said_once(builds, capsys):
    content = builds["plain"].to_dict() | {"builder": {}, "module_registry": {}}
    content["edge_schema"]["module_params"] = {}
    old = FeatureSchema.from_dict(content)
    for _ in range(2):
        check_features("old.chkpt", old, builds["wide"])
    line = (
        "old.chkpt: not compared, since nobody wrote down the parameters: interface, topology, node, edge of"
    )
    assert capsys.readouterr().err.count(line) == 1
