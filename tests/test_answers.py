"""From a checkpoint to predictions: through the command line and papermill, on good and on bad input."""

import ast
import json
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import REPOSITORY, in_turn

from topoqa_nb.answers import inference
from topoqa_nb.answers.inference import Scorer
from topoqa_nb.answers.predictions import read_predictions
from topoqa_nb.build.report import BuildParameters
from topoqa_nb.cli import main
from topoqa_nb.data.graphs import list_graphs, read_graph
from topoqa_nb.data.tiny import DemoPaths, save_graph, write_tiny_dataset
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import read_json, sha256_file, write_json
from topoqa_nb.network.weights import load_model, published_names
from topoqa_nb.pipeline.answer_notebooks import EvaluateParameters, PredictParameters
from topoqa_nb.runs.runs import find_run, read_metrics
from topoqa_nb.training.training import train

PIPELINES = REPOSITORY / "pipelines"
PARITY = ("linear_11d_h8", "mlp_11d_h8", "mlp_24d_h4")


@dataclass(frozen=True)
class Trained:
    "Two runs, and what they were trained on."

    data: DemoPaths
    root: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("answers")
    data = write_tiny_dataset(folder / "data", targets=5, decoys=4, sidecar=True)
    changes = {
        "paths.graph": data.graph_dir, "model.hidden_dim": 8, "model.attention_head": 2, "trainer.num_epochs": 2,
        "trainer.accumulate_grad_batches": 1,
    }  # fmt: skip
    for seed, name in enumerate(("first", "second")):
        train(load_config(None, changes | {"seed": seed}), run_name=name, output_root=folder / "runs")
    return Trained(data, folder / "runs")


def predict(
    trained: Trained, out: Path, *more: object, models=("first",), graph_dir: Path | None = None
) -> int:
    words = ["predict", "--model", *models, "--graph-dir", graph_dir or trained.data.graph_dir, "--out", out]
    return main([str(word) for word in [*words, "--run-root", trained.root, *more]])


def refused(capsys: pytest.CaptureFixture, out: Path, *arguments: object, **options: object) -> str:
    "The one line of an error that leaves nothing behind."
    before = sorted(out.parent.rglob("*"))
    capsys.readouterr()
    assert predict(*arguments, **options) == 2
    said, err = capsys.readouterr()
    assert said == ""
    assert err.startswith("topoqa: error: ") and err.count("\n") == 1, err
    assert sorted(out.parent.rglob("*")) == before
    return err


# --- what is predicted


def test_predictions_are_those_of_the_training_loop(trained, tmp_path):
    assert predict(trained, tmp_path / "p.csv", "--labels", trained.data.val_labels) == 0
    frame = read_predictions(tmp_path / "p.csv").dropna(subset=["dockq"])
    rows = read_metrics(find_run(trained.root, "first"))
    best = rows.loc[rows.selection_metric.idxmin()]
    assert ((frame.prediction - frame.dockq) ** 2).mean() == pytest.approx(best.val_loss, abs=1e-6)
    assert frame.prediction.corr(frame.dockq) == pytest.approx(best.val_pearson_corr, abs=1e-5)


@in_turn(
    "more",
    [["--batch-size", "1"], ["--batch-size", "7"], ["--no-store"], ["--no-store", "--batch-size", "3"]],
)
def test_neither_batches_nor_the_store_change_a_score(more, trained, tmp_path):
    for name, options in (("usual", []), ("other", more)):
        assert predict(trained, tmp_path / f"{name}.csv", "--overwrite", *options) == 0
    usual, other = (read_predictions(tmp_path / f"{name}.csv") for name in ("usual", "other"))
    assert usual.MODEL.tolist() == other.MODEL.tolist()
    np.testing.assert_allclose(usual.prediction, other.prediction, atol=1e-6)
    metas = [read_json(tmp_path / f"{name}.csv.meta.json") for name in ("usual", "other")]
    assert metas[0]["data"] == metas[1]["data"]


def test_rows_are_ranked_within_their_target(trained, tmp_path):
    assert predict(trained, tmp_path / "p.parquet") == 0
    frame = pd.read_parquet(tmp_path / "p.parquet")
    assert list(frame) == ["MODEL", "target", "prediction", "rank"]
    assert sorted(frame.MODEL) == sorted(list_graphs(trained.data.graph_dir))
    assert frame.equals(frame.sort_values(["target", "rank"], ignore_index=True))
    ranks = frame.groupby("target").prediction.rank(ascending=False)
    assert (ranks == frame["rank"]).all()


def test_several_models_are_an_ensemble(trained, tmp_path):
    assert predict(trained, tmp_path / "p.json", models=("first", "second")) == 0
    frame = pd.DataFrame(read_json(tmp_path / "p.json"))
    members = frame[["prediction_1", "prediction_2"]].to_numpy()
    for column, name in enumerate(("first", "second")):
        assert predict(trained, tmp_path / f"{name}.csv", models=(name,)) == 0
        alone = read_predictions(tmp_path / f"{name}.csv").set_index("MODEL").prediction
        np.testing.assert_allclose(members[:, column], alone[frame.MODEL], atol=1e-9)
    np.testing.assert_allclose(frame.prediction, members.mean(1), atol=1e-12)
    np.testing.assert_allclose(frame.spread, members.std(1, ddof=1), atol=1e-12)


def test_reports_of_a_pipeline_mean_its_final_answer(trained, tmp_path, capsys):
    best = [f"{name}/model_checkpoints/best.ckpt" for name in ("first", "second")]
    for final in ({"checkpoint": best[0]}, {"checkpoint": best[0], "checkpoints": best}):
        write_json(tmp_path / "reports" / "pipeline_summary.json", {"run_root": trained.root, "final": final})
        assert predict(trained, tmp_path / "p.csv", "--overwrite", models=(tmp_path / "reports",)) == 0
        asked = final.get("checkpoints", best[:1])
        found = [model["sha256"] for model in read_json(tmp_path / "p.csv.meta.json")["models"]]
        assert found == [sha256_file(trained.root / name) for name in asked]


def test_copies_are_told_from_an_ensemble(trained, tmp_path, capsys):
    assert predict(trained, tmp_path / "p.csv", models=("first", "first")) == 0
    assert "are the same weights" in capsys.readouterr().err


@pytest.mark.parametrize("variant", PARITY)
def test_the_published_network_is_predicted(variant, shared_dir, tmp_path):
    folder = shared_dir / "parity" / variant
    expected = json.loads((folder / "expected.json").read_text())
    out = tmp_path / "p.csv"
    words = ["predict", "--model", folder / "weights.ckpt", "--graph-dir", folder, "--out", out]
    assert main([str(word) for word in words]) == 0
    found = read_predictions(out).set_index("MODEL").prediction
    names = [name.removesuffix(".pt") for name in expected["graphs"]]
    np.testing.assert_allclose(found[names], expected["scores_float32"], atol=5e-5)
    (model,) = read_json(f"{out}.meta.json")["models"]
    assert model["layout"] == "published" and "does not name them" in model["score"]


def test_an_exported_model_gives_the_same_scores(trained, tmp_path):
    out = tmp_path / "model.safetensors"
    assert main(["export", "--model", "first", "--out", str(out), "--run-root", str(trained.root)]) == 0
    for name, model in (("trained", "first"), ("exported", out)):
        assert predict(trained, tmp_path / f"{name}.csv", models=(model,)) == 0
    assert (tmp_path / "trained.csv").read_bytes() == (tmp_path / "exported.csv").read_bytes()


def test_streaming_holds_few_graphs_at_a_time(trained, monkeypatch):
    read, most = [], []

    def counted(path, **options):
        graph = read_graph(path, **options)
        read.append(weakref.ref(graph))
        most.append(sum(each() is not None for each in read))
        return graph

    monkeypatch.setattr(inference, "read_graph", counted)
    scorer = Scorer.load("first", run_root=trained.root, device="cpu")
    assert len(scorer.predict(trained.data.graph_dir, use_store=False, batch_size=3)) == 20
    assert max(most) <= 2 * 3 + 1


def test_what_is_odd_is_said(trained, tmp_path, capsys):
    graphs = {name: read_graph(path) for name, path in list_graphs(trained.data.graph_dir).items()}
    names = list(graphs)
    for name in names:
        save_graph(graphs[name], tmp_path / "flat" / f"{name.replace('/', '_')}.pt")
    lonely = graphs[names[0]]
    lonely.edge_index, lonely.edge_attr = torch.empty(2, 0, dtype=torch.int64), torch.empty(0, 3)
    save_graph(lonely, tmp_path / "flat" / "lonely.pt")
    (tmp_path / "flat" / "cut.pt").write_bytes(b"PK")
    assert predict(trained, tmp_path / "p.csv", "--skip-unreadable", graph_dir=tmp_path / "flat") == 0
    err = capsys.readouterr().err
    assert "1 graphs have no edges, so their score says little: lonely" in err
    assert "warning: 1 of 22 graphs could not be read and have no score: cut" in err
    assert "21 graphs have no known target" in err
    meta = read_json(tmp_path / "p.csv.meta.json")
    assert list(meta["data"]["skipped"]) == ["cut"] and meta["data"]["graphs"] == 21
    frame = read_predictions(tmp_path / "p.csv")
    assert frame["rank"].tolist() == list(range(1, 22)) and frame.prediction.between(0, 1).all()
    regex = ["--target-regex", "^(TINY..)_"]
    assert predict(trained, tmp_path / "t.csv", "--skip-unreadable", *regex, graph_dir=tmp_path / "flat") == 0
    assert read_predictions(tmp_path / "t.csv").target.nunique() == 5


# --- bad input


def test_what_is_no_model_is_refused(trained, tmp_path, capsys):
    torch.save({"weights": torch.ones(2)}, tmp_path / "else.pt")
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "pipeline_summary.json").write_text("{}")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    out = tmp_path / "p.csv"
    for model, part in (
        ("frist", "did you mean first?"),
        (trained.data.graph_dir, "a directory that is none of them"),
        (tmp_path / "else.pt", "expected weights in the published layout"),
        (tmp_path / "notes.txt", "expected a checkpoint saved with torch.save"),
        (tmp_path / "reports", "pipeline_summary.json: run_root: expected the final answer"),
        (tmp_path / "cut.safetensors", "expected a whole safetensors file"),
    ):
        assert part in refused(capsys, out, trained, out, models=(model,))
    assert main(["predict", "--graph-dir", str(trained.data.graph_dir), "--out", str(out)]) == 2
    assert "--model: expected at least one model, found none" in capsys.readouterr().err


def test_other_schemas_are_refused_with_every_field(trained, tmp_path, capsys):
    other = write_tiny_dataset(tmp_path / "other", node_width=6, edge_width=7, sidecar=True)
    changes = {
        "paths.graph": other.graph_dir,
        "model.hidden_dim": 8,
        "model.attention_head": 2,
        "num_epochs": 1,
    }
    run = train(load_config(None, changes), run_name="other", output_root=tmp_path / "runs")
    out = tmp_path / "p.csv"
    for more in ([], ["--no-store"], ["--skip-unreadable"]):
        err = refused(capsys, out, trained, out, *more, graph_dir=other.graph_dir)
        assert "edge_schema.dim: 3 in the checkpoint, 7 in the graphs" in err
        assert "node_schema.dim: 5 in the checkpoint, 6 in the graphs" in err
    err = refused(capsys, out, trained, out, models=("first", run.path))
    assert "edge_schema.dim: 3 in " in err and "node_schema.dim: 5 in " in err


def test_graphs_that_cannot_be_scored_are_refused(trained, tmp_path, capsys):
    out, bad = tmp_path / "p.csv", tmp_path / "bad"
    bad.mkdir()
    assert "expected *.pt files at any depth, found none" in refused(capsys, out, trained, out, graph_dir=bad)
    (bad / "cut.pt").write_bytes(b"PK")
    for more in ([], ["--no-store"]):
        assert "cut.pt" in refused(capsys, out, trained, out, *more, graph_dir=bad)
    assert "found none of 1" in refused(capsys, out, trained, out, "--skip-unreadable", graph_dir=bad)


def test_labels_of_none_of_the_graphs_are_refused(trained, tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("MODEL,dockq\nelsewhere,0.5\n")
    out = tmp_path / "p.csv"
    err = refused(capsys, out, trained, out, "--labels", tmp_path / "labels.csv")
    assert "1 label without a graph, such as elsewhere" in err


def test_places_that_cannot_be_written_are_refused_before_the_scoring(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inference, "list_graphs", None)  # whoever looked at the graphs would fail
    (tmp_path / "there.csv").write_text("old")
    (tmp_path / "folder.csv").mkdir()
    for name, part in (
        ("there.csv", "expected a file that is not there yet"),
        ("folder.csv", "found a directory"),
        ("there.csv/p.csv", "which is a file"),
        ("table.xlsx", "use one of .csv, .json, .parquet"),
    ):
        assert part in refused(capsys, tmp_path / "x", trained, tmp_path / name)
    assert (tmp_path / "there.csv").read_text() == "old"


def test_a_failure_while_writing_leaves_the_old_table(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.csv"
    assert predict(trained, out) == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(frame, path, **options):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    assert predict(trained, out, "--overwrite", models=("second",)) == 2
    assert "No space left" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- what is judged


def evaluate(trained: Trained, *words: object) -> int:
    place = ["--run-root", trained.root] if "--model" in words else []
    labels = ["--labels", trained.data.train_labels]
    return main(
        [str(word) for word in ["evaluate", *words, *labels, *place, "--bootstrap", "20", "--format", "json"]]
    )


def test_whatever_can_predict_can_be_judged(trained, tmp_path, capsys):
    best = [f"{name}/model_checkpoints/best.ckpt" for name in ("first", "second")]
    final = {"run_root": trained.root, "final": {"checkpoints": best}}
    write_json(tmp_path / "reports" / "pipeline_summary.json", final)
    exported = tmp_path / "model.safetensors"
    assert main(["export", "--model", "first", "--out", str(exported), "--run-root", str(trained.root)]) == 0
    weights = {"state_dict": published_weights(trained.root / best[0])}
    torch.save(weights, tmp_path / "published.ckpt")
    assert predict(trained, tmp_path / "both.csv", models=("first", "second")) == 0
    assert predict(trained, tmp_path / "one.csv") == 0
    capsys.readouterr()
    for models, file in (
        (["first", "second"], "both.csv"),
        ([tmp_path / "reports"], "both.csv"),
        (["first"], "one.csv"),
        ([exported], "one.csv"),
        ([tmp_path / "published.ckpt"], "one.csv"),
    ):
        assert evaluate(trained, "--model", *models, "--graph-dir", trained.data.graph_dir) == 0
        asked = json.loads(capsys.readouterr().out)
        assert evaluate(trained, "--predictions", tmp_path / file) == 0
        read = json.loads(capsys.readouterr().out)
        assert asked["decoys"] == read["decoys"] == 16
        values = [{name: each["value"] for name, each in one["measures"].items()} for one in (asked, read)]
        assert values[0] == pytest.approx(values[1], abs=1e-5, nan_ok=True)


def published_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    network, _ = load_model(checkpoint)
    return {name: network.state_dict()[own] for own, name in published_names(network).items()}


def test_only_labelled_graphs_are_scored_for_a_judgement(trained, monkeypatch, capsys):
    scored = []
    monkeypatch.setattr(inference, "_score_part", lambda models, device, part: count(scored, part))
    assert evaluate(trained, "--model", "first", "--graph-dir", trained.data.graph_dir) == 0
    assert len(scored) == 16


def count(scored: list[str], part: object) -> np.ndarray:
    scored += part.names
    return np.linspace(0, 1, len(part.names))[:, None]


# --- the notebooks


@pytest.mark.parametrize("kind", [PredictParameters, EvaluateParameters, BuildParameters])
def test_a_notebook_has_the_parameters_of_its_model(kind):
    name = kind.__name__.removesuffix("Parameters").lower()
    found = papermill.inspect_notebook(str(REPOSITORY / "pipelines" / f"{name}.ipynb"))
    assert list(found) == list(kind.model_fields)
    assert all(entry["help"] and entry["inferred_type_name"] != "None" for entry in found.values())
    values = {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}
    assert kind(**values) == kind()


def test_the_notebooks_predict_and_judge(trained, tmp_path):
    values = {
        "graph_dir": str(trained.data.graph_dir),
        "run_root": str(trained.root),
        "models": ["first", "second"],
    }
    options = {"cwd": tmp_path, "progress_bar": False}
    papermill.execute_notebook(PIPELINES / "predict.ipynb", tmp_path / "predict.ipynb", values, **options)
    assert len(read_predictions(tmp_path / "predictions.csv")) == 20
    assert "TINY01" in (tmp_path / "predict.ipynb").read_text()
    values |= {"labels": str(trained.data.train_labels), "bootstrap": 20, "out": "answer"}
    papermill.execute_notebook(PIPELINES / "evaluate.ipynb", tmp_path / "evaluate.ipynb", values, **options)
    assert read_json(tmp_path / "answer" / "evaluation.json")["decoys"] == 16
    for name in ("predict", "evaluate"):
        assert "image/png" in (tmp_path / f"{name}.ipynb").read_text()
