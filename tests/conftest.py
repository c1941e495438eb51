"""What several tests share."""

import functools
import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from topoqa_nb.data.tiny import DemoPaths

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test processes share the cores

REPOSITORY = Path(__file__).resolve().parent.parent

# The same examples every time, and no clock: what holds on one machine holds on a slow one.
settings.register_profile(
    "here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("here")

PATIENCE = 300.0  # seconds after which something will not happen any more, on a machine however busy


def until(condition: Callable[[], object]) -> None:
    "Wait for what is sure to happen; only a test that fails takes long."
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# What takes long to make and is only looked at: the tests of one such thing go to one worker, which makes it once.
MADE_ONCE = ("attempts", "empty_database", "real", "root", "sound_tree", "sweep", "two", "wheel")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks afterwards
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            for name in MADE_ONCE:
                if name in item.fixturenames:
                    item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {name}"))


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


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory: pytest.TempPathFactory) -> "DemoPaths":
    "The set of the defaults, 24 targets of 12 decoys, made once for all processes of a session; only looked at."
    from filelock import FileLock

    from topoqa_nb.data.demo import ensure_demo

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(folder / "demo.lock"):
        return ensure_demo(folder / "demo_set")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    "A data set of 12 decoys and the overrides that train on it."
    from topoqa_nb.data.tiny import write_tiny_dataset

    demo = write_tiny_dataset(tmp_path_factory.mktemp("tiny") / "set")
    return {
        "paths.graph": str(demo.graph_dir),
        "paths.train_labels": str(demo.train_labels),
        "paths.val_labels": str(demo.val_labels),
        "dataloader.batch_size": 2,
        "trainer.accumulate_grad_batches": 1,
        "model.hidden_dim": 8,
        "model.attention_head": 2,
        "trainer.num_epochs": 2,
    }


@pytest.fixture(scope="session")
def cluster() -> Iterator["Cluster"]:
    """A Ray cluster of two nodes of one CPU on this machine, skipped without Ray. A test that ends a node adds another.

    Tests that use it are of one `xdist_group`, named ray.
    """
    pytest.importorskip("ray", reason="needs Ray: pip install 'topoqa_nb[ray]'")
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300}  # a lost node is soon known
    quick |= {"health_check_failure_threshold": 3}
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # as the tests: on a busy machine others would starve them
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr("topoqa_nb.ground.cluster.ANSWER_SECONDS", PATIENCE)
        head = {"include_dashboard": False, "_system_config": quick, "temp_dir": folder}
        found = Cluster()
        for more in (head, {}):
            add_node(found, **more)
        patch.setenv("RAY_ADDRESS", found.address)
        try:
            yield found
        finally:
            found.shutdown()


def add_node(cluster: "Cluster", **more: object) -> None:
    "One of one CPU."
    cluster.add_node(wait=False, num_cpus=1, object_store_memory=2**27, **more)
    cluster.wait_for_nodes(PATIENCE)


@functools.cache
def module_of(path: str) -> ModuleType:
    "A file of the repository that belongs to no package, as a module."
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forked(work: Callable, *arguments: object) -> ForkProcess:
    "A process that does some work with all that this one has imported, and ends with what it gives to `sys.exit`."
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def speak_into(out: int, err: int) -> None:
    "In a forked process: what it says goes to these descriptors, as if it had been started with them."
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


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
