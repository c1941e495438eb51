"""Configuration: whole files on disk, from several working directories, and the shipped set."""

import shutil
import time
from pathlib import Path

import pytest
import yaml
from conftest import in_turn

from topoqa_nb.ground import files as files_module
from topoqa_nb.ground.config import (
    FIELDS,
    LEGACY_KEYS,
    absolute_overrides,
    config_differences,
    dump_config,
    format_overrides,
    load_config,
    parse_overrides,
)
from topoqa_nb.ground.core import ConfigError, plain
from topoqa_nb.ground.files import find_file, find_shipped, read_yaml
from topoqa_nb.ground.settings import Config, CoverageConfig, TrainerConfig
from topoqa_nb.ramdisk.staging import file_settings
from topoqa_nb.sweep.manifest import load_manifest

CONFIGS = find_shipped("config.yaml").parent
MANIFESTS = find_shipped("run_core.yaml", "manifests").parent

SPEC_DEFAULTS = """
paths: {graph: null, train_labels: null, val_labels: null, test_labels: null, target_regex: null,
  save_dir: training_runs, metadata: null, summary: null, store: null, trust_pickles: false}
model: {pooling_type: mean, attention_head: 8, hidden_dim: 32, num_layers: 2, dropout: 0.25, edge_encoder: mlp,
  residual: false, size_features: false}
dataloader: {batch_size: 16, num_workers: 0, seed: 222}
trainer: {accelerator: cpu, devices: 1, num_nodes: 1, strategy: auto, precision: 32, num_epochs: 200,
  accumulate_grad_batches: 16, fast_dev_run: false, limit_train_batches: null, limit_val_batches: null,
  gradient_clip_val: null, num_threads: 1, fuse_batches: auto, average: none, average_decay: 0.99,
  stop_signals: [SIGTERM, SIGHUP, SIGUSR1, SIGUSR2]}
optimizer: {type: adam, learning_rate: 0.005, weight_decay: 0.0}
scheduler: {type: reduce_on_plateau, factor: 0.4, patience: 12, warmup_epochs: 0}
early_stopping: {patience: 25, min_delta: 0.0}
selection: {primary_metric: selection_metric, use_val_spearman: true, spearman_min_delta: 0.0, spearman_weight: 1.0}
checkpoint: {take: best}
coverage: {minimum_percent: 0, fail_on_missing: false}
logging: {progress_bar_refresh_rate: 0, log_every_n_steps: 100, log_lr: false}
mlflow: {enabled: false, tracking_uri: ./mlruns, experiment: dynamic_topoqa, run_name: null, log_artifacts: true,
  tags: {}}
edge_schema: {}
topology_schema: {}
"""

# lr, factor, scheduler patience, stop patience, epochs, batch, accumulate, seed
SHIPPED = {
    "config.yaml": (0.005, 0.4, 12, 25, 200, 16, 16, 222),
    "sched_boost.yaml": (0.005, 0.2, 6, 45, 260, 16, 16, 222),
}
for seed in (222, 777, 1337):
    SHIPPED[f"sched_boost_seed{seed}.yaml"] = (0.005, 0.2, 6, 45, 260, 16, 16, seed)
    SHIPPED[f"sched_boost_lr035_seed{seed}.yaml"] = (0.0035, 0.2, 6, 45, 260, 16, 16, seed)
    SHIPPED[f"large_batch_sched_boost_seed{seed}.yaml"] = (0.005, 0.2, 6, 45, 260, 24, 16, seed)
SHIPPED["sched_boost_finetune.yaml"] = (0.001, 0.2, 4, 20, 120, 16, 16, 222)
for seed in (101, 555, 888):
    SHIPPED[f"sched_boost_finetune_seed{seed}.yaml"] = (0.001, 0.2, 4, 20, 120, 16, 16, seed)
SHIPPED["sched_boost_seed222_cuda.yaml"] = (0.003, 0.2, 6, 45, 260, 16, 8, 222)
SHIPPED["recommended.yaml"] = (0.003, 0.4, 12, 25, 10, 16, 1, 222)
SHIPPED["sched_boost_seed222_mps.yaml"] = (0.005, 0.2, 6, 45, 260, 16, 16, 222)

FLAT = """
graph_dir: ./graphs
train_label_file: labels/train.csv
val_label_file: labels/val.csv
save_dir: runs
metadata_path: sidecar.json
summary_path: summary.json
accelerator: gpu
devices: 2
precision: 16
num_epochs: 300
accumulate_grad_batches: 4
attention_head: 4
pooling_type: add
batch_size: 8
num_workers: 1
seed: 7
learning_rate: 1e-3
lr_scheduler_type: cosine
lr_scheduler_factor: 0.3
lr_scheduler_patience: 5
early_stopping_patience: 9
use_val_spearman_as_secondary: false
spearman_secondary_min_delta: 0.1
spearman_secondary_weight: 2.0
progress_bar_refresh_rate: 3
log_every_n_steps: 10
fast_dev_run: true
limit_train_batches: 5
limit_val_batches: 0.5
mlflow: {enabled: true, tracking_uri: tracking, tags: {owner: lab}}
coverage: {minimum_percent: 90}
edge_schema: {dim: 11}
topology_schema: {dim: 140}
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    "An empty working directory."
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def value_of(config: Config, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def error_of(function, *arguments, **options) -> str:
    "The text of the error, which is one line."
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Defaults and shipped files


def test_defaults_are_those_of_the_specification():
    assert config_differences(Config(), Config.model_validate(yaml.safe_load(SPEC_DEFAULTS))) == {}
    assert yaml.safe_load(SPEC_DEFAULTS).keys() == Config.model_fields.keys()


def test_exactly_the_named_configs_are_shipped():
    assert {path.name for path in CONFIGS.iterdir()} == {*SHIPPED, "ramdisk.yaml"}


@in_turn("name", SHIPPED)
def test_shipped_values(name, here):
    config = load_config(name).config
    assert SHIPPED[name] == (
        config.optimizer.learning_rate,
        config.scheduler.factor,
        config.scheduler.patience,
        config.early_stopping.patience,
        config.trainer.num_epochs,
        config.dataloader.batch_size,
        config.trainer.accumulate_grad_batches,
        config.dataloader.seed,
    )
    machine = {"_cuda": ("gpu", 32, 0), "_mps": ("mps", 32, 2)}
    expected = next((value for ending, value in machine.items() if ending in name), ("cpu", 32, 0))
    assert expected == (config.trainer.accelerator, config.trainer.precision, config.dataloader.num_workers)
    assert (config.model.pooling_type, config.model.attention_head) == ("mean", 8)
    assert config.scheduler.type == ("cosine" if name == "recommended.yaml" else "reduce_on_plateau")
    assert config.paths.save_dir == here / "training_runs"


@in_turn("name", SHIPPED)
def test_shipped_files_hold_no_output_paths(name):
    content = read_yaml(CONFIGS / name)
    assert set(content.get("paths") or {}) <= {"trust_pickles"}
    assert "tracking_uri" not in (content.get("mlflow") or {})


@in_turn("name", [name for name in SHIPPED if name != "config.yaml"])
def test_a_variant_holds_only_what_differs(name):
    content = read_yaml(CONFIGS / name)
    base = load_config(CONFIGS / content.pop("extends")).config
    written = {f"{section}.{key}": value for section, keys in content.items() for key, value in keys.items()}
    same = [key for key, value in written.items() if value == value_of(base, key)]
    assert written and set(same) <= {"dataloader.seed"}  # the seed in a file's name stands in the file


def test_config_yaml_shows_every_key_with_its_default(here):
    text = (CONFIGS / "config.yaml").read_text()
    content = read_yaml(CONFIGS / "config.yaml")
    assert list(content) == list(Config.model_fields)
    for key in FIELDS:
        section, _, last = key.rpartition(".")
        shown = not section or last in content[section] or f"# {last}:" in text
        assert shown, key
    assert load_config("config.yaml").config == load_config(None).config


def test_ramdisk_yaml(here):
    assert read_yaml(CONFIGS / "ramdisk.yaml") == {
        "ramdisk": {"size": "12G", "headroom": "4G", "name": "TopoQARAM"},
        "num_workers": {"baseline": 0, "ramdisk": 0},
    }
    assert "found ramdisk" in error_of(load_config, "ramdisk.yaml")


# Shipped manifests: what they ask for can be loaded


def manifest_jobs(name: str) -> list[dict]:
    return read_yaml(find_shipped(name, "manifests"))["jobs"]


def test_shipped_manifests():
    core = ["sched_boost_seed222", "sched_boost_lr035_seed222", "large_batch_sched_boost_seed222"]
    names = {
        path.name: [job["name"] for job in manifest_jobs(path.name)] for path in MANIFESTS.glob("*.yaml")
    }
    assert names["run_core.yaml"] == names["run_demo.yaml"] == core
    assert names["run_experiments.yaml"] == core[:1]
    extended = {job.replace("222", seed) for job in core for seed in ("222", "777", "1337")}
    assert len(names["run_extended.yaml"]) == 9 and set(names["run_extended.yaml"]) == extended
    recommended = {f"recommended_seed{seed}" for seed in (222, 777, 1337)}
    assert set(names["run_recommended.yaml"]) == recommended
    assert len(names) == 5
    assert manifest_jobs("run_experiments.yaml")[0]["fast_dev_run"] is True


@in_turn("name", ["run_core", "run_extended", "run_experiments", "run_demo", "run_recommended"])
def test_jobs_of_shipped_manifests_load(name, here):
    manifest = read_yaml(MANIFESTS / f"{name}.yaml")
    shared = manifest.get("shared", {}).get("overrides", {})
    for job in manifest["jobs"]:
        path = find_file(job["config"], "configs", [MANIFESTS, MANIFESTS.parent, here])
        loaded = load_config(path, layers=[shared, job.get("overrides", {})])
        seeded = f"{path.stem}_seed{loaded.config.dataloader.seed}"
        assert job["name"] in (path.stem, seeded)
        if name == "run_demo":
            assert loaded.config.trainer.accumulate_grad_batches == 1
            assert loaded.config.trainer.num_epochs <= 30


# Looking files up


@in_turn("name", ["config.yaml", "configs/config.yaml", "./config.yaml"])
def test_shipped_config_is_found_anywhere(name, here):
    loaded = load_config(name)
    assert loaded.source == CONFIGS / "config.yaml"
    assert any("shipped" in note for note in loaded.notes)
    assert loaded.original_text == (CONFIGS / "config.yaml").read_text()


def test_a_file_in_the_working_directory_comes_first(here):
    mine = write(here / "config.yaml", "dataloader: {seed: 5}\n")
    loaded = load_config("config.yaml")
    assert (loaded.source, loaded.config.dataloader.seed, loaded.notes) == (mine, 5, [])


def test_shipped_manifest_is_found_anywhere(here):
    assert find_file("manifests/run_core.yaml", "manifests", [here]) == MANIFESTS / "run_core.yaml"
    assert find_file("run_core.yaml", "manifests", [here]) == MANIFESTS / "run_core.yaml"


@in_turn("name", ["study/config.yaml", "manifests/config.yaml", "/nowhere/config.yaml", "../config.yaml"])
def test_a_longer_path_does_not_become_a_shipped_file(name, here):
    assert "expected a file" in error_of(load_config, name)


def test_a_missing_file_is_named_with_the_nearest(here):
    message = error_of(load_config, "sched_bost.yaml")
    assert message.startswith("sched_bost.yaml: ") and str(here / "sched_bost.yaml") in message
    assert "did you mean the shipped sched_boost.yaml?" in message


def test_shipped_files_of_a_wheel_are_inside_the_package(here, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "topoqa_nb"
    shutil.copytree(CONFIGS, package / "_data" / "configs")
    monkeypatch.setattr(files_module, "files", lambda name: package)
    assert find_shipped("config.yaml") == package / "_data" / "configs" / "config.yaml"
    assert load_config("sched_boost_seed777.yaml").config.dataloader.seed == 777


# extends and paths


def test_paths_belong_to_the_file_they_stand_in(here, tmp_path):
    write(tmp_path / "shared/base.yaml", "paths: {graph: graphs, val_labels: val.csv, save_dir: runs}\n")
    write(tmp_path / "study/mid.yaml", "extends: ../shared/base.yaml\npaths: {val_labels: ../own/val.csv}\n")
    top = write(tmp_path / "study/deep/top.yaml", "extends: ../mid.yaml\npaths: {store: ./store}\n")
    paths = load_config(top, ["paths.test_labels=test.csv"]).config.paths
    assert paths.graph == tmp_path / "shared/graphs"
    assert paths.save_dir == tmp_path / "shared/runs"
    assert paths.val_labels == tmp_path / "own/val.csv"
    assert paths.store == tmp_path / "study/deep/store"
    assert paths.test_labels == here / "test.csv"
    assert paths.train_labels is None


def test_a_relative_source_gives_the_same_paths(here, monkeypatch, tmp_path):
    write(here / "study/a.yaml", "paths: {graph: ../graphs}\n")
    near = load_config("study/a.yaml").config.paths.graph
    monkeypatch.chdir(tmp_path)
    assert near == load_config("here/study/a.yaml").config.paths.graph == here / "graphs"


def test_a_climbing_path_goes_where_the_system_goes(here, tmp_path):
    (tmp_path / "far/configs").mkdir(parents=True)
    (here / "configs").symlink_to(tmp_path / "far/configs")
    write(tmp_path / "far/configs/a.yaml", "paths: {graph: ../graphs}\n")
    assert load_config("configs/a.yaml").config.paths.graph == tmp_path / "far/graphs"


def test_home_is_expanded(here, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(here / "a.yaml", "paths: {graph: ~/graphs}\n")
    assert load_config("a.yaml").config.paths.graph == tmp_path / "graphs"


@in_turn("uri", ["http://localhost:5000", "sqlite:///runs.db", "file:///data/mlruns", "databricks"])
def test_tracking_uri_is_left_alone(uri, here):
    write(here / "a.yaml", f"mlflow: {{tracking_uri: '{uri}'}}\n")
    assert load_config("a.yaml").config.mlflow.tracking_uri == uri
    assert load_config(None, [f"mlflow.tracking_uri={uri}"]).config.mlflow.tracking_uri == uri


def test_tracking_folder_is_made_absolute(here, tmp_path):
    file = write(tmp_path / "study/a.yaml", "mlflow: {tracking_uri: ./mlruns}\n")
    assert load_config(file).config.mlflow.tracking_uri == str(tmp_path / "study/mlruns")
    assert load_config(None).config.mlflow.tracking_uri == str(here / "mlruns")


def test_the_child_wins_over_the_file_it_extends(here):
    write(here / "a.yaml", "extends: sched_boost.yaml\nscheduler: {patience: 3}\nedge_schema: {dim: 24}\n")
    config = load_config("a.yaml").config
    assert (config.scheduler.patience, config.scheduler.factor, config.edge_schema) == (3, 0.2, {"dim": 24})


def test_circles_are_refused(here):
    write(here / "a.yaml", "extends: sub/b.yaml\n")
    write(here / "sub/b.yaml", "extends: ../a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in error_of(load_config, "a.yaml")
    write(here / "own.yaml", "extends: own.yaml\n")
    assert "own.yaml -> own.yaml" in error_of(load_config, "own.yaml")


def test_extends_wants_one_name_that_exists(here):
    write(here / "a.yaml", "extends: [one.yaml, two.yaml]\n")
    assert "a.yaml: extends: expected the name of one file" in error_of(load_config, "a.yaml")
    write(here / "b.yaml", "extends: nowhere.yaml\n")
    assert error_of(load_config, "b.yaml").startswith("nowhere.yaml: expected a file")


def test_extends_reaches_a_flat_file(here):
    write(here / "old/flat.yaml", FLAT)
    write(here / "new.yaml", "extends: old/flat.yaml\ntrainer: {num_epochs: 4}\n")
    loaded = load_config("new.yaml")
    assert (loaded.config.trainer.num_epochs, loaded.config.dataloader.seed) == (4, 7)
    assert loaded.config.paths.graph == here / "old/graphs"
    assert any("flat.yaml" in note for note in loaded.notes)


# Flat files


def test_every_flat_name_is_translated(here):
    loaded = load_config(write(here / "flat.yaml", FLAT))
    content = yaml.safe_load(FLAT)
    assert set(LEGACY_KEYS) == set(content) - set(Config.model_fields)
    paths = {
        "graph_dir": "graphs",
        "train_label_file": "labels/train.csv",
        "val_label_file": "labels/val.csv",
    }
    paths |= {"save_dir": "runs", "metadata_path": "sidecar.json", "summary_path": "summary.json"}
    expected = {**content, **{name: here / path for name, path in paths.items()}}
    expected |= {"precision": "16-mixed", "learning_rate": 0.001}
    for name, key in LEGACY_KEYS.items():
        assert value_of(loaded.config, key) == expected[name], name
        assert f"{name} -> {key}" in loaded.notes[0]
    assert loaded.config.mlflow.tags == {"owner": "lab"}
    assert loaded.config.mlflow.tracking_uri == str(here / "tracking")
    assert loaded.config.coverage.minimum_fraction == 0.9
    assert (loaded.config.edge_schema, loaded.config.topology_schema) == ({"dim": 11}, {"dim": 140})
    assert loaded.original_text == FLAT


def test_a_sectioned_file_gives_no_notes(here):
    write(here / "a.yaml", "trainer: {num_epochs: 3}\n")
    assert load_config("a.yaml").notes == []


def test_both_names_of_one_value_are_refused(here):
    write(here / "a.yaml", "seed: 1\ndataloader: {seed: 2}\n")
    assert "a.yaml: seed: expected seed or dataloader.seed, found both" in error_of(load_config, "a.yaml")


# Overrides


@in_turn("text", ["trainer: {num_epochs: 9}\n", "num_epochs: 9\nseed: 1\nfast_dev_run: false\n", ""])
@in_turn("names", [("seed", "fast_dev_run"), ("dataloader.seed", "trainer.fast_dev_run")])
def test_overrides_take_effect_on_both_kinds_of_files(text, names, here):
    write(here / "a.yaml", text)
    loaded = load_config("a.yaml", [f"{names[0]}=777", f"{names[1]}=true"])
    assert loaded.config.dataloader.seed == 777
    assert loaded.config.trainer.fast_dev_run is True
    assert loaded.overrides == {"dataloader.seed": 777, "trainer.fast_dev_run": True}


def different_value(key: str) -> object:
    "A valid value that is not the default."
    special = {
        "paths.target_regex": "[0-9]+",
        "model.pooling_type": "max",
        "model.edge_encoder": "linear",
        "model.hidden_dim": 64,
        "trainer.accelerator": "gpu",
        "trainer.precision": 64,
        "trainer.fuse_batches": "off",
        "trainer.strategy": "ddp",
        "trainer.average": "ema",
        "trainer.stop_signals": ["SIGUSR1"],
        "optimizer.type": "adamw",
        "scheduler.type": "none",
        "checkpoint.take": "last",
        "selection.primary_metric": "val_loss",
        "trainer.limit_train_batches": 0.5,
        "trainer.limit_val_batches": 3,
        "trainer.gradient_clip_val": 1.5,
        "mlflow.tracking_uri": "http://host:5000",
        "mlflow.run_name": "a # b",
        "mlflow.experiment": "other",
    }
    default = FIELDS[key].get_default()
    if key in special:
        return special[key]
    if isinstance(default, dict):
        return {"dim": 24}
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    return 0.125 if isinstance(default, float) else "/data/file"


@in_turn("key", FIELDS)
@pytest.mark.parametrize("file", ["config.yaml", "flat"])
def test_every_key_can_be_overridden(key, file, here):
    if file == "flat":
        file = write(here / "flat.yaml", "seed: 1\nnum_epochs: 4\n")
    needed = {"scheduler.type": "cosine"} if key == "scheduler.warmup_epochs" else {}
    before, value = load_config(file, needed).config, different_value(key)
    loaded = load_config(file, format_overrides(needed | {key: value}))
    expected = Path(value) if value == "/data/file" else value
    assert plain(config_differences(before, loaded.config)) == {key: plain([value_of(before, key), expected])}
    assert loaded.overrides == needed | {key: expected}


@in_turn("name", LEGACY_KEYS)
def test_every_flat_name_is_an_override(name):
    assert parse_overrides({name: 1}) == {LEGACY_KEYS[name]: 1}


def test_precedence_file_layers_overrides(here):
    write(
        here / "a.yaml",
        "optimizer: {learning_rate: 0.1}\ndataloader: {seed: 1, batch_size: 1, num_workers: 1}\n",
    )
    layers = [{"seed": 2, "dataloader.batch_size": 2, "num_workers": 2}, {"batch_size": 3, "num_workers": 3}]
    loaded = load_config("a.yaml", ["dataloader.num_workers=4"], layers=layers)
    assert loaded.config.optimizer.learning_rate == 0.1
    assert tuple(loaded.config.dataloader.model_dump().values()) == (3, 4, 2)
    assert loaded.overrides == {"dataloader.seed": 2, "dataloader.batch_size": 3, "dataloader.num_workers": 4}


def test_layers_take_sections_too(here):
    loaded = load_config(None, layers=[{"trainer": {"num_epochs": 3}, "mlflow": {"tags": {"a": 1}}}])
    assert loaded.overrides == {"trainer.num_epochs": 3, "mlflow.tags": {"a": 1}}
    assert loaded.config.trainer.num_epochs == 3


def test_overrides_inside_free_mappings(here):
    write(here / "a.yaml", "edge_schema: {dim: 11, module: edge/legacy_band/v11}\nmlflow: {tags: null}\n")
    loaded = load_config("a.yaml", ["edge_schema.dim=24", "mlflow.tags.owner=lab"])
    assert loaded.config.edge_schema == {"dim": 24, "module": "edge/legacy_band/v11"}
    assert loaded.config.mlflow.tags == {"owner": "lab"}
    assert load_config("a.yaml", ["edge_schema.dim=24", "edge_schema={}"]).config.edge_schema == {}


def test_override_values_are_yaml(here):
    texts = [
        "limit_train_batches=null",
        "trainer.num_threads=auto",
        "optimizer.weight_decay=1e-4",
        "mlflow.tags={a: [1, 2]}",
    ]
    config = load_config(write(here / "a.yaml", "limit_train_batches: 3\n"), texts).config
    assert config.trainer.limit_train_batches is None
    assert (config.trainer.num_threads, config.optimizer.weight_decay) == ("auto", 1e-4)
    assert config.mlflow.tags == {"a": [1, 2]}


def test_text_is_taken_as_it_stands(here):
    texts = [
        "paths.graph=sets/build #2",
        "paths.target_regex=[A-Z0-9]{4}",
        "mlflow.run_name=2025",
        "paths.save_dir=a=b",
    ]
    config = load_config(None, texts).config
    assert config.paths.graph == here / "sets/build #2"
    assert (config.paths.target_regex, config.mlflow.run_name) == ("[A-Z0-9]{4}", "2025")
    assert config.paths.save_dir == here / "a=b"


@in_turn(
    "text, parts",
    [
        ("sede=777", ["override sede", "did you mean seed?"]),
        ("trainer.num_epoch=3", ["override trainer.num_epoch", "did you mean trainer.num_epochs?"]),
        ("trainer.learning_rate=3", ["did you mean optimizer.learning_rate?"]),
        ("hidden_dim=3", ["did you mean model.hidden_dim?"]),
        ("trainer.num_epochs.x=3", ["override trainer.num_epochs.x", "expected a known key"]),
        ("zzzzzz=1", ["topoqa config --show"]),
        ("seed", ["expected key=value", '"seed"']),
        ("=3", ["expected key=value"]),
        ("seed=many", ["override dataloader.seed", 'found "many"']),
        ("seed=", ["override dataloader.seed", "found null"]),
        ("trainer.devices=[1", ["override trainer.devices", "valid YAML"]),
        ("trainer=3", ["override: trainer", "a section with keys"]),
        ("trainer=", ["override trainer", "keys of the section"]),
        ("trainer={num_epoch: 3}", ["did you mean trainer.num_epochs?"]),
    ],
)
def test_an_override_that_cannot_take_effect_is_an_error(text, parts, here):
    message = error_of(load_config, "config.yaml", [text])
    assert all(part in message for part in parts), message


def test_absolute_overrides(tmp_path):
    result = absolute_overrides(
        ["graph_dir=graphs", "paths.val_labels=/v.csv", "paths.store=null", "seed=3"], tmp_path
    )
    expected = {"paths.graph": tmp_path / "graphs", "paths.val_labels": Path("/v.csv"), "paths.store": None}
    assert result == {**expected, "dataloader.seed": 3}
    assert absolute_overrides(result, "/elsewhere") == result
    assert parse_overrides(format_overrides(result)) == {
        **result,
        **{k: str(v) for k, v in expected.items() if v},
    }


# What is wrong in a file


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainer: {num_epoch: 3}", ["a.yaml: trainer.num_epoch:", "did you mean trainer.num_epochs?"]),
        ("optimiser: {learning_rate: 3}", ["a.yaml", "found optimiser", "did you mean optimizer?"]),
        ("learning_rat: 3", ["a.yaml", "did you mean learning_rate?"]),
        ("trainer.num_epochs: 3", ["write num_epochs in the section trainer"]),
        ("trainer: 3", ["a.yaml: trainer:", "a section with keys"]),
        ("trainer: [3]", ["a.yaml: trainer:", "a section with keys"]),
        ("3: 4", ["a.yaml", "found 3"]),
        ("model: {dropout: lots}", ["a.yaml: model.dropout:", "a number", '"lots"']),
        ("model: {dropout: 1}", ["a.yaml: model.dropout:", "less than 1", "found 1"]),
        ("model: {dropout: .nan}", ["a.yaml: model.dropout:", "a number", "found nan"]),
        ("model: {hidden_dim: 33}", ["a.yaml: model.hidden_dim:", "multiple of 2"]),
        ("model: {pooling_type: median}", ["a.yaml: model.pooling_type:", "'mean', 'add' or 'max'"]),
        ("dataloader: {batch_size: true}", ["a.yaml: dataloader.batch_size:", "a number", "found true"]),
        ("dataloader: {batch_size: 1.5}", ["a.yaml: dataloader.batch_size:", "whole number", "found 1.5"]),
        ("dataloader: {batch_size: 0}", ["a.yaml: dataloader.batch_size:", "greater than or equal to 1"]),
        ("dataloader: {batch_size: null}", ["a.yaml: dataloader.batch_size:", "found null"]),
        ("optimizer: {learning_rate: false}", ["a.yaml: optimizer.learning_rate:", "found false"]),
        ("optimizer: {learning_rate: 0}", ["a.yaml: optimizer.learning_rate:", "greater than 0"]),
        ("optimizer: {learning_rate: inf}", ["a.yaml: optimizer.learning_rate:", "a number", "inf"]),
        ("scheduler: {factor: 1}", ["a.yaml: scheduler.factor:", "less than 1"]),
        (
            "coverage: {minimum_percent: 101}",
            ["a.yaml: coverage.minimum_percent:", "less than or equal to 100"],
        ),
        ("trainer: {fast_dev_run: 1}", ["a.yaml: trainer.fast_dev_run:", "true or false", "found 1"]),
        ("trainer: {devices: 0}", ["a.yaml: trainer.devices:", "a whole number from 1 on, or auto"]),
        ("trainer: {num_threads: true}", ["a.yaml: trainer.num_threads:", "found true"]),
        ("trainer: {limit_val_batches: 0}", ["a.yaml: trainer.limit_val_batches:", "found 0"]),
        ("trainer: {limit_val_batches: 1.5}", ["a.yaml: trainer.limit_val_batches:", "found 1.5"]),
        ("trainer: {gradient_clip_val: -1}", ["a.yaml: trainer.gradient_clip_val:", "greater than 0"]),
        (
            "trainer: {stop_signals: USR1}",
            ["a.yaml: trainer.stop_signals:", "a list of some of SIGTERM, SIGHUP"],
        ),
        (
            "trainer: {stop_signals: [KILL]}",
            ["a.yaml: trainer.stop_signals:", "a list of some of SIGTERM, SIGHUP"],
        ),
        ("trainer: {precision: 8}", ["a.yaml: trainer.precision:", "found 8"]),
        ("paths: {graph: 2024}", ["a.yaml: paths.graph:", "a path", "found 2024"]),
        ("paths: {graph: ''}", ["a.yaml: paths.graph:", "a path"]),
        ("paths: {save_dir: null}", ["a.yaml: paths.save_dir:", "found null"]),
        ("paths: {target_regex: '(['}", ["a.yaml: paths.target_regex:", "a regular expression"]),
        ("mlflow: {tags: v11}", ["a.yaml: mlflow.tags:", "names with values"]),
        ("edge_schema: 11", ["a.yaml: edge_schema:", "names with values"]),
        ("trainer: {num_epochs: 3", ["a.yaml:", "valid YAML", "line 1"]),
        ("seed: 1\nseed: 2", ["a.yaml:", "line 2", "the key seed twice"]),
        ("- seed", ["a.yaml:", "names with values"]),
        ("just text", ["a.yaml:", "names with values"]),
        ("seed: !!python/object/apply:os.getcwd []", ["a.yaml:", "valid YAML"]),
    ],
)
def test_a_wrong_file_is_one_line(text, parts, here):
    write(here / "a.yaml", text)
    message = error_of(load_config, "a.yaml")
    assert all(part in message for part in parts), message


def test_a_wrong_value_names_the_file_it_stands_in(here):
    write(here / "base.yaml", "optimizer: {learning_rate: fast}\n")
    write(here / "child.yaml", "extends: base.yaml\nseed: 2\n")
    assert error_of(load_config, "child.yaml").startswith(f"{here / 'base.yaml'}: optimizer.learning_rate: ")


def test_a_value_that_is_overridden_need_not_be_right(here):
    write(here / "a.yaml", "optimizer: {learning_rate: fast}\n")
    assert load_config("a.yaml", ["learning_rate=0.1"]).config.optimizer.learning_rate == 0.1


def test_not_text_and_not_a_file(here):
    (here / "a.yaml").write_bytes(b"\xff\xfe\x00seed")
    assert "not UTF-8" in error_of(load_config, "a.yaml")
    (here / "folder.yaml").mkdir()
    assert "expected a file" in error_of(load_config, "folder.yaml")
    assert "expected a YAML file" in error_of(read_yaml, here / "folder.yaml")


@in_turn("text", ["", "# nothing yet\n"])
def test_an_empty_file_means_the_defaults(text, here):
    loaded = load_config(write(here / "a.yaml", text))
    assert loaded.config == load_config(None).config
    assert "holds no values" in loaded.notes[0]


def test_empty_sections_mean_the_defaults(here):
    write(here / "a.yaml", "paths:\ntrainer:\nedge_schema:\nmlflow: {tags: }\n")
    assert load_config("a.yaml").config == load_config(None).config


# Numbers and precision


@in_turn("text", ["1e-3", "1E-3", "'0.001'", "0.001", "1.0e-3"])
def test_numbers_yaml_takes_for_text(text, here):
    write(here / "a.yaml", f"optimizer: {{learning_rate: {text}}}\n")
    assert load_config("a.yaml").config.optimizer.learning_rate == 0.001
    assert load_config(None, [f"learning_rate={text}"]).config.optimizer.learning_rate == 0.001


@in_turn(
    "text, value",
    [("5", 5), ("'5'", 5), ("0.5", 0.5), ("1", 1), ("1.0", 1.0), ("null", None), ("5e-1", 0.5)],
)
def test_limits_keep_number_and_fraction_apart(text, value, here):
    write(here / "a.yaml", f"trainer: {{limit_train_batches: {text}}}\n")
    limit = load_config("a.yaml").config.trainer.limit_train_batches
    assert (limit, type(limit)) == (value, type(value))


@in_turn("written, means", [(16, "16-mixed"), ("'16'", "16-mixed"), ("16-mixed", "16-mixed")])
def test_sixteen_means_mixed_and_not_on_a_cpu(written, means, here):
    write(here / "a.yaml", f"trainer: {{precision: {written}}}\n")
    message = error_of(load_config, "a.yaml")
    assert "a.yaml: trainer.precision: expected 32, bf16-mixed or 64 with accelerator cpu" in message
    assert load_config("a.yaml", ["accelerator=gpu"]).config.trainer.precision == means


@in_turn("written, means", [(32, 32), (64, 64), ("'32'", 32), ("bf16-mixed", "bf16-mixed")])
def test_other_precisions_on_a_cpu(written, means, here):
    write(here / "a.yaml", f"precision: {written}\n")
    assert load_config("a.yaml").config.trainer.precision == means


def test_mixed_precision_on_a_cpu_is_refused(here):
    settings = ["accelerator=cpu", "precision=16-mixed"]
    message = error_of(load_config, "sched_boost_seed222_cuda.yaml", settings)
    assert "trainer.precision" in message and "set trainer.precision to 32" in message


@in_turn("value, fraction", [(0, 0), (0.5, 0.5), (1, 1), (1.5, 0.015), (95, 0.95), (100, 1)])
def test_coverage_as_fraction_or_percentage(value, fraction):
    assert CoverageConfig(minimum_percent=value).minimum_fraction == pytest.approx(fraction)


# What comes out


def test_a_dump_is_the_whole_configuration(here, tmp_path, monkeypatch):
    overrides = [
        "paths.graph=graphs",
        "trainer.num_threads=auto",
        "mlflow.tags={a: 1e-3, b: ü}",
        "learning_rate=1e-7",
    ]
    overrides += [
        "limit_val_batches=1.0",
        "limit_train_batches=1",
        "paths.target_regex=[A-Z]+ #x",
        "edge_schema.dim=24",
    ]
    for source in ("sched_boost_seed222_mps.yaml", write(tmp_path / "old.yaml", FLAT)):
        loaded = load_config(source, overrides)
        copy = write(tmp_path / "run/config/config.yaml", dump_config(loaded.config))
        monkeypatch.chdir(tmp_path)
        again = load_config(copy)
        notes = [note for note in again.notes if "has no effect" not in note]
        assert again.config == loaded.config and notes == []
        assert dump_config(again.config) == dump_config(loaded.config)
        assert yaml.safe_load(copy.read_text()).keys() == Config.model_fields.keys()
        monkeypatch.chdir(here)


def test_original_and_overrides_repeat_a_run(here, tmp_path, monkeypatch):
    write(here / "a.yaml", "extends: sched_boost.yaml\npaths: {graph: graphs}\n")
    loaded = load_config("a.yaml", ["paths.val_labels=val.csv", "seed=3"])
    monkeypatch.chdir(tmp_path)
    again = load_config(loaded.source, loaded.overrides)
    assert set(config_differences(loaded.config, again.config)) == {"paths.save_dir", "mlflow.tracking_uri"}


def test_every_location_is_absolute(here):
    write(here / "flat.yaml", FLAT)
    for source in (None, "config.yaml", "flat.yaml"):
        paths = load_config(source).config.paths.model_dump().values()
        assert all(path.is_absolute() for path in paths if isinstance(path, Path))


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().trainer.num_epochs = 3
    assert TrainerConfig().model_copy(update={"num_epochs": 3}).num_epochs == 3


def test_loading_does_not_change_what_it_is_given(here):
    layer = {"edge_schema": {"dim": 11}, "mlflow.tags": {"a": 1}}
    load_config(None, ["edge_schema.dim=24", "mlflow.tags.b=2"], layers=[layer])
    assert layer == {"edge_schema": {"dim": 11}, "mlflow.tags": {"a": 1}}
    assert Config().mlflow.tags == {} and Config().edge_schema == {}


# YAML that hurts

BOMB = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
HURTS = {
    "an alias bomb": BOMB + "jobs: *a8\n",
    "a bomb of mappings": "".join(
        f"a{n}: &a{n} {{{', '.join(f'k{k}: *a{n - 1}' for k in range(9))}}}\n" if n else "a0: &a0 {k: lol}\n"
        for n in range(9)
    ),
    "a bomb of merges": "a0: &a0 {k: lol}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)),
    "a value inside of itself": "mlflow: &a {tags: *a}\n",
    "3,000 levels": "mlflow:\n  tags: " + "[" * 3000 + "]" * 3000 + "\n",
    "5,000 digits": f"dataloader:\n  seed: {'1' * 5000}\n",
    "5,000 hexadecimal digits": f"dataloader:\n  seed: 0x{'f' * 5000}\n",
    "half a character": 'mlflow:\n  run_name: "\\ud800"\n',
    "half a character in a key": '"\\udfff": 1\n',
    "no date": "mlflow:\n  run_name: !!timestamp 2024-02-30\n",
    "no truth value": "mlflow:\n  enabled: !!bool perhaps\n",
    "an endless file": "# " + "x" * 2_000_000 + "\n",
    "an endless key": '? "' + "k" * 100_000 + '"\n: 1\n',
    "an endless value": "dataloader: {seed: " + "k" * 100_000 + "}\n",
}


@pytest.mark.parametrize("name", HURTS)
@in_turn("read", [load_config, load_manifest, file_settings])
def test_yaml_that_hurts_is_one_short_line_at_once(read, name, here):
    path = write(here / "a.yaml", HURTS[name])
    started = time.process_time()  # of this process, whoever else computes
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert time.process_time() - started < 30  # what hurts takes minutes, or all memory
    message = str(caught.value)
    assert str(path) in message and len(message) < 1500 and "\n" not in message
    message.encode()


@in_turn("name", HURTS)
def test_overrides_that_hurt_are_one_short_line(name, here):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"mlflow.tags={HURTS[name]}", f"seed={HURTS[name]}"])
    assert str(caught.value).startswith("override ") and len(str(caught.value)) < 1500


def test_an_override_in_another_encoding_is_one_line(here):
    with pytest.raises(ConfigError, match="override: expected UTF-8 text"):
        load_config(None, ["mlflow.run_name=caf\udce9"])


@in_turn(
    "text, value",
    [("0222", 222), ("'0222'", 222), ("222", 222), ("+0222", 222), ("0xde", 222), ("0b11", 3), ("0", 0)],
)
def test_a_seed_is_the_number_that_it_looks_like(text, value, here):
    write(here / "a.yaml", f"dataloader: {{seed: {text}}}\n")
    assert load_config("a.yaml").config.dataloader.seed == value
    assert load_config(None, [f"seed={text}"]).config.dataloader.seed == value


@in_turn("text", ["1:30", "1:30.5", "2025-11-03", "2024-02-30", "1e400"])
def test_what_is_no_number_is_not_taken_for_one(text, here):
    write(here / "a.yaml", f"optimizer: {{learning_rate: {text}}}\n")
    with pytest.raises(ConfigError, match="expected a number, found"):
        load_config("a.yaml")


@in_turn("text", ["2025-11-03", "2024-02-30", "007", "0222", "1:30", "2025-11-03T10:00:00Z"])
def test_names_stay_as_they_are_written(text, here):
    write(here / "a.yaml", f"mlflow: {{run_name: {text}, tags: {{day: {text}}}}}\n")
    loaded = load_config("a.yaml")
    assert (loaded.config.mlflow.run_name, loaded.config.mlflow.tags["day"]) == (text, text)
    copy = write(here / "copy.yaml", dump_config(loaded.config))
    assert load_config(copy).config == loaded.config
    if ":" not in text:
        write(here / "m.yaml", f"jobs: [{{name: {text}, config: a.yaml}}]\n")
        assert load_manifest("m.yaml").jobs[0].name == text


def test_jobs_as_a_mapping(here):
    write(here / "m.yaml", "jobs: {a: {config: a.yaml}}\n")
    with pytest.raises(
        ConfigError, match="m.yaml: jobs: expected a list, found .* begin each job with a dash"
    ):
        load_manifest("m.yaml")


def test_ordinary_aliases_and_merges_work(here):
    write(here / "a.yaml", "trainer: &t {num_epochs: 5}\nmlflow: {tags: {one: *t, two: {<<: *t, more: 1}}}\n")
    loaded = load_config("a.yaml").config
    assert loaded.mlflow.tags == {"one": {"num_epochs": 5}, "two": {"num_epochs": 5, "more": 1}}


def test_a_giant_value_of_a_caller_is_not_written_out_to_be_cut(here):
    value = "lol"
    for _ in range(40):  # 2^40 values in 40 objects
        value = [value, value]
    with pytest.raises(ConfigError, match="found .{1,80}; correct it"):
        load_config(None, {"dataloader.seed": value})


@in_turn(
    "key, value",
    [
        ("optimizer.weight_decay", 1e308), ("optimizer.learning_rate", 1e308), ("selection.spearman_weight", 1e308),
        ("trainer.gradient_clip_val", 1e31), ("early_stopping.min_delta", 10**400), ("dataloader.batch_size", 10**23),
        ("trainer.accumulate_grad_batches", 10**23), ("trainer.num_threads", 10**5), ("trainer.devices", 10**23),
        ("dataloader.num_workers", 257), ("model.hidden_dim", 10**9), ("model.num_layers", 10**23),
        ("model.attention_head", 10**9), ("dataloader.seed", 2**32), ("trainer.num_epochs", 10**23),
    ],
)  # fmt: skip
def test_values_that_would_overflow_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"override {key}: expected a .*(up to|less than)"):
        load_config(None, {key: value})
