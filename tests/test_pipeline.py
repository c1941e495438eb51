"The pipeline's decisions: what runs, under which name, from which checkpoint, and what a second start does."

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from topoqa_nb.answers.models import PipelineSummary, model_files, read_summary
from topoqa_nb.data.dataset import open_data
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.ground.core import (
    CheckpointError,
    ConfigError,
    DataError,
    RunError,
    TrainingError,
    held,
    read_json,
    write_json,
    write_text,
)
from topoqa_nb.ground.signals import Interrupted
from topoqa_nb.network.metrics import regression_metrics
from topoqa_nb.pipeline import pipeline as pipeline_module
from topoqa_nb.pipeline.final import finish
from topoqa_nb.pipeline.parameters import PipelineParameters, absolute_parameters, pipeline_parameters
from topoqa_nb.pipeline.pipeline import check_parameters, execute_stage, injected_names, run_pipeline
from topoqa_nb.pipeline.pipeline_report import pipeline_page
from topoqa_nb.pipeline.plan import DEMO_PHASES, open_pipeline, plan_pipeline
from topoqa_nb.pipeline.reports import choice_lines, held_out_sentence, outcome_lines
from topoqa_nb.pipeline.stage_record import read_stage
from topoqa_nb.pipeline.stages import (
    fine_tune_config,
    parent_shapes,
    phase1_stage,
    phase2_stage,
    sweep_stage,
)
from topoqa_nb.pipeline.standing import chosen_files, standing
from topoqa_nb.runs.record import update_metadata
from topoqa_nb.runs.runs import create_run
from topoqa_nb.sweep.jobs import JobResult, SweepResult
from topoqa_nb.sweep.sweep import in_training

MANIFEST = """
shared: {overrides: {trainer.num_epochs: 2}}
jobs:
  - {name: plain, config: sched_boost_seed222.yaml}
  - {name: lr035, config: sched_boost_lr035_seed222.yaml}
"""


class StandIn:
    "Writes the run directories that trainings would leave, and remembers what it was asked."

    def __init__(self, scores=None, dies=(), fingerprint=None, improved=None):
        self.scores, self.dies, self.fingerprint, self.improved = scores or {}, dies, fingerprint, improved
        self.asked, self.names = [], []

    def __call__(self, waiting, **options):
        self.names.append(options.get("name"))
        in_training(waiting)  # as `run_jobs`: what a dead process was just writing is removed
        return SweepResult(tuple(self.run(job) for job in waiting))

    def run(self, job):
        self.asked.append(job)
        config = job.loaded.config
        run = create_run(config.paths.save_dir, job.run_name, job.loaded, config, command=["stand-in"])
        score = self.scores.get(job.name, -0.5)
        checkpoint = f"checkpoint.sel-{score:.5f}_val-0.05000_epoch001.chkpt"
        write_text(run.checkpoints / checkpoint, "weights")
        status = "failed" if job.name in self.dies else "completed"
        parent = {"parent_checkpoint": job.resume_from, "parent_score": {"selection_metric": -0.5}}
        update_metadata(
            run,
            status=status,
            selection={
                "primary_metric": config.selection.primary_metric,
                "best_score": score,
                "best_epoch": 1,
                "best_val_loss": 0.05,
                "best_val_spearman": 0.5,
            },
            checkpoints={"best": checkpoint},
            lineage=parent | {"improved_on_parent": self.improved} if job.resume_from else {"mode": "fresh"},
            data={"fingerprint": self.fingerprint},
        )
        return JobResult(job.name, run.path, status, reason="out of memory")


def guess(checkpoint, split, schema):
    "In the place of a network: the labels with an error of their own for each run; the best runs err least."
    draw = np.random.default_rng(sum(Path(checkpoint).parent.parent.name.encode()))
    return np.clip(split.dockq.numpy() + draw.normal(0, 0.1, len(split)), 0, 1)


def alike(checkpoint, split, schema):
    "As if all runs had the same weights."
    return np.linspace(0, 1, len(split))


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_dataset(tmp_path / "data")


@pytest.fixture
def given(tmp_path, tiny):
    "Parameters as a caller would write them."
    return {
        "graph_dir": str(tiny.graph_dir),
        "train_labels": str(tiny.train_labels),
        "val_labels": str(tiny.val_labels),
        "manifest": str(write_text(tmp_path / "two.yaml", MANIFEST)),
        "run_root": str(tmp_path / "runs"),
        "reports_dir": str(tmp_path / "reports"),
    }


def absolute(values, base):
    return absolute_parameters(pipeline_parameters(values), Path(base))


def opened(values, base):
    return open_pipeline(absolute(values, base))


# --- parameters


def test_every_parameter_of_the_contract_has_a_default():
    names = """graph_dir train_labels val_labels manifest run_root skip_sweep skip_fine resume_from test_labels
    phase1_config phase2_configs phase2_from num_workers jobs executor fast_dev_run overrides phase_overrides
    reports_dir ensemble families recipe"""
    assert set(PipelineParameters.model_fields) == set(names.split())
    assert PipelineParameters().phase2_from == "phase1"


@pytest.mark.parametrize(
    "name, value",
    [
        ("skip_fine", 1),
        ("num_workers", -1),
        ("num_workers", True),
        ("jobs", "many"),
        ("phase2_from", "x"),
        ("ensemble", "mean"),
        ("recipe", "best"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"pipeline parameter {name}"):
        pipeline_parameters({name: value})


def test_an_unknown_name_that_papermill_assigned_is_refused(monkeypatch):
    class Shell:
        class history_manager:
            input_hist_raw = ["", "graph_dir: str = None", '# Parameters\ngraph_dri = "x"\nIn = 1\n']

    monkeypatch.setattr(pipeline_module, "get_ipython", Shell)
    with pytest.raises(ConfigError, match=r"graph_dri.*did you mean graph_dir\?"):
        check_parameters({"graph_dir": None})


def test_without_papermill_there_is_nothing_to_refuse():
    assert check_parameters({"jobs": 2}).jobs == 2
    assert injected_names([]) == []


def test_a_namespace_holds_more_than_parameters():
    assert check_parameters({"jobs": 2, "run": "a value", "_": 3}) == check_parameters({"jobs": 2})


def test_relative_paths_belong_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"graph_dir": "graphs", "run_root": "runs", "overrides": ["paths.summary=s.json"]}
    parameters = check_parameters(given)
    assert parameters.graph_dir == tmp_path / "graphs"
    assert parameters.run_root == tmp_path / "runs"
    assert Path(parameters.overrides["paths.summary"]) == tmp_path / "s.json"


# --- before anything runs


def test_a_mistake_for_phase_2_is_found_before_the_sweep(given, tmp_path):
    broken = write_text(tmp_path / "phase2.yaml", "optimizer: {learning_rat: 0.1}")
    with pytest.raises(ConfigError, match="learning_rate"):
        opened(given | {"phase2_configs": [str(broken)]}, tmp_path)
    assert not (tmp_path / "reports").exists()


def test_missing_files_are_found_before_the_sweep(given, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        opened(given | {"resume_from": "absent.ckpt"}, tmp_path)
    with pytest.raises(ConfigError, match="run_cor.yaml"):
        opened(given | {"manifest": "run_cor.yaml"}, tmp_path)


def test_two_metrics_in_one_pipeline_are_refused(given, tmp_path):
    with pytest.raises(ConfigError, match="one metric"):
        opened(given | {"phase_overrides": ["selection.primary_metric=val_loss"]}, tmp_path)
    opened(given | {"overrides": ["selection.primary_metric=val_loss"]}, tmp_path)


def test_the_plan_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_pipeline(absolute({}, tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert [job["stage"] for job in plan["jobs"]] == ["sweep"] * 3 + ["phase1"] + ["phase2"] * 3
    assert plan["jobs"][3]["trainer.num_epochs"] == DEMO_PHASES["trainer.num_epochs"]
    json.dumps(plan)


def test_default_manifest_and_phases_depend_on_the_data(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(plan_pipeline(absolute({}, tmp_path))["manifest"]).name == "run_demo.yaml"
    real = {name: given[name] for name in ("graph_dir", "train_labels", "val_labels")}
    plan = plan_pipeline(absolute(real, tmp_path))
    assert Path(plan["manifest"]).name == "run_core.yaml"
    assert plan["jobs"][3]["trainer.num_epochs"] == 120
    by_override = {
        "overrides": [
            f"paths.graph={given['graph_dir']}",
            *(f"paths.{name}={given[name]}" for name in ("train_labels", "val_labels")),
        ]
    }
    assert Path(plan_pipeline(absolute(by_override, tmp_path))["manifest"]).name == "run_core.yaml"


# --- stages


def test_overrides_reach_all_stages_and_phase_overrides_the_phases(given, tmp_path):
    run = opened(
        given | {"overrides": "model.hidden_dim=8", "phase_overrides": {"trainer.num_epochs": 5}}, tmp_path
    )
    jobs = StandIn()
    sweep_stage(run, jobs), phase1_stage(run, jobs), phase2_stage(run, jobs)
    assert {job.loaded.config.model.hidden_dim for job in jobs.asked} == {8}
    assert [job.loaded.config.trainer.num_epochs for job in jobs.asked] == [2, 2, 5, 5, 5, 5]
    assert {job.loaded.config.paths.graph for job in jobs.asked} == {Path(given["graph_dir"])}


def test_names_and_starts_of_the_phases(given, tmp_path):
    run, jobs = opened(given, tmp_path), StandIn({"plain": -0.4, "lr035": -0.6})
    winner = sweep_stage(run, jobs)["best"]
    assert winner["run_name"].startswith("lr035_")
    phase1, phase2 = phase1_stage(run, jobs), phase2_stage(run, jobs)
    assert jobs.names == ["sweep", "phase1", "phase2"]
    assert [row["run_name"] for row in phase1["runs"]] == [f"{winner['run_name']}_phase1"]
    names = [f"{winner['run_name']}_phase2_seed{seed}" for seed in (101, 555, 888)]
    assert [row["run_name"] for row in phase2["runs"]] == names
    starts = {str(job.resume_from.relative_to(run.run_root)) for job in jobs.asked[3:]}
    assert starts == {phase1["best"]["checkpoint"]}


def test_phase_2_may_start_from_the_sweep(given, tmp_path):
    run, jobs = opened(given | {"phase2_from": "sweep"}, tmp_path), StandIn()
    best = sweep_stage(run, jobs)["best"]
    phase1_stage(run, jobs), phase2_stage(run, jobs)
    assert {str(job.resume_from.relative_to(run.run_root)) for job in jobs.asked[3:]} == {best["checkpoint"]}


@pytest.mark.parametrize("phase2_from", ["phase1", "sweep"])
def test_resume_from_replaces_the_start_but_not_the_sweep(given, tmp_path, phase2_from):
    foreign = write_text(tmp_path / "published.pt", "weights")
    run = opened(given | {"resume_from": "published.pt", "phase2_from": phase2_from}, tmp_path)
    jobs = StandIn()
    sweep_stage(run, jobs), phase1_stage(run, jobs), phase2_stage(run, jobs)
    assert [job.name for job in jobs.asked[:2]] == ["plain", "lr035"]
    assert jobs.asked[2].run_name == "published_phase1"
    assert jobs.asked[2].resume_from == foreign.resolve()
    assert (jobs.asked[3].resume_from == foreign.resolve()) == (phase2_from == "sweep")


def test_a_checkpoint_inside_a_run_gives_the_runs_name(given, tmp_path):
    run, jobs = opened(given, tmp_path), StandIn()
    sweep_stage(run, jobs)
    old = phase1_stage(run, jobs)["best"]
    again = given | {
        "resume_from": str(tmp_path / "runs" / old["checkpoint"]),
        "reports_dir": str(tmp_path / "again"),
    }
    start = sweep_stage(opened(again, tmp_path), StandIn())["start"]
    assert start["name"] == sweep_stage(run)["start"]["name"]


def test_a_name_that_exists_gets_a_counter(given, tmp_path):
    write_text(tmp_path / "published.pt", "weights")
    run = opened(given | {"resume_from": "published.pt"}, tmp_path)
    sweep_stage(run, StandIn())
    for taken in ("published_phase1", "history/published_phase1_2"):
        (run.run_root / taken).mkdir(parents=True)
    assert phase1_stage(run, StandIn())["best"]["run_name"] == "published_phase1_3"


def test_skip_sweep_compares_completed_runs_on_the_same_data(given, tmp_path):
    first = opened(given, tmp_path)
    fingerprint = open_data(fine_tune_config(first)).fingerprint
    sweep_stage(first, StandIn({"plain": -0.4, "lr035": -0.6}, fingerprint=fingerprint))
    phase1_stage(first, StandIn({}, fingerprint="another data set"))
    archived = Path(given["run_root"]) / sweep_stage(first)["best"]["run_dir"]
    (Path(given["run_root"]) / "history").mkdir()
    archived.rename(Path(given["run_root"]) / "history" / archived.name)
    later = opened(given | {"skip_sweep": True, "reports_dir": str(tmp_path / "later")}, tmp_path)
    record = sweep_stage(later, runner=None)
    assert {row["run_name"] for row in record["runs"]} == {
        row["run_name"] for row in sweep_stage(first)["runs"]
    }
    assert record["start"]["checkpoint"].startswith("history/lr035_")
    by_loss = given | {
        "skip_sweep": True,
        "reports_dir": str(tmp_path / "loss"),
        "overrides": ["selection.primary_metric=val_loss"],
    }
    with pytest.raises(RunError, match="a completed run on these data"):
        sweep_stage(opened(by_loss, tmp_path), runner=None)


def test_skip_sweep_cuts_the_ending_of_a_phase(given, tmp_path):
    first = opened(given, tmp_path)
    fingerprint = open_data(fine_tune_config(first)).fingerprint
    base = sweep_stage(first, StandIn(fingerprint=fingerprint))["start"]["name"]
    phase1_stage(first, StandIn({f"{base}_phase1": -0.9}, fingerprint=fingerprint, improved=True))
    later = opened(given | {"skip_sweep": True, "reports_dir": str(tmp_path / "later")}, tmp_path)
    jobs = StandIn(fingerprint=fingerprint)
    phase1_stage(later, jobs)
    assert jobs.asked[0].run_name == f"{base}_phase1_2"
    assert f"{base}_phase1/" in str(jobs.asked[0].resume_from)


def test_a_fine_tune_has_the_shape_of_its_parent(given, tmp_path):
    write_text(given["manifest"], MANIFEST.replace("sched_boost_lr035_seed222.yaml", "wide.yaml"))
    write_text(tmp_path / "wide.yaml", "model: {hidden_dim: 48, dropout: 0.5}")
    run, jobs = opened(given, tmp_path), StandIn({"lr035": -0.9})
    sweep_stage(run, jobs), phase1_stage(run, jobs), phase2_stage(run, jobs)
    assert {job.loaded.config.model.hidden_dim for job in jobs.asked[2:]} == {48}
    assert {job.loaded.config.model.dropout for job in jobs.asked[2:]} == {0.25}


# --- failures and second starts


def test_a_second_start_runs_only_what_is_missing(given, tmp_path):
    run = opened(given, tmp_path)
    with pytest.raises(TrainingError, match="sweep, job lr035: .*out of memory"):
        sweep_stage(run, StandIn(dies=["lr035"]))
    assert read_stage(run.reports_dir, "sweep")["status"] == "failed"
    again = StandIn()
    record = sweep_stage(opened(given, tmp_path), again)
    assert [job.name for job in again.asked] == ["lr035"]
    assert len(record["runs"]) == 2


def test_a_run_whose_configuration_changed_is_run_again(given, tmp_path):
    with pytest.raises(TrainingError):
        sweep_stage(opened(given, tmp_path), StandIn(dies=["lr035"]))
    write_text(given["manifest"], MANIFEST.replace("num_epochs: 2", "num_epochs: 3"))
    again = StandIn()
    sweep_stage(opened(given, tmp_path), again)
    assert [job.name for job in again.asked] == ["plain", "lr035"]


def test_a_stage_whose_kernel_was_killed_is_started_again(given, tmp_path):
    run = opened(given, tmp_path)

    class Killed(BaseException):
        pass

    def killed(waiting, **options):
        StandIn()(waiting[:1])
        raise Killed

    with pytest.raises(Killed):
        sweep_stage(run, killed)
    file = run.reports_dir / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running"}))
    again = StandIn()
    assert sweep_stage(run, again)["status"] == "completed"
    assert [job.name for job in again.asked] == ["lr035"]


def test_other_parameters_are_refused(given, tmp_path):
    opened(given, tmp_path)
    with pytest.raises(ConfigError, match="phase_overrides.*another reports_dir"):
        opened(given | {"phase_overrides": "seed=1"}, tmp_path)


def test_a_sweep_may_go_on_after_a_failed_job(given, tmp_path):
    write_text(given["manifest"], MANIFEST + "continue_on_error: true\n")
    record = sweep_stage(opened(given, tmp_path), StandIn(dies=["lr035"]))
    assert [row["status"] for row in record["runs"]] == ["completed", "failed"]
    assert record["best"]["run_name"].startswith("plain_")


def test_success_is_read_from_the_stage_file_and_not_from_papermill(given, tmp_path, monkeypatch):
    run = opened(given, tmp_path)

    def papermill_is_content(name, reports_dir, parameters):
        (reports_dir / "sweep.json").write_text('{"stage": "sweep", "status": "running"}')

    monkeypatch.setattr(pipeline_module, "execute_notebook", papermill_is_content)
    with pytest.raises(TrainingError, match="its kernel was stopped"):
        execute_stage(run, "sweep")

    def report_breaks(name, reports_dir, parameters):
        sweep_stage(run, StandIn())
        return ValueError("a figure failed")

    monkeypatch.setattr(pipeline_module, "execute_notebook", report_breaks)
    assert execute_stage(run, "sweep")["status"] == "completed"


def test_a_signal_ends_the_pipeline_as_an_interruption(given, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pipeline_module, "execute_notebook", lambda *given: signal.raise_signal(signal.SIGTERM)
    )
    with pytest.raises(Interrupted) as stopped:
        run_pipeline(given)
    assert stopped.value.signum == signal.SIGTERM


# --- the answer


def test_a_phase_that_gained_nothing_is_not_the_answer(given, tmp_path):
    run = opened(given, tmp_path)
    base = sweep_stage(run, StandIn())["start"]["name"]
    phase1_stage(run, StandIn({f"{base}_phase1": -0.5000001}, improved=False))
    phase2_stage(
        run, StandIn({f"{base}_phase2_seed{seed}": -0.5000002 for seed in (101, 555, 888)}, improved=False)
    )
    summary = finish(run, alike)
    assert summary["final"]["stage"] == "sweep"
    assert [step["stage"] for step in summary["lineage"]] == ["sweep"]


def test_the_recommended_recipe_is_the_mean_of_three_seeds(given, tmp_path):
    "No phase, whatever the seeds say; the original recipe is what it was when nobody asks."
    asked = {key: value for key, value in given.items() if key != "manifest"} | {"recipe": "recommended"}
    plan = plan_pipeline(absolute(asked, tmp_path))
    assert [job["stage"] for job in plan["jobs"]] == ["sweep"] * 3
    seeds = sorted(job["dataloader.seed"] for job in plan["jobs"])
    assert seeds == [222, 777, 1337] and {job["trainer.num_epochs"] for job in plan["jobs"]} == {10}
    run, stand_in = opened(asked, tmp_path), StandIn({"recommended_seed777": -0.7})
    sweep_stage(run, stand_in)
    models = [job.loaded.config.model for job in stand_in.asked]
    assert all(model.residual and model.size_features for model in models)
    assert {job.loaded.config.checkpoint.take for job in stand_in.asked} == {"last"}
    summary = finish(run, guess)
    assert len(summary["final"]["checkpoints"]) == 3 and list(summary["stages"]) == ["sweep"]
    assert not (run.reports_dir / "phase1.json").exists()
    reopened = opened(asked, tmp_path)  # the same parameters go on
    assert reopened.parameters == run.parameters
    assert absolute(given, tmp_path).recipe == "original"


def test_the_summary_keeps_paths_relative_to_the_run_root(given, tmp_path):
    run = opened(given | {"skip_fine": True}, tmp_path)
    sweep_stage(run, StandIn())
    summary = finish(run, alike)
    assert (run.run_root / summary["final"]["checkpoint"]).is_file()
    assert not Path(summary["lineage"][0]["checkpoint"]).is_absolute()
    assert list(summary["stages"]) == ["sweep"]
    assert read_json(run.reports_dir / "pipeline_summary.json")["status"] == "completed"


def test_the_test_labels_meet_the_final_model_alone_and_once(given, tmp_path, tiny):
    test_labels, val_labels = halves(tiny.val_labels, tmp_path)
    tested = given | {"skip_fine": True, "test_labels": str(test_labels), "val_labels": str(val_labels)}
    run = opened(tested, tmp_path)
    best = sweep_stage(run, StandIn({"plain": -0.7}))["best"]
    asked = []

    def predict(checkpoint, split, schema):
        asked.append((split.name, checkpoint))
        return alike(checkpoint, split, schema)

    first = finish(run, predict)
    assert [checkpoint for name, checkpoint in asked if name == "test"] == [run.run_root / best["checkpoint"]]
    count = len(asked)
    assert first["test"]["metrics"].keys() >= {"loss", "spearman_corr"}
    assert finish(run, predict)["test"] == first["test"]
    assert len(asked) == count and first["test"]["seen_before"] == []


def halves(labels, folder):
    "Two label files, of the first decoy and of the others."
    head, first, *rest = labels.read_text().splitlines()
    parts = {"held_out.csv": [head, first], "rest.csv": [head, *rest]}
    return [write_text(folder / name, "\n".join(rows) + "\n") for name, rows in parts.items()]


def test_test_labels_that_were_seen_are_refused_or_counted(given, tmp_path, tiny):
    for seen in (tiny.train_labels, tiny.val_labels):
        with pytest.raises(DataError, match="all of them training or validation labels"):
            opened(given | {"test_labels": str(seen)}, tmp_path)
    assert not (tmp_path / "reports").exists()
    _, rest = halves(tiny.val_labels, tmp_path)
    partly = given | {"skip_fine": True, "test_labels": str(tiny.val_labels), "val_labels": str(rest)}
    run = opened(partly, tmp_path)
    assert any(note.startswith("warning: ") and "test labels" in note for note in run.notes)
    sweep_stage(run, StandIn())
    summary = finish(run, lambda checkpoint, split, schema: np.linspace(0, 1, len(split)))
    counted = len(rest.read_text().splitlines()) - 1
    assert len(summary["test"]["seen_before"]) == counted
    assert f"{counted} of the" in held_out_sentence(
        summary
    ) and "no part in any choice" not in held_out_sentence(summary)


# --- one run, or the mean of several


def completed(given, tmp_path, jobs=None, **changes):
    "A pipeline whose stages have ended."
    run, jobs = opened(given | changes, tmp_path), jobs or StandIn({"plain": -0.4, "lr035": -0.6})
    sweep_stage(run, jobs), phase1_stage(run, jobs), phase2_stage(run, jobs)
    return run


def by_hand(run, names):
    "The selection metric of the mean of some runs."
    val = open_data(fine_tune_config(run)).val
    scores = np.mean([guess(run.run_root / name, val, None) for name in names], axis=0)
    metrics = regression_metrics(scores, val.dockq.numpy(), val.targets)
    return metrics["val_loss"] - max(0, metrics["val_spearman_corr"])


def test_the_better_one_of_the_best_run_and_the_means_is_the_answer(given, tmp_path):
    run = completed(given, tmp_path)
    summary = finish(run, guess)
    names = ["best run", "mean of phase 2", "mean of the sweep"]
    assert [one["name"] for one in summary["candidates"]] == names
    assert [len(one["run_names"]) for one in summary["candidates"]] == [1, 3, 2]
    for one in summary["candidates"]:
        assert one["score"] == pytest.approx(by_hand(run, one["checkpoints"]), abs=1e-6)
        assert one["measures"].keys() == {"pearson", "target_spearman", "ranking_loss", "rmse"}
    best = min(summary["candidates"], key=lambda one: one["score"])
    assert len(best["checkpoints"]) > 1 and summary["final"]["name"] == best["name"]
    assert summary["final"]["checkpoints"] == best["checkpoints"] and summary["final"]["checkpoint"] is None
    files = [run.run_root / name for name in best["checkpoints"]]
    assert model_files(run.reports_dir) == files == chosen_files(standing(run.reports_dir))
    assert {step["run_name"] for step in summary["lineage"]} >= set(best["run_names"])


def test_a_mean_is_taken_when_asked_for_and_never_when_not(given, tmp_path):
    def worse(checkpoint, split, schema):
        "The last phase alone is right, and two of its runs are not."
        scores = split.dockq.numpy()
        return scores if "seed101" in str(checkpoint) else 1 - scores + guess(checkpoint, split, schema) / 9

    jobs = StandIn({"plain": -0.4, "lr035": -0.6})
    for ensemble, names in (("auto", 1), ("off", 1), ("on", 2)):
        folders = {"reports_dir": str(tmp_path / ensemble), "run_root": str(tmp_path / f"{ensemble}_runs")}
        run = opened(given | folders | {"ensemble": ensemble}, tmp_path)
        base = sweep_stage(run, jobs)["start"]["name"]
        phases = StandIn({f"{base}_phase2_seed101": -0.9}, improved=True)
        phase1_stage(run, phases), phase2_stage(run, phases)
        summary = finish(run, worse)
        final = PipelineSummary.model_validate(summary).final
        assert (final.name == "best run") == (ensemble != "on") and (len(final.files) > 1) == (names > 1)
        assert len(summary["candidates"]) == (1 if ensemble == "off" else 3)


def test_copies_of_one_model_are_no_ensemble(given, tmp_path):
    run, jobs = opened(given, tmp_path), StandIn({"plain": -0.4, "lr035": -0.6}, improved=False)
    sweep_stage(run, jobs), phase1_stage(run, jobs), phase2_stage(run, jobs)
    own = {run["checkpoint"]: run for run in sweep_stage(run)["runs"]}

    def kept(checkpoint, split, schema):
        "Fine-tunes have the weights of the winner."
        name = str(checkpoint.relative_to(run.run_root))
        return guess(
            checkpoint if name in own else run.run_root / sweep_stage(run)["best"]["checkpoint"],
            split,
            schema,
        )

    summary = finish(run, kept)
    assert [one["name"] for one in summary["candidates"]] == ["best run", "mean of the sweep"]
    assert summary["left_out"] == ["mean of phase 2: no ensemble, its 3 runs are one model"]
    lines = choice_lines(read_summary(run.reports_dir))
    assert lines[-1] == "Mean of phase 2: no ensemble, its 3 runs are one model."


def test_a_picked_checkpoint_and_earlier_runs_have_their_own_means(given, tmp_path):
    first = opened(given, tmp_path)
    fingerprint = open_data(fine_tune_config(first)).fingerprint
    jobs = StandIn({"plain": -0.4, "lr035": -0.6}, fingerprint=fingerprint, improved=True)
    sweep = completed(given, tmp_path, jobs) and sweep_stage(first)
    later = given | {"skip_sweep": True, "skip_fine": True, "reports_dir": str(tmp_path / "later")}
    sweep_stage(opened(later, tmp_path), None)
    summary = finish(opened(later, tmp_path), guess)
    means = {one["name"]: set(one["run_names"]) for one in summary["candidates"][1:]}
    assert means == {"mean of the sweep": {run["run_name"] for run in sweep["runs"]}}
    picked = str(first.run_root / sweep["best"]["checkpoint"])
    own = given | {"skip_sweep": True, "resume_from": picked, "reports_dir": str(tmp_path / "own")}
    summary = finish(completed(own, tmp_path, jobs), guess)
    assert [one["name"] for one in summary["candidates"]] == ["best run", "mean of phase 2"]
    assert summary["left_out"] == ["mean of the sweep: no ensemble of 0 runs"]


def test_intervals_are_over_families_if_they_are_known(given, tmp_path):
    tiny = write_tiny_dataset(tmp_path / "more", targets=12)
    given = given | {"graph_dir": str(tiny.graph_dir), "train_labels": str(tiny.train_labels)}
    given |= {"val_labels": str(tiny.val_labels), "skip_fine": True, "run_root": str(tmp_path / "others")}
    families = write_text(tmp_path / "families.csv", "target,family\nTINY10,a\nTINY11,b\nTINY12,b\n")
    jobs, found = StandIn({"plain": -0.4, "lr035": -0.6}), []
    for name, known in (("targets", {}), ("families", {"families": str(families)})):
        run = opened(given | known | {"reports_dir": str(tmp_path / name)}, tmp_path)
        sweep_stage(run, jobs)
        found.append(finish(run, guess))
    assert [list(summary["judged_on"].values())[1:] for summary in found] == [
        [3, "target", 3],
        [3, "family", 2],
    ]
    over_targets, over_families = (summary["candidates"][1]["interval"] for summary in found)
    assert over_targets[0] < over_targets[1] and over_targets != over_families
    assert {summary["candidates"][1]["difference"]["verdict"] for summary in found} <= {
        "better",
        "not told apart",
    }
    write_text(families, "target,family\nelsewhere,1\n")
    with pytest.raises(DataError, match="a family for every target"):
        opened(given | {"families": str(families), "reports_dir": str(tmp_path / "new")}, tmp_path)
    assert not (tmp_path / "new").exists()


def test_where_more_is_better_the_higher_candidate_is_taken(given, tmp_path):
    rank = ["selection.primary_metric=val_pearson_corr"]
    jobs = StandIn({"plain": 0.4, "lr035": 0.6})
    summary = finish(completed(given, tmp_path, jobs, overrides=rank), guess)
    scores = {one["name"]: one["score"] for one in summary["candidates"]}
    assert summary["final"]["score"] == max(scores.values()) and all(
        0 < score <= 1 for score in scores.values()
    )


def test_what_an_earlier_version_has_left_is_read(given, tmp_path):
    run = completed(given, tmp_path)
    best = phase1_stage(run)["best"]
    old = {"status": "completed", "run_root": str(run.run_root), "final": best, "lineage": [], "test": None}
    write_json(run.reports_dir / "pipeline_summary.json", old)
    asked = read_json(run.reports_dir / "parameters.json")
    for name in ("ensemble", "families"):
        del asked[name]
    write_json(run.reports_dir / "parameters.json", asked)
    assert finish(opened(given, tmp_path), predict=None)["final"] == best
    assert model_files(run.reports_dir) == [run.run_root / best["checkpoint"]]
    found = read_summary(run.reports_dir)
    assert (choice_lines(found), found.candidates) == ([], ())
    assert outcome_lines(found, run.reports_dir)[2] == f"winner:  {run.run_root / best['checkpoint']}"
    assert "<h2" in pipeline_page(standing(run.reports_dir))


# --- what is compared


def test_runs_that_were_judged_otherwise_are_no_candidates(given, tmp_path, capsys):
    first = opened(given, tmp_path)
    fingerprint = open_data(fine_tune_config(first)).fingerprint
    sweep_stage(first, StandIn({"plain": -0.4, "lr035": -0.6}, fingerprint=fingerprint))
    heavy = given | {"reports_dir": str(tmp_path / "heavy"), "overrides": ["selection.spearman_weight=3"]}
    sweep_stage(opened(heavy, tmp_path), StandIn({"plain": -1.9, "lr035": -1.8}, fingerprint=fingerprint))
    later = opened(given | {"skip_sweep": True, "reports_dir": str(tmp_path / "later")}, tmp_path)
    capsys.readouterr()
    record = sweep_stage(later, runner=None)
    assert (len(record["runs"]), record["best"]["score"]) == (2, -0.6)
    assert "not comparable: 2 (spearman_weight 3, not 1)" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["selection.spearman_weight", "trainer.limit_val_batches"])
def test_stages_that_are_judged_otherwise_are_refused(given, tmp_path, key):
    with pytest.raises(ConfigError, match=f"{key}: expected one value for all runs"):
        opened(given | {"phase_overrides": [f"{key}=3"]}, tmp_path)


def test_jobs_on_data_of_their_own_are_refused(given, tmp_path, tiny):
    named = {
        key: value for key, value in given.items() if key not in ("graph_dir", "train_labels", "val_labels")
    }
    paths = f"paths: {{graph: {tiny.graph_dir}, train_labels: {tiny.train_labels}, val_labels: {tiny.val_labels}}}"
    write_text(tmp_path / "one.yaml", f"extends: sched_boost_seed222.yaml\n{paths}")
    other = paths.replace(str(tiny.train_labels), str(tiny.val_labels))
    write_text(tmp_path / "other.yaml", f"extends: sched_boost_seed222.yaml\n{other}")
    for second, problem in (
        ("other.yaml", "paths.train_labels"),
        ("sched_boost_seed222.yaml", "paths.graph"),
    ):
        jobs = f"jobs:\n  - {{name: a, config: one.yaml}}\n  - {{name: b, config: {second}}}\n"
        write_text(given["manifest"], jobs)
        with pytest.raises(ConfigError, match=f"{problem}: expected one data set for all runs of a pipeline"):
            opened(named, tmp_path)
    write_text(given["manifest"], jobs.replace(second, "one.yaml"))
    assert opened(named, tmp_path).data["paths.train_labels"] == tiny.train_labels


def test_without_a_sweep_and_data_the_runs_say_on_which(given, tmp_path):
    sweep_stage(opened(given, tmp_path), StandIn())
    unnamed = {"run_root": given["run_root"], "skip_sweep": True, "manifest": given["manifest"]}
    plan = plan_pipeline(absolute(unnamed, tmp_path))
    assert [plan["data"][f"paths.{name}"] for name in ("graph", "val_labels")] == [
        given["graph_dir"],
        given["val_labels"],
    ]
    other = write_tiny_dataset(tmp_path / "other")
    elsewhere = {
        "graph_dir": other.graph_dir,
        "train_labels": other.train_labels,
        "val_labels": other.val_labels,
    }
    elsewhere = (
        given | {key: str(value) for key, value in elsewhere.items()} | {"reports_dir": str(tmp_path / "b")}
    )
    sweep_stage(opened(elsewhere, tmp_path), StandIn())
    with pytest.raises(
        ConfigError, match=r"one data set among the earlier runs, found .*\(2 runs\), .*\(2 runs\)"
    ):
        plan_pipeline(absolute(unnamed, tmp_path))
    with pytest.raises(RunError, match="a completed run"):
        plan_pipeline(absolute({"run_root": "empty", "skip_sweep": True}, tmp_path))


def test_a_checkpoint_that_was_picked_is_what_the_answer_is_about(given, tmp_path):
    first = opened(given, tmp_path)
    fingerprint = open_data(fine_tune_config(first)).fingerprint
    sweep = sweep_stage(first, StandIn({"plain": -0.4, "lr035": -0.9}, fingerprint=fingerprint))
    picked = first.run_root / next(run["checkpoint"] for run in sweep["runs"] if run["score"] == -0.4)
    own = given | {"skip_sweep": True, "resume_from": str(picked), "reports_dir": str(tmp_path / "own")}
    run, jobs = opened(own, tmp_path), StandIn(fingerprint=fingerprint, improved=True)
    assert sweep_stage(run, jobs)["runs"] == []
    phase1_stage(run, jobs), phase2_stage(run, jobs)
    summary = finish(run, alike)
    assert summary["final"]["stage"] == "phase1" and summary["final"]["score"] == -0.5
    assert summary["parameters"]["manifest"] == given["manifest"]
    with pytest.raises(ConfigError, match="something to run"):
        opened(own | {"skip_fine": True, "reports_dir": str(tmp_path / "nothing")}, tmp_path)


def test_fine_tunes_that_kept_their_parent_are_counted(given, tmp_path, capsys):
    run = opened(given, tmp_path)
    sweep_stage(run, StandIn())
    phase1_stage(run, StandIn(improved=True)), phase2_stage(run, StandIn(improved=False))
    said = capsys.readouterr().out
    assert (
        "phase1" not in said
        and "phase2: 3 of 3 fine-tunes kept their parent" in said
        and "not an ensemble" in said
    )
    summary = finish(run, guess)
    assert summary["kept_parent"].startswith("3 of 4 fine-tunes kept their parent")
    assert summary["stages"]["phase2"]["kept_parent"] == 3


def test_phase_2_from_the_sweep_needs_no_phase_1(given, tmp_path):
    run, jobs = opened(given | {"phase2_from": "sweep"}, tmp_path), StandIn()
    best = sweep_stage(run, jobs)["best"]
    assert {row["parent_checkpoint"] for row in phase2_stage(run, jobs)["runs"]} == {best["checkpoint"]}


def test_the_manifest_that_was_run_is_in_the_summary(given, tmp_path):
    run = opened(
        {key: value for key, value in given.items() if key != "manifest"} | {"skip_fine": True}, tmp_path
    )
    sweep_stage(run, StandIn())
    assert Path(finish(run, guess)["parameters"]["manifest"]).name == "run_core.yaml"


def test_of_a_run_of_the_original_only_the_shapes_are_asked_for(tmp_path):
    run = tmp_path / "old"
    write_text(
        run / "config" / "config.yaml", "model: {hidden_dim: 48, never: 1}\ntrainer: {min_epochs: 3}\n"
    )
    checkpoint = write_text(run / "model_checkpoints" / "checkpoint.val-0.04168_epoch002.chkpt", "weights")
    assert parent_shapes(checkpoint) == {"model.hidden_dim": 48}


def test_a_plan_has_the_names_of_the_real_runs(given, tmp_path):
    checkpoint = write_text(tmp_path / "published.pt", "weights")
    (tmp_path / "runs" / "published_phase1").mkdir(parents=True)
    plan = plan_pipeline(absolute(given | {"resume_from": str(checkpoint)}, tmp_path))
    names = [job["run_name"] for job in plan["jobs"]]
    assert names[:3] == ["plain_<start-time>", "lr035_<start-time>", "published_phase1_2"]
    assert "a counter" in plan["names"]


def test_two_pipelines_do_not_share_a_reports_folder(given, tmp_path):
    reports = tmp_path / "reports_of_two"
    asked = given | {"reports_dir": str(reports)}
    with held(reports), pytest.raises(RunError, match="found one that another process is writing to"):
        opened(asked, tmp_path)
    assert [path.name for path in reports.iterdir() if not path.name.startswith(".")] == []
    opened(asked, tmp_path)
    assert opened(asked, tmp_path).reports_dir == reports  # the same process may go on
    other = "import sys; from pathlib import Path; from topoqa_nb.ground.core import held; held(Path(sys.argv[1])).__enter__()"
    done = subprocess.run([sys.executable, "-c", other, str(reports)], capture_output=True, text=True)
    assert "another process is writing to" in done.stderr
