"What somebody else wrote may be wrong in any way: it runs nothing, writes nothing elsewhere, and is refused in one line."

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer

from topoqa_nb.cli import main
from topoqa_nb.data.dataset import open_data
from topoqa_nb.data.graphs import list_graphs, read_graph
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.entry import app
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import DataError, SchemaError, read_json, write_json
from topoqa_nb.runs.leaderboard import print_rows
from topoqa_nb.runs.record import RunDirectory
from topoqa_nb.runs.runs import create_run
from topoqa_nb.runs.selection import best_checkpoint
from topoqa_nb.training.module import predict_split
from topoqa_nb.training.training import train


def settings_of(data, folder: Path) -> list[str]:
    return [
        f"paths.graph={data.graph_dir}", f"paths.train_labels={data.train_labels}", f"paths.val_labels={data.val_labels}",
        f"paths.save_dir={folder}", f"paths.store={folder / 'stores'}", "trainer.num_epochs=1", "model.hidden_dim=8", "model.attention_head=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("hostile") / "data", sidecar=True)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> RunDirectory:
    return train(load_config(None, settings_of(data, tmp_path_factory.mktemp("runs"))), run_name="one")


@pytest.fixture
def run(trained, tmp_path) -> RunDirectory:
    "A copy of a completed run of one epoch."
    return RunDirectory(Path(shutil.copytree(trained.path, tmp_path / "runs" / "one", symlinks=True)))


def refusal(capsys: pytest.CaptureFixture, *arguments: object, code: int = 2) -> str:
    "The one line with which a command refuses."
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code, arguments
    err = capsys.readouterr().err
    assert err.startswith("topoqa: error: ") and err.count("\n") == 1, err
    return err


class Executes:
    "A pickle of this makes a directory when it is loaded without restrictions."

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


# --- trust ---


def test_a_downloaded_run_does_not_decide_what_is_trusted(run, data, tmp_path, capsys):
    graphs, proof = Path(shutil.copytree(data.graph_dir, tmp_path / "graphs")), tmp_path / "code_ran"
    file = next(iter(list_graphs(graphs).values()))
    unsafe = torch.load(file, weights_only=False)
    unsafe.metadata = {"builder": Executes(proof)}
    torch.save(unsafe, file)
    text = run.config_file.read_text().replace(str(data.graph_dir), str(graphs))
    run.config_file.write_text(text.replace("trust_pickles: false", "trust_pickles: true"))
    metadata = read_json(run.metadata_file)
    metadata["training_parameters"]["paths"] |= {"graph": str(graphs), "trust_pickles": True}
    write_json(run.metadata_file, metadata)
    more = ["resume", "--run-dir", run.path, "--override", "trainer.num_epochs=2", "--accept-drift"]
    assert "paths.trust_pickles=true" in refusal(capsys, *more)
    refusal(capsys, "run", "--config", run.config_file)
    assert not proof.exists()
    assert main([*map(str, more), "--override", "paths.trust_pickles=true"]) == 0
    assert proof.exists()


# --- a score is one of these features ---


def test_graphs_of_equal_width_and_other_columns_are_not_scored(trained, data, tmp_path):
    other = Path(shutil.copytree(data.graph_dir.parent, tmp_path / "data"))
    sidecar = other / "graph_data" / "graph_metadata.json"
    entries = read_json(sidecar)
    assert len(predict_split(trained.last_checkpoint, opened(trained, other).val))
    write_json(sidecar, {name: entry | {"edge_module": "edge/other/v1"} for name, entry in entries.items()})
    with pytest.raises(SchemaError, match="edge/tiny/v1 in the checkpoint, edge/other/v1 in the graphs"):
        predict_split(trained.last_checkpoint, opened(trained, other).val)


def opened(run: RunDirectory, data: Path):
    paths = {"graph": data / "graph_data", "train_labels": data / "train.csv", "val_labels": data / "val.csv"}
    return open_data(
        load_config(run.config_file, {f"paths.{name}": path for name, path in paths.items()}).config
    )


# --- size ---


def test_bombs_are_refused(data, tmp_path, capsys):
    graph = torch.load(next(iter(list_graphs(data.graph_dir).values())), weights_only=False)
    loop: dict = {}
    loop["again"] = loop
    doubled: object = "x" * 20
    for _ in range(40):
        doubled = [doubled, doubled]
    wide = torch.zeros(1).expand(100_000, 100_000)
    changes = [
        {"x": wide},
        {"metadata": loop},
        {"metadata": {"a": doubled}},
        {"edge_attr": torch.empty(3, 3, device="meta")},
    ]
    for number, change in enumerate(changes):
        bad = graph.clone()
        for key, value in change.items():
            bad[key] = value
        file = tmp_path / f"{number}.pt"
        torch.save(bad, file)
        assert file.stat().st_size < 100_000
        with pytest.raises(DataError, match=file.name):
            read_graph(file)


# --- places ---


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/b", "a\\b", ""])
def test_names_that_climb_out_are_refused(run, capsys, name):
    metadata = read_json(run.metadata_file)
    write_json(run.metadata_file, metadata | {"checkpoints": metadata["checkpoints"] | {"best": name}})
    assert "checkpoints.best" in refusal(capsys, "summarise", "--run-dir", run.path)
    write_json(run.metadata_file, metadata)
    content = torch.load(run.last_checkpoint, weights_only=True)
    content["callbacks"]["RankedCheckpoints"]["candidates"][0]["filename"] = name
    torch.save(content, run.last_checkpoint)
    before = sorted(run.path.rglob("*"))
    words = ("resume", "--run-dir", run.path, "--checkpoint", "last", "--override", "trainer.num_epochs=2")
    assert "filename" in refusal(capsys, *words)
    assert sorted(set(run.path.rglob("*")) - {run.path / ".lock"}) == [
        path for path in before if path.name != ".lock"
    ]


# --- secrets ---


def test_a_password_is_refused_and_not_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in (
        "http://me:hunter2@host:5000",
        "postgresql://me:hunter2@host/db",
        "mysql://host/db?password=hunter2",
    ):
        words = ("run", "--config", "config.yaml", "--override", f"mlflow.tracking_uri={uri}")
        assert "hunter2" not in refusal(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_no_cell_is_a_formula(capsys):
    print_rows([{"run_name": name, "score": -0.5} for name in ("=1+1", "+a", "-b", "@c", "plain")], "csv")
    names = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["'=1+1", "'+a", "'-b", "'@c", "plain"]


def test_a_parameter_that_is_no_name_reaches_no_notebook(capsys):
    assert "a name of letters, digits and _" in refusal(capsys, "pipeline", "-p", "x;import os;y=1")


# --- links that are not links ---


@pytest.mark.parametrize("form", ["text", "far"])
def test_what_lies_beside_a_link_that_is_none_is_found(run, capsys, form, tmp_path):
    link = run.checkpoints / "best.ckpt"
    meant, far = link.resolve(), f"/Volumes/D/runs/one/model_checkpoints/{link.resolve().name}"
    link.unlink()
    link.write_text(far) if form == "text" else link.symlink_to(far)
    assert best_checkpoint(run.checkpoints) == meant
    assert main(["summarise", "--run-dir", str(run.path)]) == 0
    words = ["run", "--config", run.config_file, "--run-name", "child", "--output-root", tmp_path / "new"]
    words += ["--resume-from", link]
    if form == "text":
        assert "a text that names another file" in refusal(capsys, *words)
        assert not (tmp_path / "new" / "child").exists()
    else:
        assert main([str(word) for word in words]) == 0


def test_latest_that_became_a_folder_is_left_alone(run, data, tmp_path):
    root = tmp_path / "runs"
    (root / "latest").mkdir()
    loaded = load_config(None, settings_of(data, root))
    create_run(root, "two", loaded, loaded.config)
    assert (root / "two").is_dir() and (root / "latest").is_dir() and not (root / "latest").is_symlink()


# --- what a message tells to do ---


def test_options_that_errors_name_exist_on_their_commands(run, data, tmp_path, capsys, monkeypatch):
    "Each error is provoked, and every option in its text is one of the command that said it."
    monkeypatch.chdir(tmp_path)
    commands = typer.main.get_command(app).commands
    provoked = [
        ("fine-tune", "--run-root", "nowhere"), ("fine-tune", "-p", "x"), ("resume", "--run-dir", run.path), ("resume", "--run-id", "one"), ("resume",), ("summarise",), ("monitor",),
        ("resume", "--run-dir", run.path, "--override", "optimizer.learning_rate=1"), ("resume", "--run-dir", run.path, "--checkpoint", "third"),
        ("archive",), ("archive", "--run-id", "one", "--root", "elsewhere"), ("batch", "--manifest", "nowhere.yaml"), ("pipeline", "--manifest", "nowhere.yaml"),
        ("pipeline", "-p", "x;y=1"), ("ramdisk", "--", "--dry-run"), ("run", "--config", "nowhere.yaml"), ("run", "--config", run.config_file, "--resume-from", "gone"),
        ("run", "--config", run.config_file, "--override", "mlflow.tracking_uri=http://a:b@c"), ("config", "--show", "nowhere.yaml"), ("validate", "--graph-dir", "nowhere"),
    ]  # fmt: skip
    for words in provoked:
        said = refusal(capsys, *words)
        own = {
            option
            for each in commands[words[0]].params
            if each.opts[0].startswith("-")
            for option in each.opts
        }
        known = (
            own
            | {"--help", "-p"}
            | {option for other in commands for option in named_for(said, other, commands)}
        )
        fix = said.rpartition("; ")[2]
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", fix):
            assert option in known, (words, said)


def named_for(said: str, command: str, commands: dict) -> set[str]:
    "The options of a command that a message names with it, as in `topoqa resume --force`."
    return (
        {option for each in commands[command].params for option in each.opts}
        if f"topoqa {command}" in said
        else set()
    )
