"The notebooks of pipelines/: their form, and a whole tiny pipeline through papermill."

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from conftest import in_turn

from topoqa_nb.build.report import BuildParameters
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.ground.core import TrainingError, read_json, write_text
from topoqa_nb.ground.html_page import requests_of
from topoqa_nb.pipeline.answer_notebooks import EvaluateParameters, PredictParameters
from topoqa_nb.pipeline.parameters import PipelineParameters
from topoqa_nb.pipeline.pipeline import run_pipeline
from topoqa_nb.pipeline.pipeline_report import pipeline_page
from topoqa_nb.pipeline.plan import STAGES
from topoqa_nb.pipeline.standing import standing
from topoqa_nb.runs.selection import best_checkpoint

PIPELINES = Path(__file__).resolve().parent.parent / "pipelines"
NAMES = [*STAGES, "full_pipeline"]
ANSWERS = {"predict": PredictParameters, "evaluate": EvaluateParameters, "build": BuildParameters}


def cells(name, kind="code"):
    notebook = nbformat.read(PIPELINES / f"{name}.ipynb", 4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def parameter_cell(name):
    (cell,) = [cell for cell in cells(name) if "parameters" in cell.metadata.get("tags", [])]
    return cell.source


# --- form


@in_turn("name", [*NAMES, *ANSWERS])
def test_every_parameter_is_typed_and_commented(name):
    source = parameter_cell(name)
    lines = source.splitlines()
    for assignment in ast.parse(source).body:
        assert isinstance(assignment, ast.AnnAssign), ast.unparse(assignment)
        assert "  # " in lines[assignment.end_lineno - 1], assignment.target.id
    assert not source.startswith("# Parameters\n")


@in_turn("name", NAMES)
def test_all_notebooks_have_the_names_and_defaults_of_the_pipeline(name):
    assert parameter_cell(name) == parameter_cell("full_pipeline")
    names = [line.target.id for line in ast.parse(parameter_cell(name)).body]
    assert names == list(PipelineParameters.model_fields)
    values = {}
    exec(parameter_cell(name), values)
    assert PipelineParameters(**{field: values[field] for field in names}) == PipelineParameters()


@in_turn("name", NAMES)
def test_papermill_can_read_the_parameters(name, caplog):
    found = papermill.inspect_notebook(str(PIPELINES / f"{name}.ipynb"))
    assert set(found) == set(PipelineParameters.model_fields)
    assert all(entry["help"] and entry["inferred_type_name"] != "None" for entry in found.values())
    assert not caplog.records


@in_turn("name", [*NAMES, *ANSWERS])
def test_notebooks_hold_no_logic(name):
    logic = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.If, ast.For, ast.While, ast.Try)
    for cell in cells(name):
        found = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, logic)]
        assert not found, cell.source
        assert not cell.outputs and cell.execution_count is None


@in_turn("name", NAMES)
def test_every_parameter_is_handed_on_as_it_was_given(name):
    sources = [cell.source for cell in cells(name) if cell.source != parameter_cell(name)]
    (call,) = [number for number, source in enumerate(sources) if "check_parameters(globals())" in source]
    for node in ast.walk(ast.parse("\n".join(sources[:call]))):
        if isinstance(node, ast.alias):
            assert (node.asname or node.name) not in PipelineParameters.model_fields
        assert not isinstance(node, ast.Name), "nothing but imports comes before the call"


# --- unknown parameter


@pytest.mark.parametrize(
    ("name", "wrong", "near"),
    [
        ("sweep", "graph_dri", "graph_dir"),
        ("predict", "modles", "models"),
        ("evaluate", "bootstrp", "bootstrap"),
    ],
)
def test_an_unknown_parameter_ends_papermill_with_the_nearest_name(name, wrong, near, tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(PIPELINES / f"{name}.ipynb"),
        "out.ipynb",
        "-p",
        wrong,
        "1",
    ]
    ended = subprocess.run(
        [*command, "--log-level", "ERROR", "--no-progress-bar"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert f"did you mean {near}?" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ipynb"]


# --- a whole pipeline

MANIFEST = """
shared: {overrides: {trainer.num_epochs: 2, trainer.accumulate_grad_batches: 1}}
jobs:
  - {name: plain, config: base.yaml}
  - {name: lower, config: base.yaml, overrides: {optimizer.learning_rate: RATE}}
"""
BASE = "model: {hidden_dim: 8, attention_head: 2}\ndataloader: {batch_size: 4}\n"


def outcome(parameters):
    "The summary, or the error that the pipeline ended with."
    try:
        return run_pipeline(parameters)
    except TrainingError as error:
        return error


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    "A pipeline whose second job cannot be trained, and the same one after its manifest was mended."
    folder = tmp_path_factory.mktemp("pipeline").resolve()
    tiny = write_tiny_dataset(folder / "data", targets=4, decoys=4)
    write_text(folder / "base.yaml", BASE)
    head, *rows = tiny.val_labels.read_text().splitlines()
    parts = {"val.csv": rows[::2], "held_out.csv": rows[1::2]}
    val_labels, test_labels = (
        write_text(folder / name, "\n".join([head, *part]) + "\n") for name, part in parts.items()
    )
    parameters = {
        "graph_dir": "data/" + str(tiny.graph_dir.relative_to(folder / "data")),
        "train_labels": str(tiny.train_labels),
        "val_labels": str(val_labels),
        "test_labels": str(test_labels),
        "manifest": "two.yaml",
        "phase1_config": "base.yaml",
        "phase2_configs": ["base.yaml"],
        "run_root": "runs",
        "reports_dir": "reports",
        "overrides": ["dataloader.seed=101"],
        "phase_overrides": ["trainer.num_epochs=1"],
    }
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_text(folder / "two.yaml", MANIFEST.replace("RATE", "1.0e+30"))
        first = outcome(parameters)
        records = {
            stage: read_json(file)
            for stage in STAGES
            if (file := folder / "reports" / f"{stage}.json").exists()
        }
        pages = [path.name for path in (folder / "reports").glob("*.html")]
        write_text(folder / "two.yaml", MANIFEST.replace("RATE", "0.001"))
        second = outcome(parameters)
    finally:
        os.chdir(before)
    return {"folder": folder, "first": first, "records": records, "pages": pages, "second": second}


def test_a_failed_stage_is_told_as_it_was(attempts):
    assert isinstance(attempts["first"], TrainingError)
    assert "sweep, job lower" in str(attempts["first"])
    assert "finite" in str(attempts["first"])
    assert list(attempts["records"]) == ["sweep"]
    assert attempts["records"]["sweep"]["status"] == "failed"
    assert "full_pipeline.html" in attempts["pages"]


def test_a_second_start_completes_the_pipeline(attempts):
    summary = attempts["second"]
    assert summary["status"] == "completed"
    kept = [job["run_name"] for job in attempts["records"]["sweep"]["jobs"] if job["name"] == "plain"]
    sweep = summary["stages"]["sweep"]
    assert [job["run_name"] for job in sweep["jobs"]][:1] == kept
    counts = {stage: [run["status"] for run in record["runs"]] for stage, record in summary["stages"].items()}
    assert counts == {"sweep": ["completed"] * 2, "phase1": ["completed"], "phase2": ["completed"]}


def test_the_summary_names_the_answer_and_where_it_comes_from(attempts):
    summary, root = attempts["second"], attempts["folder"] / "runs"
    base = summary["stages"]["sweep"]["best"]["run_name"]
    assert summary["stages"]["phase1"]["runs"][0]["run_name"] == f"{base}_phase1"
    assert summary["stages"]["phase2"]["runs"][0]["run_name"] == f"{base}_phase2_seed101"
    scores = [run["score"] for record in summary["stages"].values() for run in record["runs"]]
    best, *means = summary["candidates"]
    assert best["score"] == pytest.approx(min(scores), abs=1e-6)
    assert summary["final"]["score"] == pytest.approx(min(one["score"] for one in summary["candidates"]))
    run, file = root / best["run_names"][0], root / best["checkpoints"][0]
    assert best_checkpoint(run / "model_checkpoints").resolve() == file.resolve()
    assert [one["name"] for one in means] == ["mean of the sweep"]
    assert summary["left_out"] == ["mean of phase 2: no ensemble of 1 run"]
    assert summary["lineage"][0]["stage"] == "sweep"
    held_out = pd.read_csv(attempts["folder"] / "held_out.csv")
    assert summary["test"]["coverage"]["usable"] == len(held_out)
    assert 0 < summary["test"]["metrics"]["loss"] < 1


@pytest.mark.parametrize("name", NAMES)
def test_executed_notebooks_are_reports(attempts, name):
    reports = attempts["folder"] / "reports"
    outputs = [
        output
        for cell in nbformat.read(reports / f"{name}.ipynb", 4).cells
        for output in cell.get("outputs", [])
    ]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], "a report without warnings"
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    page = (reports / f"{name}.html").read_text(encoding="utf-8")
    assert "<table" in page and "<summary>code</summary>" in page
    assert requests_of(page) == [] and len(page) < 5_000_000
    assert page.index('class="answer"') < page.index("<nav>" if "<nav>" in page else "<h2")


def test_the_box_of_a_pipeline_names_its_answer(attempts):
    reports, final = attempts["folder"] / "reports", attempts["second"]["final"]
    box = (reports / "full_pipeline.html").read_text(encoding="utf-8").partition("</div>")[0]
    assert "validation targets" in box and "topoqa predict" in box
    assert all(name in box for name in final["run_names"])
    page = pipeline_page(standing(reports))
    assert requests_of(page) == []
    for heading in (
        "Stages",
        "Runs",
        "Candidates",
        "How sure is the order of the runs?",
        "On the validation targets",
        "Test labels",
        "Lineage",
    ):
        assert f">{heading}</h2>" in page, heading


def test_the_report_shows_the_sections_of_the_contract(attempts):
    notebook = nbformat.read(attempts["folder"] / "reports" / "full_pipeline.ipynb", 4)
    text = json.dumps(notebook)
    for words in (
        "coverage (%)",
        "interface",
        "has the lowest selection_metric",
        "outcome",
        "training mean",
        "ridge",
        "extra trees",
        "Taken: ",
        "By the draw of the",
        "test.csv|val.csv",
        "started from",
    ):
        assert re.search(words, text) or words in text, words
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(figures) == 6
