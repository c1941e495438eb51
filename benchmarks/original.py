"""A training loop in the original's way, written for comparison.

A file per graph and epoch, the last 256 kept; PyG's collation; PyG's GATv2 layer; the edge update for every head, averaged
afterwards; Lightning with its own checkpoints, logger and early stopping. The order of the graphs, the initial weights
and the random stream are those of `topoqa_nb.training.training`, so that the metrics can be compared.

    python benchmarks/original.py FOLDER --save-dir OUT [--config NAME] [--threads 2] [--set key=value ...]
    python benchmarks/original.py FOLDER --save-dir OUT OUT ... --evaluate [--config NAME]
"""

import argparse
import os
import time
from collections import OrderedDict
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported

import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from scipy.stats import pearsonr, spearmanr
from torch.nn import functional
from torch.utils.data import Dataset
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from topoqa_nb.data.batches import EpochBatches
from topoqa_nb.data.schema import EdgeSchema, FeatureSchema, NodeSchema
from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.settings import Config
from topoqa_nb.network.attention import EdgeOrder
from topoqa_nb.network.model import TopoQANet
from topoqa_nb.training.devices import lightning_precision
from topoqa_nb.training.module import make_optimizer, make_scheduler, window_scale

KEPT_GRAPHS = 256


class GraphFiles(Dataset):
    "One `torch.load` per graph unless it is among those used last."

    def __init__(self, graph_dir: Path, labels: Path):
        table = pd.read_csv(labels)
        self.files = [graph_dir / f"{name}.pt" for name in _located(graph_dir, table["MODEL"])]
        self.dockq = torch.tensor(table["dockq"].to_numpy(), dtype=torch.float32)
        self.kept: OrderedDict[int, Data] = OrderedDict()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Data:
        if number not in self.kept:
            self.kept[number] = self.load(number)
            if len(self.kept) > KEPT_GRAPHS:
                self.kept.popitem(last=False)
        self.kept.move_to_end(number)
        return self.kept[number]

    def load(self, number: int) -> Data:
        graph = torch.load(self.files[number], weights_only=False)
        return Data(
            x=graph.x,
            edge_index=graph.edge_index,
            edge_attr=graph.edge_attr,
            y=self.dockq[number : number + 1],
        )


def _located(graph_dir: Path, models: pd.Series) -> list[str]:
    "Labels name a decoy with or without its folder."
    names = {path.relative_to(graph_dir).with_suffix("").as_posix() for path in graph_dir.rglob("*.pt")}
    by_stem = {name.rsplit("/", 1)[-1]: name for name in names}
    return [model if model in names else by_stem[model] for model in models]


class OriginalNet(TopoQANet):
    "The same parameters and the same equations, computed step by step."

    def forward(self, batch: Data) -> torch.Tensor:
        nodes, edges = self.node_embedding(batch.x), self.edge_embedding(batch.edge_attr)
        for layer in self.layers:
            nodes, edges = one_layer(layer, nodes, edges, batch.edge_index)
        order = EdgeOrder("reference", batch.edge_index, ptr=None, rows=None, file_rows=None)
        return self.read_out(*self.pool_states(batch, nodes, edges, order))


def one_layer(layer, nodes, edges, edge_index) -> tuple[torch.Tensor, torch.Tensor]:
    "Attention, the edge update and ELU, added to what came in where the recipe asks for it."
    seen = (nodes, edges) if layer.node_norm is None else (layer.node_norm(nodes), layer.edge_norm(edges))
    new_nodes = layer.attention(seen[0], edge_index, seen[1])
    new_edges = functional.elu(full_edge_update(layer.edge_update, new_nodes, edge_index, seen[1]))
    new_nodes = functional.elu(new_nodes)
    return (new_nodes, new_edges) if layer.node_norm is None else (nodes + new_nodes, edges + new_edges)


def full_edge_update(update, nodes, edge_index, edges) -> torch.Tensor:
    "Every head's update of every edge, then their mean."
    source, target = edge_index
    states = torch.cat([nodes[source], nodes[target], edges], dim=1)
    heads = functional.linear(states, update.weight, update.bias)
    return heads.view(len(edges), update.heads, -1).mean(1)


class OriginalModule(LightningModule):
    "MSE against DockQ, optimizer and schedule of the configuration, the composite metric after each epoch."

    def __init__(self, model: OriginalNet, config: Config):
        super().__init__()
        self.model, self.config, self.rows = model, config, []

    def configure_optimizers(self) -> dict:
        optimizer = make_optimizer(self.parameters(), self.config.optimizer)
        scheduler = make_scheduler(optimizer, self.config.scheduler, self.config.trainer.num_epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    def training_step(self, batch, index: int) -> torch.Tensor:
        loss = functional.mse_loss(self.model(in_precision(batch, self.dtype)), batch.y.to(self.dtype))
        self.log("train_mse", loss, on_step=False, on_epoch=True, batch_size=batch.num_graphs)
        return loss * window_scale(
            index, int(self.trainer.num_training_batches), self.trainer.accumulate_grad_batches
        )

    def on_validation_epoch_start(self) -> None:
        self.seen = []

    def validation_step(self, batch, index: int) -> None:
        prediction = self.model(in_precision(batch, self.dtype))
        self.seen.append((prediction.double().cpu(), batch.y.double().cpu()))

    def on_validation_epoch_end(self) -> None:
        prediction, dockq = (torch.cat(part) for part in zip(*self.seen, strict=True))
        loss = functional.mse_loss(prediction, dockq)
        rank = float(spearmanr(prediction, dockq)[0])
        values = {
            "val_loss": loss,
            "val_pearson_corr": float(pearsonr(prediction, dockq)[0]),
            "val_spearman_corr": rank,
        }
        self.log_dict(values | {"selection_metric": loss - rank})
        self.rows.append({name: float(value) for name, value in values.items()})

    def on_train_epoch_end(self) -> None:
        self.rows[-1]["train_loss"] = float(self.trainer.callback_metrics["train_mse"])


def in_precision(batch, dtype: torch.dtype):
    "Files hold 32 bit."
    return batch if dtype == torch.float32 else batch.apply(lambda each: each.to(dtype), "x", "edge_attr")


class Clock(Callback):
    "Seconds of each epoch, checkpoints and metrics included."

    def __init__(self):
        self.times: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.times.append(time.perf_counter())

    @property
    def epochs(self) -> list[float]:
        "From one epoch's start to the next."
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def fit(
    folder: Path, config: Config, save_dir: Path, *more: Callback
) -> tuple[list[dict[str, float]], list[float]]:
    "Train on `graphs/`, `train.csv` and `val.csv` of a folder: metrics and seconds of each epoch."
    parts = [GraphFiles(folder / "graphs", folder / f"{name}.csv") for name in ("train", "val")]
    loading, trainer = config.dataloader, config.trainer
    torch.manual_seed(loading.seed)
    model = network(parts[0], config)
    if model.sizes:
        counts = torch.tensor(
            [(graph.num_nodes, graph.num_edges) for graph in map(parts[0].load, range(len(parts[0])))]
        )
        model.sizes.measure(*counts.T)
    torch.manual_seed(loading.seed)
    orders = [EpochBatches(len(part), loading.batch_size, part is parts[0], loading.seed) for part in parts]
    loaders = [
        DataLoader(part, batch_sampler=order, generator=torch.Generator())
        for part, order in zip(parts, orders, strict=True)
    ]
    module, clock = OriginalModule(model, config), Clock()
    checkpoints = ModelCheckpoint(
        save_dir / "checkpoints", "{epoch}", monitor="selection_metric", save_top_k=3, save_last=True
    )
    stopping = EarlyStopping("selection_metric", patience=config.early_stopping.patience)
    Trainer(
        accelerator=trainer.accelerator,
        max_epochs=trainer.num_epochs,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        precision=lightning_precision(trainer.precision),
        callbacks=[clock, checkpoints, stopping, LearningRateMonitor(), NextOrder(orders[0]), *more],
        logger=CSVLogger(save_dir, name="logs"),
        deterministic=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(module, *loaders)
    return module.rows, clock.epochs


def network(files: GraphFiles, config: Config) -> OriginalNet:
    "With fresh weights, for the widths of the graphs."
    sample = files[0]
    schema = FeatureSchema(EdgeSchema(sample.edge_attr.shape[1]), NodeSchema(sample.x.shape[1]))
    return OriginalNet(schema, **config.model.model_dump())


def evaluate(folder: Path, config: Config, save_dirs: list[Path]) -> dict[str, float]:
    "How good the mean of some trainings is on the validation graphs, from their last checkpoints."
    files = GraphFiles(folder / "graphs", folder / "val.csv")
    predictions = []
    for save_dir in save_dirs:
        saved = torch.load(save_dir / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
        model = network(files, config).eval()
        model.load_state_dict({key.removeprefix("model."): value for key, value in saved.items()})
        with torch.inference_mode():
            scores = [model(batch) for batch in DataLoader(files, batch_size=config.dataloader.batch_size)]
        predictions.append(torch.cat(scores))
    mean = torch.stack(predictions).mean(0)
    return {
        "pearson": float(pearsonr(mean, files.dockq)[0]),
        "spearman": float(spearmanr(mean, files.dockq)[0]),
        "rmse": float(functional.mse_loss(mean, files.dockq).sqrt()),
    }


class NextOrder(Callback):
    "Tells the sampler which epoch comes; Lightning does so for samplers, not for batch samplers."

    def __init__(self, order: EpochBatches):
        self.order = order

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.order.set_epoch(trainer.current_epoch + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with graphs/, train.csv and val.csv")
    parser.add_argument("--save-dir", type=Path, nargs="+", required=True, help="for checkpoints and logs")
    parser.add_argument("--evaluate", action="store_true", help="the mean of trainings, instead of training")
    parser.add_argument("--config", default="sched_boost_seed222.yaml", help="a configuration")
    parser.add_argument("--set", nargs="*", default=[], help="overrides, key=value")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, arguments.set).config
    if arguments.evaluate:
        print(evaluate(arguments.folder, config, arguments.save_dir))
        return
    rows, seconds = fit(arguments.folder, config, arguments.save_dir[0])
    print(rows[-1], [round(each, 3) for each in seconds])


if __name__ == "__main__":
    main()
