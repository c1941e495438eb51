"Files as other tools, other copies and older versions leave them: read for what they are, or named in one line."

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import in_turn
from original_stack import SECTIONED, write_original_run
from torch_geometric.data import Batch, Data

from topoqa_nb.cli import main
from topoqa_nb.data.graphs import read_graph
from topoqa_nb.data.labels import match_labels, read_labels
from topoqa_nb.data.schema import EdgeSchema, FeatureSchema, NodeSchema
from topoqa_nb.data.sidecar import read_summary
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.entry import joined_pairs
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import ConfigError, DataError, RunError
from topoqa_nb.network.kernels import find_numba
from topoqa_nb.network.model import TopoQANet
from topoqa_nb.network.weights import published_names
from topoqa_nb.runs.leaderboard import leaderboard, summarise
from topoqa_nb.runs.record import RunDirectory
from topoqa_nb.runs.runs import create_run, list_runs
from topoqa_nb.training.resume import resume
from topoqa_nb.training.training import train

KERNELS = ("reference", "torch", *(["numba"] if find_numba() else []))


def network(node_width: int = 5, edge_width: int = 3, **options: object) -> TopoQANet:
    torch.manual_seed(1)
    schema = FeatureSchema(EdgeSchema(edge_width), NodeSchema(node_width))
    return TopoQANet(schema, hidden_dim=8, attention_head=2, **options).eval()


def graph(nodes: int, edges: int, node_width: int = 5, edge_width: int = 3) -> Data:
    draw = torch.Generator().manual_seed(nodes)
    index = torch.randint(0, nodes, (2, edges), generator=draw)
    x, edge_attr = (
        torch.rand(nodes, node_width, generator=draw),
        torch.rand(edges, edge_width, generator=draw),
    )
    return Data(x=x, edge_index=index, edge_attr=edge_attr)


# --- runs of the original that were copied ---


@pytest.mark.parametrize("form", ["text", "far"])
def test_the_best_of_a_copied_original_run_is_found(tmp_path, form):
    run = RunDirectory(write_original_run(tmp_path / "polish"))
    link = run.checkpoints / "best.ckpt"
    name = link.readlink()
    if form == "text":
        link.unlink()
        link.write_text(str(name))
    assert Path(summarise(run)["best_checkpoint"]).name in (name.name, "best.ckpt")
    assert Path(summarise(run)["best_checkpoint"]).read_text() == "weights"
    with pytest.raises(RunError, match="original"):
        resume(run)


@in_turn("content", ['{"node_schema": null}', "[]", '{"node_schema": {"dim": 172}}', "null"])
def test_features_of_an_original_run_that_say_little(tmp_path_factory, content, capsys):
    run = write_original_run(tmp_path_factory.mktemp("runs") / "polish")
    (run / "feature_metadata.json").write_text(content)
    assert main(["summarise", "--run-dir", str(run)]) in (0, 2)
    out, err = capsys.readouterr()
    assert json.loads(out)["schema"] is None or "node" in out if out else err.count("\n") == 1


def test_latest_that_a_copy_made_a_folder_is_no_second_run(tmp_path):
    loaded = load_config(None, [f"paths.save_dir={tmp_path}"])
    made = create_run(tmp_path, "one", loaded, loaded.config)
    (tmp_path / "latest").unlink()
    shutil.copytree(made.path, tmp_path / "latest", symlinks=True)
    assert [run.name for run in list_runs(tmp_path)] == ["one"]
    assert [row["run_name"] for row in leaderboard(tmp_path)] == ["one"]


# --- graphs, labels, summaries ---


def test_a_truncated_graph_is_called_damaged_wherever_it_was_cut(tmp_path):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save(graph(6, 12), whole)
    content = whole.read_bytes()
    for size in range(1, len(content), 97):
        cut.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"(truncated|damaged).*; build or copy the file again"):
            read_graph(cut)


def test_summaries_of_equal_age_are_told_apart_by_their_names(tmp_path):
    graphs = write_tiny_dataset(tmp_path / "data").graph_dir
    for folder, alias in (
        ("graph_builder.2025-12-05_00-42-43", "new"),
        ("history/graph_builder.2025-12-01_11-19-13", "old"),
    ):
        file = tmp_path / "logs" / folder / "graph_builder_summary.json"
        file.parent.mkdir(parents=True)
        edge = {"id": "edge/m/v1", "alias": alias, "kind": "edge"}
        file.write_text(json.dumps({"edge": {"output_dir": str(graphs)}, "modules": {"edge": edge}}))
        os.utime(file, (1_700_000_000, 1_700_000_000))
    assert read_summary(graphs).stages["edge"]["alias"] == "new"


@in_turn(
    "text, models",
    [
        ("Target,Model,DockQ,CAPRI\n1ACB,d0,0.5,1\n2SNI,d0,0.1,0\n", ["1ACB/d0", "2SNI/d0"]),
        ("Target,MODEL,dockq\n1ACB,d0,0.5\n2SNI,d0,0.1\n", ["1ACB/d0", "2SNI/d0"]),
    ],
)
def test_labels_with_a_column_of_targets(tmp_path, text, models):
    (tmp_path / "labels.csv").write_text(text)
    assert read_labels(tmp_path / "labels.csv").table.MODEL.tolist() == models


def test_labels_of_structure_files_find_their_graphs(tmp_path):
    (tmp_path / "labels.csv").write_text("MODEL,dockq\n1ACB/d0.pdb,0.5\n1ACB/d1.pdb,0.2\n")
    matched = match_labels(read_labels(tmp_path / "labels.csv"), ["1ACB/d0", "1ACB/d1"])
    assert not matched.missing


# --- configurations ---


def test_the_later_sections_of_the_original_are_refused_all_at_once(tmp_path):
    sections = (
        "tuning: {labels: t.csv}\nvariance_reduction: {enabled: true}\nranking_loss: {enabled: true}\n"
        "cache: {enabled: true}\nramdisk: {enabled: true, size_gb: 8}\n"
    )
    (tmp_path / "theirs.yaml").write_text(sections)
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "theirs.yaml")
    for name in ("tuning", "variance_reduction", "ranking_loss", "cache", "ramdisk"):
        assert name in str(refused.value)
    (tmp_path / "flat.yaml").write_text(
        "trainer: {use_val_spearman_as_secondary: true, spearman_secondary_weight: 0.5}\n"
    )
    assert load_config(tmp_path / "flat.yaml").config.selection.spearman_weight == 0.5


def test_dates_octals_and_mappings_in_yaml(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("dataloader: {seed: 0222}\nmlflow: {run_name: 2025-11-03}\n")
    config = load_config(tmp_path / "c.yaml").config
    assert (config.dataloader.seed, config.mlflow.run_name) == (222, "2025-11-03")
    (tmp_path / "m.yaml").write_text("config: c.yaml\njobs:\n  a: {}\n")
    assert main(["batch", "--manifest", str(tmp_path / "m.yaml"), "--dry-run"]) == 2
    assert "list" in capsys.readouterr().err


# --- networks ---


def test_a_published_linear_encoder_names_its_setting(tmp_path):
    data = write_tiny_dataset(tmp_path / "data")
    sample = read_graph(sorted(data.graph_dir.rglob("*.pt"))[0])
    model = network(sample.x.shape[1], sample.edge_attr.shape[1], edge_encoder="linear")
    names, file = published_names(model), tmp_path / "published.ckpt"
    torch.save({"model." + names[key]: value for key, value in model.state_dict().items()}, file)
    settings = {
        "paths.graph": data.graph_dir,
        "paths.train_labels": data.train_labels,
        "paths.val_labels": data.val_labels,
    }
    settings |= {
        "paths.save_dir": tmp_path / "runs",
        "paths.store": tmp_path / "stores",
        "model.hidden_dim": 8,
        "model.attention_head": 2,
    }
    with pytest.raises(Exception, match="model.edge_encoder=linear"):
        train(load_config(None, settings), parent=file)
    assert not (tmp_path / "runs").exists() or list_runs(tmp_path / "runs") == []


@in_turn("kernel", KERNELS)
def test_a_graph_scores_the_same_alone_and_beside_empty_ones(monkeypatch, kernel):
    monkeypatch.setenv("TOPOQA_KERNEL", kernel)
    graphs = [graph(*size) for size in ((12, 30), (1, 0), (20, 90), (5, 0), (7, 1), (3, 0))]
    model = network()
    with torch.no_grad():
        alone = torch.cat([model(Batch.from_data_list([each])) for each in graphs])
        together = model(Batch.from_data_list(graphs))
    assert torch.isfinite(together).all()
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


def test_very_wide_edges_give_each_kernel_the_same_scores(monkeypatch):
    batch = Batch.from_data_list([graph(nodes, 40, 204, 2081) for nodes in (9, 14)])
    model, scores = network(204, 2081), []
    for kernel in KERNELS:
        monkeypatch.setenv("TOPOQA_KERNEL", kernel)
        with torch.no_grad():
            scores.append(model(batch))
        torch.testing.assert_close(scores[-1], scores[0], rtol=0, atol=1e-6)


# --- what was typed, and what an old run does not say ---


def test_a_pair_does_not_swallow_the_option_after_it():
    for pair in (["run_root=out"], ["run_root", "out"]):
        given = ["pipeline", "-p", *pair, "--dry-run"]
        assert joined_pairs(given) == ["pipeline", "--parameter", "run_root=out", "--dry-run"]


def test_runs_of_equal_settings_one_of_which_names_no_seed(tmp_path, capsys):
    for name, seed in (("with_seed", 222), ("without_seed", None)):
        loader = {"batch_size": 16} | ({"seed": seed} if seed else {})
        write_original_run(tmp_path / name, config=SECTIONED | {"dataloader": loader})
    assert main(["leaderboard", "--root", str(tmp_path), "--by-config"]) == 0
    assert "222, unknown" in capsys.readouterr().out
