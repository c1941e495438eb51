"""What several tests share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test processes share the cores

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    "Real graphs and parity files that are not part of the repository; the test is skipped without them."
    folder = Path(os.environ.get("TOPOQA_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs the shared data: set TOPOQA_SHARED to its folder")
    return folder
