"What somebody else wrote may be wrong in any way: it runs nothing, writes nothing elsewhere, and is refused in one line."

import os
import shutil
from pathlib import Path

import pytest
import torch

from topoqa_nb.cli import main
from topoqa_nb.data.dataset import open_data
from topoqa_nb.data.graphs import list_graphs
from topoqa_nb.data.tiny import write_tiny_dataset
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import SchemaError, read_json, write_json
from topoqa_nb.runs.record import RunDirectory
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
    for command in ("fine-tune", "run"):
        words = (
            ["--config", run.config_file]
            if command == "run"
            else ["--run-dir", run.path, "--run-root", tmp_path / "tuned"]
        )
        assert main([command, *map(str, words)]) in (1, 2)
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
