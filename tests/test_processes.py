"A copy of the fork server behaves as a process that Python itself has started."

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest
from conftest import PATIENCE, in_turn, is_running, until

from topoqa_nb.ground.core import RunError
from topoqa_nb.sweep.processes import PRELOADED, Forked, ForkServer

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems start plain processes")

# All that a program can see of how it was started, apart from its parent.
SELF_PORTRAIT = """
import gc, json, os, signal, sys, threading
seen = {
    "argv": sys.argv[1:], "name": __name__, "folder": os.getcwd(), "leads its session": os.getsid(0) == os.getpid(),
    "environment": {key: value for key, value in os.environ.items() if key != "_"},
    "stdin": os.readlink("/proc/self/fd/0"), "open": len(os.listdir("/proc/self/fd")),
    "threads": threading.active_count(), "interrupt": str(signal.getsignal(signal.SIGINT)),
    "ends": str(signal.getsignal(signal.SIGTERM)), "group": os.getpgid(0) == os.getpid(),
}
print(json.dumps(seen))
print("a word", file=sys.stderr)
"""


@pytest.fixture
def server():
    with ForkServer([]) as server:
        yield server


@pytest.fixture(params=["copy", "plain"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    "A server, and what takes its place on other systems."
    if request.param == "plain":
        monkeypatch.setattr("topoqa_nb.sweep.processes.sys.platform", "darwin")
    with ForkServer([]) as server:
        assert (server.process is None) == (request.param == "plain" or sys.platform != "linux")
        yield server


MODULES = itertools.count()


def start(server: ForkServer, folder: Path, code: str, *arguments: str, **environment: str):
    name = f"program{next(MODULES)}"  # each its own, so that no compiled one of before is taken for it
    (folder / f"{name}.py").write_text(code)
    files = folder / "out", folder / "err"
    with chdir(folder):
        return server.start(["-m", name, *arguments], os.environ | environment, *files)


@linux
def test_a_copy_sees_what_a_plain_process_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = {}
    for platform in ("linux", "darwin"):
        monkeypatch.setattr("topoqa_nb.sweep.processes.sys.platform", platform)
        with ForkServer([]) as server:
            process = start(server, tmp_path, SELF_PORTRAIT, "two words", "ä", COLOUR="red")
            assert process.wait() == 0, (tmp_path / "err").read_text()
        seen[platform] = json.loads((tmp_path / "out").read_text())
        assert (tmp_path / "err").read_text() == "a word\n"
    assert seen["linux"] == seen["darwin"]
    assert seen["linux"]["environment"]["COLOUR"] == "red"


@in_turn(
    "code, expected",
    [
        ("pass", 0),
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('a reason')", 1),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os; os._exit(5)", 5),
    ],
)
def test_exit_codes(either: ForkServer, code: str, expected: int, tmp_path: Path):
    process = start(either, tmp_path, code)
    assert process.wait() == expected
    assert process.poll() == process.returncode == expected


def test_the_last_line_of_an_error_is_pythons(either: ForkServer, tmp_path: Path):
    start(either, tmp_path, "{}['absent']").wait()
    assert (tmp_path / "err").read_text().splitlines()[-1] == "KeyError: 'absent'"


def test_a_module_is_run_as_the_main_program(
    either: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "program.py").write_text("import sys; print(__name__, sys.argv)")
    monkeypatch.chdir(tmp_path)  # as with `python -m`, where one is
    process = either.start(["-m", "program", "one"], os.environ, tmp_path / "out", tmp_path / "err")
    assert process.wait() == 0, (tmp_path / "err").read_text()
    assert (tmp_path / "out").read_text() == f"__main__ ['{tmp_path}/program.py', 'one']\n"


def test_what_stood_in_the_files_is_gone(either: ForkServer, tmp_path: Path):
    (tmp_path / "out").write_text("of before")
    start(either, tmp_path, "print('now')").wait()
    assert (tmp_path / "out").read_text() == "now\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_arrives(either: ForkServer, signum: int, tmp_path: Path):
    code = "import signal, sys, time\n"
    code += f"signal.signal({int(signum)}, lambda *seen: sys.exit(3))\nprint('ready', flush=True)\ntime.sleep(600)"
    process = start(either, tmp_path, code)
    until(lambda: (tmp_path / "out").read_text() or process.poll() is not None)
    process.send_signal(signum)
    assert process.wait() == 3
    process.send_signal(signum)  # nobody is there any more


@linux
def test_a_signal_in_the_first_moment_is_not_lost(server: ForkServer, tmp_path: Path):
    "Between its making and its own handlers a copy is as deaf as the server."
    for signum in (signal.SIGINT, signal.SIGTERM) * 5:
        process = start(server, tmp_path, "import time; time.sleep(600)")
        process.send_signal(signum)
        assert process.wait() in (-signum, 1)  # a KeyboardInterrupt so early is an error


def test_a_hundred_processes_end_as_themselves(either: ForkServer, tmp_path: Path):
    "Answers come in any order; each belongs to its process."
    processes = []
    for number in range(100 if either.process else 8):
        (tmp_path / str(number)).mkdir()
        code = f"import sys, time; time.sleep({number % 7} / 50); print({number}); sys.exit({number})"
        processes.append(start(either, tmp_path / str(number), code))
    assert [process.wait() for process in processes] == list(range(len(processes)))
    assert all((tmp_path / f"{number}/out").read_text() == f"{number}\n" for number in range(len(processes)))


@linux
def test_two_servers_at_a_time(tmp_path: Path):
    with ForkServer([]) as one, ForkServer([]) as other:
        first, second = (
            start(one, tmp_path, "raise SystemExit(1)"),
            start(other, tmp_path, "raise SystemExit(2)"),
        )
        assert (second.wait(), first.wait()) == (2, 1)


@linux
def test_copies_know_the_modules_and_draw_different_random_numbers(tmp_path: Path):
    code = """
import os, random, sys, tempfile
known = "topoqa_nb.training.training" in sys.modules, os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
import numpy, torch
print(*known, random.random(), tempfile.mktemp(), numpy.random.random(), torch.rand(1).item(), torch.initial_seed())
"""
    seen = []
    with ForkServer(PRELOADED) as server:
        for _ in range(2):
            assert start(server, tmp_path, code).wait() == 0, (tmp_path / "err").read_text()
            seen.append((tmp_path / "out").read_text().split())
    assert seen[0][:2] == seen[1][:2] == ["True", "1"]  # the second was set by an import
    assert all(one != other for one, other in zip(seen[0][2:], seen[1][2:], strict=True))


@linux
def test_the_server_may_fork(tmp_path: Path):
    "One thread, no accelerator: what it has imported leaves a copy nothing to wait for."
    code = """
import os, torch
bad = torch._C._cuda_isInBadFork() if torch.backends.cuda.is_built() else False
print(len(os.listdir(f"/proc/{os.getppid()}/task")), bad, torch.get_num_threads())
rows = torch.randn(400, 400)
print((rows @ rows).shape[0], len(os.listdir("/proc/self/task")))
"""
    with ForkServer(PRELOADED) as server:
        for threads in ("1", "2"):
            assert start(server, tmp_path, code, OMP_NUM_THREADS=threads).wait() == 0
            found = (tmp_path / "out").read_text().split()
            assert found[:4] == ["1", "False", threads, "400"]
            assert (int(found[4]) > 1) == (threads == "2")


@linux
def test_a_server_that_was_killed_leaves_nobody_behind(server: ForkServer, tmp_path: Path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    process = start(server, tmp_path, "import time; " + code.replace("input()", "time.sleep(600)"))
    until(lambda: (tmp_path / "out").read_text().endswith("\n"))
    helper = int((tmp_path / "out").read_text())
    server.process.kill()
    assert process.wait() == -signal.SIGKILL
    for number in (process.pid, helper):
        until(lambda number=number: not is_running(number))
    assert start(server, tmp_path, "raise SystemExit(4)").wait() == 4  # by a new server


@linux
def test_a_copy_that_has_only_just_begun_is_not_left_behind_either(tmp_path: Path):
    for _ in range(15):
        with ForkServer([]) as server:
            process = start(server, tmp_path, "import time; time.sleep(600)")
            server.process.kill()
            assert process.wait() == -signal.SIGKILL
            until(lambda number=process.pid: not is_running(number))


@linux
def test_a_signal_to_every_process_leaves_the_copies_their_time(server: ForkServer, tmp_path: Path):
    "As when a job system stops a job."
    code = "import signal, sys, time\n"
    code += "def stop(*_): time.sleep(0.5); print('last words'); sys.exit(3)\n"
    code += "signal.signal(signal.SIGTERM, stop); print('ready', flush=True); time.sleep(600)"
    process = start(server, tmp_path, code)
    until(lambda: (tmp_path / "out").read_text())
    for number in (server.process.pid, process.pid):
        os.kill(number, signal.SIGTERM)
    assert process.wait() == 3
    assert (tmp_path / "out").read_text() == "ready\nlast words\n"
    assert start(server, tmp_path, "pass").wait() == 0


@linux
def test_a_long_request_survives_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A pipe holds 64 KB; a signal that is only noted cuts the writing of more than that short."
    slow = "import time; from pathlib import Path\nwhile not Path('noted').exists(): time.sleep(0.02)"
    (tmp_path / "slow.py").write_text(slow)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, lambda *_: Path("noted").touch())
    try:
        with ForkServer(["slow"]) as server:
            server.is_ready = lambda: True  # so that it is asked while it imports
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            process = start(server, tmp_path, "import os; print(len(os.environ['LONG']))", LONG="x" * 100_000)
            assert process.wait() == 0
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "out").read_text() == "100000\n"


@linux
def test_many_open_files_are_no_obstacle(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("no more than that may be opened here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with ForkServer([]) as server:
            assert start(server, tmp_path, "pass").wait() == 0
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@linux
def test_a_process_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path):
    code = """
import os, resource
from pathlib import Path
from topoqa_nb.ground.core import RunError
from topoqa_nb.sweep.processes import ForkServer
with ForkServer(["no_more_processes"]) as server:
    try:
        server.start(["-m", "this"], os.environ, Path("out"), Path("err"))
    except RunError as problem:
        print(problem)
"""
    module = "import os\ndef none_left(): raise OSError(11, 'Resource temporarily unavailable')\nos.fork = none_left"
    (tmp_path / "no_more_processes.py").write_text(module)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "found Resource temporarily unavailable; run fewer jobs at a time" in done.stdout, done.stderr


@linux
def test_what_cannot_be_imported_is_said(tmp_path: Path):
    expected = pytest.raises(RunError, match="No module named 'no_such_module'; see whether topoqa env works")
    with ForkServer(["no_such_module"]) as server, expected:
        start(server, tmp_path, "pass")


@linux
def test_a_server_is_closed_at_once_while_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "slow_module.py").write_text("import time; time.sleep(3600)")
    monkeypatch.chdir(tmp_path)
    before = time.monotonic()
    ForkServer(["slow_module"]).close()
    assert time.monotonic() - before < 3600


OWNER = """
import os, time
from pathlib import Path
from topoqa_nb.sweep.processes import ForkServer
server = ForkServer([])
copies = [server.start(["-m", job], os.environ, Path(f"out{number}"), Path("err")) for number, job in enumerate(JOBS)]
print(server.process.pid, *[copy.pid for copy in copies], flush=True)
time.sleep(600)
"""
SAYS_LAST_WORDS = """
import signal, subprocess, sys, time
def stop(*_):
    time.sleep(0.5)
    print("last words")
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


@linux
@pytest.mark.parametrize("killed", ["owner", "server", "both"])
def test_whoever_is_killed_the_copies_are_told_and_nobody_is_left(killed: str, tmp_path: Path):
    (tmp_path / "speaks.py").write_text(SAYS_LAST_WORDS)
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(600)")
    code = OWNER.replace("JOBS", "['speaks', 'sleeps']")
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    server, *copies = map(int, owner.stdout.readline().split())
    until(lambda: (tmp_path / "out0").read_text().endswith("\n"))
    for number in {"owner": [owner.pid], "server": [server], "both": [server, owner.pid]}[killed]:
        os.kill(number, signal.SIGKILL)
    if killed == "server":  # copies are told by the kernel; the owner has not looked yet
        until(lambda: not any(map(is_running, copies)))
    owner.kill()
    owner.wait()
    until(lambda: not any(map(is_running, [server, *copies])))
    helper, words = (tmp_path / "out0").read_text().splitlines()
    assert words == "last words"
    if killed == "owner":  # the server was there to see to it
        until(lambda: not is_running(int(helper)))
    else:
        os.kill(int(helper), signal.SIGKILL)


@linux
def test_a_copy_that_does_not_stop_is_killed_with_what_it_started(tmp_path: Path):
    code = OWNER.replace("from pathlib", "import topoqa_nb.sweep.processes\nfrom pathlib")
    deaf = SAYS_LAST_WORDS.replace("signal.SIGTERM, stop", "signal.SIGTERM, signal.SIG_IGN")
    (tmp_path / "hasty.py").write_text("import topoqa_nb.sweep.processes as page; page.STOP_SECONDS = 0.5")
    (tmp_path / "deaf.py").write_text(deaf)
    code = code.replace("JOBS", "['deaf']").replace("ForkServer([])", "ForkServer(['hasty'])")
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    server, copy = map(int, owner.stdout.readline().split())
    until(lambda: (tmp_path / "out0").read_text().endswith("\n"))
    helper = int((tmp_path / "out0").read_text())
    owner.kill()
    owner.wait()
    until(lambda: not any(map(is_running, [server, copy, helper])))


@linux
def test_a_process_whose_parent_died_before_it_asked_stops_at_once():
    code = "import time; from topoqa_nb.ground.signals import stop_with_parent; stop_with_parent(1)"
    done = subprocess.run([sys.executable, "-c", f"{code}; time.sleep(600)"], timeout=PATIENCE)
    assert done.returncode == -signal.SIGTERM


@linux
def test_only_a_copy_is_a_copy(server: ForkServer, tmp_path: Path):
    assert isinstance(start(server, tmp_path, "pass"), Forked)
