__version__ = "0.1.0"

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from topoqa_nb.ground.signals import end_without_cleaning

if "topoqa_nb.cli" in sys.orig_argv[1:4] or "topoqa" in map(lambda word: Path(word).name, sys.orig_argv[1:2]):
    end_without_cleaning()  # the command begins: a signal meets imports, and nothing to clean up

if TYPE_CHECKING:
    from topoqa_nb.answers.comparison import compare as compare
    from topoqa_nb.answers.evaluation import evaluate as evaluate
    from topoqa_nb.answers.export import export as export
    from topoqa_nb.answers.inference import Scorer as Scorer
    from topoqa_nb.answers.predict import predict as predict
    from topoqa_nb.answers.predictions import read_predictions as read_predictions
    from topoqa_nb.data.schema import resolve_schema as resolve_schema
    from topoqa_nb.data.store import open_store as open_store
    from topoqa_nb.everyday import demo_data as demo_data
    from topoqa_nb.everyday import run_sweep as run_sweep
    from topoqa_nb.ground.config import load_config as load_config
    from topoqa_nb.network.model import TopoQANet as TopoQANet
    from topoqa_nb.network.weights import load_model as load_model
    from topoqa_nb.runs.leaderboard import leaderboard as leaderboard
    from topoqa_nb.runs.leaderboard import summarise as summarise
    from topoqa_nb.runs.runs import find_run as find_run
    from topoqa_nb.training.module import predict_split as predict_split
    from topoqa_nb.training.resume import resume as resume
    from topoqa_nb.training.training import train as train


def __getattr__(name: str) -> object:
    "The everyday names, each from its page when it is first used: see `topoqa_nb.everyday`."
    if name.startswith("__"):
        raise AttributeError(name)
    from topoqa_nb.everyday import find_everyday

    return find_everyday(name)


def __dir__() -> list[str]:
    from topoqa_nb.everyday import EVERYDAY

    return [*globals(), *EVERYDAY]
