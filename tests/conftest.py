"""What several tests share."""

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from topoqa_nb.data.tiny import DemoPaths

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test processes share the cores

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    "Packed stores of a test session, its subprocesses included, stay out of the user's cache folder."
    folder = tmp_path_factory.mktemp("cache")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR") or str(usual / "matplotlib")
        )  # its list of fonts
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    "Real graphs and parity files that are not part of the repository; the test is skipped without them."
    folder = Path(os.environ.get("TOPOQA_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs the shared data: set TOPOQA_SHARED to its folder")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> "DemoPaths":
    "A data set on which a training takes a moment: 3 targets of 4 decoys."
    from topoqa_nb.data.tiny import write_tiny_dataset  # with torch, after its threads are set

    return write_tiny_dataset(tmp_path_factory.mktemp("tiny") / "data", targets=3, decoys=4)


def is_running(number: int) -> bool:
    "Whether there is a process of that number that has not ended."
    try:
        return Path(f"/proc/{number}/stat").read_text().split(")")[-1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def in_turn(names: str, values: Iterable) -> Callable:
    """As `pytest.mark.parametrize`, in one case: a failure's last line names the values it happened with.

    Fixtures are made once, so a test that changes one, or skips, takes `parametrize`.
    """
    arguments, values = [name.strip() for name in names.split(",")], list(values)
    assert values, "nothing would be tested"

    def decorate(test: Callable) -> Callable:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def run(**fixtures: object) -> None:
            for value in values:
                row = value if len(arguments) > 1 else (value,)
                chosen = dict(zip(arguments, row, strict=True))
                try:
                    test(**chosen, **fixtures)
                except (Exception, pytest.fail.Exception) as error:
                    error.add_note(f"with {chosen}")
                    raise

        kept = [parameter for name, parameter in signature.parameters.items() if name not in arguments]
        run.__signature__ = signature.replace(parameters=kept)
        return run

    return decorate
