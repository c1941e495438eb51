"The job scripts of scripts/slurm/: what they start, and a training that is stopped and goes on, without Slurm."

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, in_turn, until

from topoqa_nb.cli import main
from topoqa_nb.ground.config import format_overrides, load_config
from topoqa_nb.runs.record import RunDirectory, read_record
from topoqa_nb.runs.runs import read_metrics
from topoqa_nb.training.training import train

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((REPOSITORY / "scripts" / "slurm").glob("*.sh"))
SAYS = 'echo "$(basename "$0") $*" >>said.txt; {then}'
HOSTS = 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; exit; fi; '


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    "A working folder with stand-ins for the commands of Slurm and Ray, which say what they were asked for."
    commands = {
        "srun": SAYS.format(then='while [[ $1 == --* ]]; do shift; done; echo $$ >srun.pid; exec "$@"'),
        "scontrol": HOSTS + SAYS.format(then="true"),
        "ray": SAYS.format(then='[[ $1 != status ]] || sed -n "s/^ray start.*/ 1 node_x/p" said.txt'),
        "topoqa": SAYS.format(
            then='echo "meets at ${MASTER_ADDR:-}:${MASTER_PORT:-}" >>said.txt; exit "${CODE:-0}"'
        ),
    }
    (tmp_path / "bin").mkdir()
    for name, line in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(folder: Path, script: str, *arguments: str, **variables: object) -> subprocess.Popen:
    "A job script as Slurm starts it: a copy, in the folder from which it was sent."
    copy = shutil.copy(REPOSITORY / "scripts" / "slurm" / script, folder / "slurm_script")
    slurm = {"SLURM_JOB_ID": "40007", "SLURM_NNODES": "1"} | {
        name: str(value) for name, value in variables.items()
    }
    return subprocess.Popen(
        ["bash", copy, *arguments],
        cwd=folder, env=os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | slurm,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def said(folder: Path, script: str, *arguments: str, **variables: object) -> tuple[int, list[str]]:
    "Exit code, and the commands that were given."
    (folder / "said.txt").write_text("")
    process = start(folder, script, *arguments, **variables)
    process.communicate(timeout=PATIENCE)
    return process.returncode, (folder / "said.txt").read_text().splitlines()


def leave_run(folder: Path, name: str, checkpoint: bool = True) -> None:
    (folder / "training_runs" / name / "model_checkpoints").mkdir(parents=True)
    (folder / "training_runs" / name / "run_metadata.json").touch()
    if checkpoint:
        (folder / "training_runs" / name / "model_checkpoints" / "last.chkpt").touch()


def test_a_job_begins_a_run_or_goes_on_with_it(folder: Path):
    run = "topoqa run --run-root training_runs --run-name a --config config.yaml"
    assert said(folder, "run.sh", "a", "--config", "config.yaml") == (
        0, [f"srun {run}", run, "meets at :"]
    )  # fmt: skip
    leave_run(folder, "a")
    code, commands = said(folder, "run.sh", "a", "--config", "config.yaml")
    assert commands[1] == "topoqa resume --run-dir training_runs/a --checkpoint last --force"


@in_turn(
    "code, checkpoint, comes_back",
    [(138, True, True), (138, False, False), (143, True, False), (1, True, False)],
)
def test_a_job_comes_back_when_its_time_was_up(code: int, checkpoint: bool, comes_back: bool, folder: Path):
    "Slurm itself brings a preempted job back; a run that got to no epoch would get to none again."
    shutil.rmtree(folder / "training_runs", ignore_errors=True)
    leave_run(folder, "a", checkpoint)
    ended, commands = said(folder, "run.sh", "a", CODE=code)
    assert (ended, "scontrol requeue 40007" in commands) == (code, comes_back)


def test_an_array_takes_a_line_each_and_ranks_are_told_where_to_meet(folder: Path):
    (folder / "list.txt").write_text("a --config a.yaml\nb --config b.yaml --override seed=7\n")
    _, commands = said(folder, "run.sh", "list.txt", SLURM_ARRAY_TASK_ID=2, RUN_ROOT="/shared/runs")
    assert commands[1] == "topoqa run --run-root /shared/runs --run-name b --config b.yaml --override seed=7"
    _, commands = said(folder, "run.sh", "a", SLURM_NNODES=2, SLURM_JOB_NODELIST="node[1-2]")
    assert commands[-1] == "meets at node1:20007"


def test_a_cluster_lives_as_long_as_its_job(folder: Path):
    nodes = {"SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": 3}
    code, commands = said(folder, "ray.sh", "batch", "--manifest", "run_core.yaml", CODE=138, **nodes)
    assert {
        "srun --nodes=1 --ntasks=1 --nodelist=node1 ray start --head --port=20007 --num-cpus=3 --block",
        "srun --nodes=1 --ntasks=1 --exclude=node1 ray start --address=node1:20007 --num-cpus=3 --block",
        "topoqa batch --manifest run_core.yaml --executor ray",
    } <= {*commands}  # fmt: skip
    assert (code, commands[-1]) == (138, "scontrol requeue 40007")


def test_a_cluster_of_which_a_node_does_not_start_is_not_waited_for(folder: Path):
    (folder / "bin" / "ray").write_text("#!/usr/bin/env bash\n[[ $* != *--address* ]]\n")
    process = start(folder, "ray.sh", "batch", SLURM_NNODES=2, SLURM_JOB_NODELIST="node[1-2]")
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert text == (
        "topoqa: error: the Ray cluster of job 40007: expected 2 nodes, found one that did not start; "
        "see above, and submit again\n"
    )
    assert "topoqa" not in (folder / "said.txt").read_text()


def test_a_signal_to_the_shell_reaches_the_driver(folder: Path):
    (folder / "bin" / "topoqa").write_text(
        "#!/usr/bin/env bash\ntrap 'exit 138' USR1\ntouch ready\nwhile true; do sleep 0.01; done\n"
    )
    process = start(folder, "ray.sh", "batch", SLURM_JOB_NODELIST="node1")
    until((folder / "ready").exists)
    process.send_signal(signal.SIGUSR1)  # as --signal=B:USR1
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 138
    assert "scontrol requeue 40007" in (folder / "said.txt").read_text()


STANDS_STILL = """
import sys, time
from pathlib import Path
from topoqa_nb.cli import main
from topoqa_nb.training.module import TopoQAModule
step = TopoQAModule.training_step
def wait_or_step(module, *batch):
    if module.current_epoch == 3 and not Path("waits").exists():
        Path("waits").touch()
        time.sleep(600)
    return step(module, *batch)
TopoQAModule.training_step = wait_or_step
sys.exit(main(sys.argv[1:]))
"""


def test_a_training_that_is_sent_back_to_the_queue_ends_as_if_it_had_not_been(tiny, folder: Path):
    settings = tiny | {"trainer.num_epochs": 8, "early_stopping.patience": 60}
    options = [part for pair in format_overrides(settings) for part in ("--override", pair)]
    (folder / "stands_still.py").write_text(STANDS_STILL)
    topoqa = f'"{sys.executable}" {{}} "$@"\n'
    (folder / "bin" / "topoqa").write_text(
        f"#!/usr/bin/env bash\nexec {topoqa.format(folder / 'stands_still.py')}"
    )
    run = RunDirectory(folder / "training_runs" / "a")
    job = start(folder, "run.sh", "a", "--config", "config.yaml", *options)
    until(lambda: (folder / "waits").exists() or job.poll() is not None)
    assert job.poll() is None, job.communicate()[0]
    os.kill(int((folder / "srun.pid").read_text()), signal.SIGUSR1)  # as --signal=USR1@120
    job.communicate(timeout=PATIENCE)
    assert (job.returncode, read_record(run).reason) == (138, "stopped by SIGUSR1")
    assert "scontrol requeue 40007" in (folder / "said.txt").read_text()
    code, _ = said(folder, "run.sh", "a", "--config", "config.yaml", *options, SLURM_RESTART_COUNT=1)
    assert (code, read_record(run).status) == (0, "completed")
    whole = train(load_config("config.yaml", settings | {"paths.save_dir": folder / "other"}), run_name="a")
    assert run.metrics_file.read_bytes() == whole.metrics_file.read_bytes()
    assert len(read_metrics(run)) == 8
    assert read_record(run).checkpoints == read_record(whole).checkpoints


@in_turn("script", SCRIPTS)
def test_commands_and_options_of_the_job_scripts_exist(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, script], check=True)
    monkeypatch.setenv("COLUMNS", "200")
    for command, options in re.findall(r"topoqa ([a-z]+)([^\n)#]*)", script.read_text()):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(option in text for option in re.findall(r"--[a-z-]+", options)), (command, options)
