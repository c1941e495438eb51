"""What a sweep expects of a training's process, without a training: a run directory, and a piece of code."""

import json
import os  # noqa: F401, for the piece of code, as the three that follow
import signal  # noqa: F401
import subprocess  # noqa: F401
import sys
import time  # noqa: F401
from pathlib import Path

run, script = Path(sys.argv[1]), sys.argv[2]


def say(status: str, **more: object) -> None:
    "Write into the metadata what a training would, at once as it would."
    run.mkdir(parents=True, exist_ok=True)
    (run / "unfinished").write_text(json.dumps({"status": status} | more))
    (run / "unfinished").replace(run / "run_metadata.json")


exec(script)
