"""Run directories in the form of the original stack, for tests."""

import json
from pathlib import Path

import yaml

LOSSES = (0.150, 0.110, 0.082, 0.066, 0.060, 0.085)
CORRELATIONS = (0.20, 0.45, 0.60, 0.68, 0.70, 0.69)
FLAT = {
    "graph_dir": "../graph_builder/output/graph_data",
    "train_label_file": "./train.csv",
    "val_label_file": "./val.csv",
    "batch_size": 16,
    "seed": 222,
    "learning_rate": 0.005,
    "num_epochs": 260,
    "early_stopping_patience": 45,
}
SECTIONED = {
    "paths": {"graph": "../graph_builder/output/graph_data", "save_dir": "./training_runs"},
    "dataloader": {"batch_size": 16, "seed": 222},
    "trainer": {"num_epochs": 260, "min_epochs": 1},  # a key that this package does not have
    "optimizer": {"learning_rate": 0.005},
    "selection": {"use_val_spearman": True, "spearman_weight": 1.0, "spearman_min_delta": 0.0},
}


def logger_rows(
    train: str = "train_mse",  # name of the training loss
    losses: tuple[float, ...] = LOSSES,
    start: int = 0,  # first epoch
) -> str:
    "metrics.csv of Lightning's CSV logger: a row after validation, another at the end of the epoch."
    lines = [f"epoch,step,{train},val_loss,val_pearson_corr,val_spearman_corr"]
    for epoch, (loss, rank) in enumerate(zip(losses, CORRELATIONS, strict=False), start=start):
        step = 23 * epoch + 22
        lines += [f"{epoch},{step},,{loss},{rank},{rank}", f"{epoch},{step},{0.9 * loss},,,"]
    return "\n".join(lines) + "\n"


def checkpoint_names(
    style: str,  # signed, unsigned, val or model
) -> list[str]:  # those of epochs 4, 5 and 3: best first, as the original ranked them
    "The names of the three checkpoints that were kept; the selection metric used the correlation of the epoch before."
    names = []
    for epoch in (4, 5, 3):
        loss = LOSSES[epoch]
        stale = loss - CORRELATIONS[epoch - 1]
        names.append(
            {
                "signed": f"checkpoint.sel-{stale:.5f}_val-{loss:.5f}_epoch{epoch:03d}.chkpt",
                "unsigned": f"checkpoint.sel-{-stale:.5f}_val-{loss:.5f}_epoch{epoch:03d}.chkpt",
                "val": f"checkpoint.val-{loss:.5f}_epoch{epoch:03d}.chkpt",
                "model": f"model.{loss:.5f}.chkpt",
            }[style]
        )
    return names


def run_metadata(name: str, completed: bool = True, parent: str | None = None) -> dict:
    "run_metadata.json: no status, paths of another machine, the environment of the process."
    folder = f"/Volumes/Data/training_runs/{name}"
    command = ["/opt/bin/python", "model_train_topoqa_cpu.py", "--run-dir", folder]
    command += ["--git-commit", "ff6b559cb", "--git-dirty"] + (["--resume-from", parent] if parent else [])
    runtime = {"training_seconds": 61, "epochs_completed": 6, "epochs_total": 260}
    ended = {
        "completed": "2025-11-03T11:45:02.913671",
        "runtime": runtime | {"epoch_seconds": [11, 10, 10, 10, 10, 10]},
        "artifacts": {"logs_dir": "logs", "metrics_dir": "metrics"},
    }
    return {
        "run_name": name,
        "created": "2025-11-03T11:03:07.411116",
        "source_config": f"{folder}/configs/sched_boost_seed222.yaml",
        "overrides": {"paths.graph": "/Volumes/Data/graph_data"},
        "notes": "baseline",
        "trial_label": None,
        "command": command,
        "environment": {"PYTHONHASHSEED": "222", "AWS_SECRET_ACCESS_KEY": "not for others"},
        "training_parameters": {"trainer": {"num_epochs": 260}, "dataloader": {"seed": 222}},
    } | (ended if completed else {})


def write_original_run(
    folder: Path,  # the run directory
    *,
    config: dict = SECTIONED,
    config_file: str = "config/config.yaml",  # or config.yaml
    metrics: tuple[str, ...] = ("cpu_training/version_0/metrics.csv",),
    rows: str | None = None,  # of each of them
    names: str = "signed",  # of checkpoints, see `checkpoint_names`
    metadata: dict | None = None,  # None: a completed run
    with_metadata: bool = True,
    link: bool = True,  # best.ckpt, absolute, as on the machine of the run
) -> Path:
    "A run directory as the original stack left it."
    files = {config_file: yaml.safe_dump(config, sort_keys=False)}
    files |= {name: logger_rows() if rows is None else rows for name in metrics}
    files |= {f"model_checkpoints/{name}": "weights" for name in checkpoint_names(names)}
    if with_metadata:
        files["run_metadata.json"] = json.dumps(metadata or run_metadata(folder.name), indent=2)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if link:
        best = Path(
            "/Volumes/Data/training_runs", folder.name, "model_checkpoints", checkpoint_names(names)[0]
        )
        (folder / "model_checkpoints" / "best.ckpt").symlink_to(best)
    return folder
