"Reports as one page: whatever names and files hold, a page loads nothing, runs nothing, and says what is missing."

from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from conftest import in_turn

from topoqa_nb.cli import main
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import RunError, write_json
from topoqa_nb.pipeline.notebook_page import notebook_page
from topoqa_nb.pipeline.pipeline_report import pipeline_page
from topoqa_nb.pipeline.run_report import run_page
from topoqa_nb.pipeline.standing import chosen_model, notebook_answer, standing
from topoqa_nb.runs.record import update_metadata
from topoqa_nb.runs.runs import METRIC_COLUMNS, create_run

HOSTILE = '<img src="x" onerror=alert(1)><script>alert(2)<'  # may be the name of a directory
FORBIDDEN = {"script", "link", "iframe", "object", "embed", "base", "form", "meta http-equiv"}


class Seen(HTMLParser):
    "What a browser would make of a page."

    def __init__(self, page):
        super().__init__()
        self.tags, self.loads, self.handlers, self.words = set(), [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            self.handlers += [name] if name.startswith("on") else []
            if name in ("src", "href", "srcset", "action", "data") and tag != "a":
                self.loads += [] if value.startswith("data:") else [value]

    def handle_data(self, data):
        self.words += data


def check_harmless(page):
    "The page as it is seen, after a look at what it would load or run."
    seen = Seen(page)
    assert not seen.tags & FORBIDDEN
    assert (seen.loads, seen.handlers) == ([], [])
    assert "@import" not in page and "url(" not in page
    return seen


def run_facts(name, score=-0.7, **changes):
    "A run as a stage file has it."
    facts = {"run_name": name, "run_dir": name, "stage": "sweep", "status": "completed", "best_epoch": 7}
    facts |= {"primary_metric": "selection_metric", "score": score, "val_loss": 0.05, "val_spearman": 0.7}
    return facts | {"checkpoint": f"{name}/model_checkpoints/best.chkpt"} | changes


@pytest.fixture
def reports(tmp_path):
    "The reports folder of a pipeline that has just begun."
    folder = tmp_path / "reports"
    write_json(folder / "parameters.json", {"run_root": tmp_path / "runs"})
    return folder


@pytest.fixture
def run(tmp_path):
    "A run of a hostile name that is going, without an epoch."
    loaded = load_config(None, ["num_epochs=9"])
    return create_run(
        tmp_path / "runs", HOSTILE, loaded, loaded.config, notes=HOSTILE, trial_label=HOSTILE, command=["x"]
    )


def test_names_and_notes_of_a_run_are_words(run):
    seen = check_harmless(run_page(run))
    assert seen.words.count(HOSTILE) >= 4  # title, heading, box, notes
    assert "No epoch is done." in seen.words


def test_a_run_that_failed_says_why_and_what_to_do(run):
    rows = [",".join(["0" if name in ("epoch", "step") else "0.5" for name in METRIC_COLUMNS])]
    run.metrics_file.write_text("\n".join([",".join(METRIC_COLUMNS), *rows, ""]))
    update_metadata(run, status="failed", reason=HOSTILE, progress={"epoch": 0, "epochs": 9})
    seen = check_harmless(run_page(run))
    assert "failed, 1 of 9 epochs" in seen.words and "topoqa resume --run-dir" in seen.words
    assert "img" in seen.tags


def test_names_in_a_pipeline_are_words(reports):
    parent = {
        "parent_checkpoint": f"{HOSTILE}/model_checkpoints/a",
        "parent_score": -0.7,
        "trained_score": -0.8,
    }
    tuned = run_facts(HOSTILE + "2", -0.8, stage="phase1", improved_on_parent=True, **parent)
    write_json(reports / "sweep.json", {"status": "completed", "runs": [run_facts(HOSTILE)]})
    write_json(reports / "phase1.json", {"status": "completed", "runs": [tuned]})
    write_json(reports / "phase2.json", {"status": "failed", "error": {"text": HOSTILE}})
    seen = check_harmless(pipeline_page(standing(reports)))
    assert f"phase2: failed: {HOSTILE}" in seen.words and "not judged" in seen.words


def test_a_pipeline_that_is_going_shows_its_runs_as_they_are_now(reports, run):
    write_json(
        reports / "sweep.json", {"status": "running", "jobs": [{"run_name": HOSTILE}, {"run_name": "later"}]}
    )
    selection = {
        "primary_metric": "selection_metric",
        "best_score": -0.4,
        "best_epoch": 3,
        "best_val_loss": 0.1,
    }
    update_metadata(run, selection=selection)
    found = standing(reports)
    assert [(one["run_name"], one["score"], one["status"]) for one in found.runs] == [
        (HOSTILE, -0.4, "running")
    ]
    assert "sweep: running" in check_harmless(pipeline_page(found)).words


@in_turn(
    "final, said",
    [
        (run_facts("a"), ["a (sweep, epoch 7): selection_metric -0.70000"]),
        (
            {"checkpoints": ["a/model_checkpoints/x"]} | run_facts("a"),
            ["a (sweep, epoch 7): selection_metric -0.70000"],
        ),
        ({"checkpoints": ["a/m/x", "b/m/y"]}, ["the mean, 2 models", "a", "b"]),
        (
            {"checkpoints": ["a/m/x", "b/m/y"], "name": "mean of phase 2", "score": -0.7},
            ["mean of phase 2, 2 models: score -0.70000", "a", "b"],
        ),
    ],
)
def test_one_checkpoint_or_several_are_the_answer(reports, final, said):
    write_json(reports / "pipeline_summary.json", {"run_root": reports, "final": final})
    assert chosen_model(standing(reports)) == said


@in_turn(
    "name, content",
    [
        ("parameters.json", {}),
        ("sweep.json", []),
        ("sweep.json", {"status": "completed", "runs": [{"run_name": 3}]}),
        ("phase1.json", {"status": None}),
        ("pipeline_summary.json", {"run_root": "a", "final": {"checkpoints": 7}}),
    ],
)
def test_a_damaged_file_of_a_pipeline_is_one_line(reports, name, content):
    kept = (reports / name).read_text() if (reports / name).exists() else None
    write_json(reports / name, content)
    with pytest.raises(RunError, match=f"{name}.*expected"):
        standing(reports)
    (reports / name).write_text(kept) if kept else (reports / name).unlink()


def test_what_a_notebook_brings_along_is_shown_and_does_nothing(tmp_path):
    new, file = nbformat.v4, tmp_path / "report.ipynb"
    html = f"<table><tr><td onclick='x'>kept {HOSTILE}</td></tr></table><style>@import 'a'</style><iframe src='//a'>"
    outputs = [
        new.new_output("display_data", data={"text/html": html, "text/plain": "x"}),
        new.new_output("display_data", data={"application/javascript": "alert(3)", "text/plain": "a widget"}),
        new.new_output("stream", text="\n".join([HOSTILE] * 30)),
        new.new_output("error", ename="E", evalue=HOSTILE, traceback=[HOSTILE]),
    ]
    prose = f"# {HOSTILE}\n\n![picture](http://a/b.png)\n\n## $x^2$ {HOSTILE}\n\n$$\\alpha_{{ij}}$$\n\n<iframe src='//b'>"
    cells = [new.new_markdown_cell(prose), new.new_code_cell(f"'{HOSTILE}'", outputs=outputs)]
    nbformat.write(new.new_notebook(cells=cells), file)
    seen = check_harmless(notebook_page(file, {"Model": [HOSTILE]}))
    assert "console: 30 lines" in seen.words and "kept " in seen.words and "a widget" in seen.words
    assert "alert(3)" not in seen.words


def test_a_notebook_of_no_pipeline_has_no_box(tmp_path, reports):
    assert notebook_answer(tmp_path / "sweep.ipynb") == {}
    assert notebook_answer(reports / "predict.ipynb") == {}
    assert list(notebook_answer(reports / "full_pipeline.ipynb")) == ["Pipeline", "How good", "Next"]


def test_the_command_writes_one_page_and_refuses_in_one_line(run, reports, capsys, monkeypatch):
    monkeypatch.chdir(reports.parent)
    assert main(["report", "--run-dir", str(run.path), "--out", "run.html"]) == 0
    assert main(["report", "--reports-dir", "reports"]) == 0
    assert (reports / "report.html").is_file() and "report: reports/report.html" in capsys.readouterr().out
    for line in (
        ["report", "--run-dir", str(run.path), "--out", "run.html"],
        ["report", "--run-dir", "absent"],
        ["report", "--reports-dir", "absent", "--out", "new.html"],
        ["report", "--reports-dir", "reports", "--out", "reports/parameters.json/new.html"],
    ):
        assert main(line) == 2, line
        said = capsys.readouterr().err
        assert said.startswith("topoqa: error: ") and said.count("\n") == 1
    assert not Path("new.html").exists() and not Path("absent").exists()
