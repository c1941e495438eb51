"""What several tests share."""

import functools
import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from topoqa_nb.data.tiny import DemoPaths
    from topoqa_nb.runs.record import RunDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test processes share the cores

REPOSITORY = Path(__file__).resolve().parent.parent


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
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300}  # a lost node is soon known
    quick |= {"health_check_failure_threshold": 3}
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # as the tests: on a busy machine others would starve them
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        alone = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        found = with_node(None, _system_config=quick, temp_dir=folder, **alone)
        with_node(found)
        patch.setenv("RAY_ADDRESS", found.address)
        try:
            yield found
        finally:
            found.shutdown()


def with_node(cluster: "Cluster | None", **options: object) -> "Cluster":
    """A cluster with one node of one CPU more; of none, a new one.

    Ray ends a node whose helpers take more than 15 s to start, a limit that cannot be set and that a busy machine
    may pass: what did not start is started again, and a machine on which nothing starts is none for these tests.
    """
    from ray.cluster_utils import Cluster

    for _ in range(3):
        before, grown = psutil.Process().children(), cluster or Cluster()
        try:
            grown.add_node(num_cpus=1, object_store_memory=2**27, **options)
            return grown
        except Exception as problem:
            if "timed out during startup" not in str(problem):
                raise
            for process in [each for each in psutil.Process().children() if each not in before]:
                process.kill()
    pytest.skip("a node of Ray did not start within the 15 s that Ray gives it, three times")


def end_second_node(cluster: "Cluster") -> None:
    "As when the power is cut: all at once, and nobody has time for a last word."
    node = cluster.list_all_nodes()[-1]
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.remove_node(node, allow_graceful=False)


@contextmanager
def a_node_lost(cluster: "Cluster", when: Callable[[], object]) -> Iterator[list]:
    "Inside of this the second node is lost as soon as something is true; what that was."
    seen, ended = [], threading.Event()

    def lose() -> None:
        while not seen and not ended.wait(0.01):
            if found := when():
                seen.append(found)
                end_second_node(cluster)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        if seen:
            with_node(cluster)


def trained_on_second_node(cluster: "Cluster", root: Path) -> "RunDirectory | None":
    "A run with a complete epoch whose process is on the second node."
    from topoqa_nb.runs.record import read_record
    from topoqa_nb.runs.runs import list_runs

    raylet = cluster.list_all_nodes()[-1].all_processes["raylet"][0].process.pid
    for run in list_runs(root) if root.is_dir() else ():
        with suppress(psutil.NoSuchProcess, KeyError):
            above = psutil.Process(read_record(run).environment["process"]["pid"]).parents()
            if run.last_checkpoint.exists() and raylet in [process.pid for process in above]:
                return run
    return None


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
