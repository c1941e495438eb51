"""Which device, how many cores and threads: machines that a test makes up, and this one."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import in_turn
from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import CPUAccelerator

from topoqa_nb.ground.config import load_config
from topoqa_nb.ground.core import ConfigError, to_json
from topoqa_nb.ground.machine import PARALLEL_VARIABLE, available_cores, thread_count
from topoqa_nb.ground.settings import Config, TrainerConfig
from topoqa_nb.network.kernels import choose_kernel
from topoqa_nb.training.devices import (
    FALLBACK,
    check_device,
    configured_use,
    device_notes,
    device_of,
    environment_report,
    keep_freed_memory,
    lightning_precision,
    report_text,
    torch_threads,
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    "Pretend that this machine has these devices."

    def make(
        *, cuda: int = 0, mps: bool = False, cuda_build: str | None = "12.8", processor: str = "arm"
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number=0: f"card {number}")
        monkeypatch.setattr(torch.version, "cuda", cuda_build)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_built", lambda: mps)
        monkeypatch.setattr(platform, "processor", lambda: processor)
        monkeypatch.delenv("DISABLE_MPS", raising=False)
        monkeypatch.delenv(FALLBACK, raising=False)

    return make


def refused(**settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        check_device(TrainerConfig(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- cores and threads ---


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "3200000 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "what\n"}, 8),
        ({"proc/self/cgroup": "0::/../..\n"}, 8),
        # the path that a container sees may exist on its host only; the top of what it sees is its own group
        ({"proc/self/cgroup": "0::/docker/1f2e\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "0::/slice/job\n",
                "sys/fs/cgroup/slice/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/slice/job/cpu.max": "400000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpuset:/a\n2:cpu,cpuacct:/a:b\n0::/\n",
                "sys/fs/cgroup/cpu/a:b/cpu.cfs_quota_us": "500000\n",
                "sys/fs/cgroup/cpu/a:b/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_a_quota_cuts_the_affinity_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict, cores: int
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cores(system(tmp_path, files)) == cores


def test_without_an_affinity_mask_the_machine_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert available_cores(tmp_path) == 12


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity masks")
def test_a_process_bound_to_one_core_uses_one():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from topoqa_nb.ground.machine import available_cores, thread_count;"
        "print(available_cores(), thread_count('auto'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_auto_threads_are_shared_among_jobs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("topoqa_nb.ground.machine.available_cores", lambda: 8)
    assert [thread_count("auto", jobs) for jobs in (1, 3, 8, 9)] == [8, 2, 1, 1]
    assert thread_count(6, 4) == 6


def test_a_sweep_says_how_many_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("topoqa_nb.ground.machine.available_cores", lambda: 8)
    assert thread_count("auto") == 8
    monkeypatch.setenv(PARALLEL_VARIABLE, "3")
    assert [thread_count("auto"), thread_count("auto", 1), thread_count(5)] == [2, 8, 5]


@in_turn("said", ["", "0", "-1", "two", "1.5", "²"])
def test_a_wrong_number_of_jobs_is_one_line(said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PARALLEL_VARIABLE, said)
    with pytest.raises(ConfigError, match=f"{PARALLEL_VARIABLE}: expected a number from 1"):
        thread_count("auto")
    assert thread_count(2) == 2


def test_threads_are_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


# --- devices ---


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ({}, {"cpu": "cpu", "auto": "cpu"}),
        ({"cuda": 1}, {"cpu": "cpu", "auto": "cuda", "gpu": "cuda", "cuda": "cuda"}),
        ({"mps": True}, {"cpu": "cpu", "auto": "mps", "gpu": "mps", "mps": "mps"}),
        ({"mps": True, "processor": "i386"}, {"cpu": "cpu", "auto": "cpu"}),
    ],
)
def test_the_device_of_an_accelerator(machine, devices: dict, expected: dict):
    machine(**devices)
    for accelerator in ("cpu", "auto", "gpu", "cuda", "mps"):
        trainer = TrainerConfig(accelerator=accelerator)
        if accelerator in expected:
            check_device(trainer)
            assert device_of(trainer) == expected[accelerator]
        else:
            assert refused(accelerator=accelerator).startswith("trainer.accelerator: expected ")


def test_the_message_says_what_is_missing_and_how_to_check(machine):
    machine(cuda_build=None)
    text = refused(accelerator="cuda")
    for part in (
        "a torch build without CUDA",
        "nvidia-smi",
        "torch.cuda.is_available()",
        "set trainer.accelerator=cpu",
    ):
        assert part in text
    assert "nvidia-smi" not in refused(accelerator="mps")
    assert "a torch build without MPS" in refused(accelerator="mps")
    machine()
    assert "no NVIDIA device or driver" in refused(accelerator="gpu")


@pytest.mark.parametrize("name", ["sched_boost_seed222_cuda.yaml", "sched_boost_seed222_mps.yaml"])
def test_the_shipped_gpu_configurations(machine, name: str):
    config = load_config(name).config
    machine()
    assert refused(**config.trainer.model_dump()).startswith("trainer.accelerator")
    machine(cuda=1) if "cuda" in name else machine(mps=True)
    check_device(config.trainer)
    assert configured_use(config)["device"] == name.removesuffix(".yaml").rsplit("_", 1)[1]
    overridden = load_config(name, ["trainer.accelerator=cpu", "trainer.precision=32"]).config
    machine()
    check_device(overridden.trainer)


def test_half_precision_with_auto_needs_a_gpu(machine):
    machine()
    assert refused(accelerator="auto", precision="16-mixed").startswith("trainer.precision: expected 32")
    check_device(TrainerConfig(accelerator="auto", precision="bf16-mixed"))
    machine(cuda=1)
    check_device(TrainerConfig(accelerator="auto", precision="16-mixed"))


def test_an_apple_gpu_has_no_64_bit_numbers(machine):
    machine(mps=True)
    assert refused(accelerator="mps", precision=64).startswith("trainer.precision")
    assert refused(accelerator="auto", precision=64).startswith("trainer.precision")


def test_a_training_is_one_process(machine):
    machine(cuda=2)
    for accelerator, devices in (("gpu", 3), ("gpu", 2), ("cpu", 4)):
        message = refused(accelerator=accelerator, devices=devices)
        assert message.startswith("trainer.devices: expected 1 or auto"), message
    check_device(TrainerConfig(accelerator="gpu", devices="auto"))


def test_the_fallback_is_mentioned_on_apple_only(machine, monkeypatch: pytest.MonkeyPatch):
    machine(mps=True)
    (note,) = device_notes(TrainerConfig(accelerator="mps"))
    assert f"export {FALLBACK}=1" in note
    monkeypatch.setenv(FALLBACK, "1")
    assert device_notes(TrainerConfig(accelerator="mps")) == []
    machine(cuda=1)
    assert device_notes(TrainerConfig(accelerator="gpu")) == ["accelerator gpu: cuda"]


@pytest.mark.parametrize("precision", [32, 64, "bf16-mixed"])
def test_lightning_knows_the_precision(precision: int | str):
    name = lightning_precision(TrainerConfig(precision=precision).precision)
    trainer = Trainer(
        accelerator="cpu", precision=name, logger=False, enable_checkpointing=False, barebones=True
    )
    assert trainer.precision == name


def test_lightning_chooses_the_same_device_here():
    trainer = Trainer(accelerator="auto", logger=False, enable_checkpointing=False, barebones=True)
    chosen = device_of(TrainerConfig(accelerator="auto"))
    assert (chosen == "cpu") is isinstance(trainer.accelerator, CPUAccelerator)
    assert trainer.strategy.root_device.type == chosen


# --- the report ---


def test_the_report_is_plain_json_and_text(machine):
    machine(cuda=2)
    report = environment_report(Config(trainer=TrainerConfig(accelerator="gpu", precision="16-mixed")))
    assert json.loads(to_json(report)) == report
    assert report["cuda"]["devices"] == ["card 0", "card 1"]
    assert report["config"]["device_name"] == "card 0"
    assert report["packages"]["torch"] == torch.__version__
    assert "cuda (card 0), precision 16-mixed" in report_text(report)


def test_a_configuration_that_cannot_run_is_part_of_the_report(machine):
    machine()
    report = environment_report(Config(trainer=TrainerConfig(accelerator="mps")))
    assert report["config"]["runs_here"] is False
    assert "cannot run here: trainer.accelerator: expected an Apple GPU" in report_text(report)


def test_without_a_configuration(machine):
    machine()
    report = environment_report()
    assert report["config"] is None
    assert report_text(report).splitlines()[-1].split() == ["kernel", choose_kernel(), "on", "the", "CPU"]


def test_a_forced_kernel_is_reported_and_must_fit(machine, monkeypatch):
    machine(cuda=1)
    monkeypatch.setenv("TOPOQA_KERNEL", "torch")
    assert environment_report(Config())["config"]["kernel"] == "torch"
    card = environment_report(Config(trainer=TrainerConfig(accelerator="cuda")))["config"]
    assert card["problem"].startswith("TOPOQA_KERNEL: expected reference off the CPU")
    monkeypatch.setenv("TOPOQA_KERNEL", "nunba")
    with pytest.raises(ConfigError, match="did you mean numba"):
        check_device(TrainerConfig())


# --- memory

# It begins with thresholds that do not adapt themselves; whether those of glibc do depends on what was freed before.
PAGE_FAULTS = """
import ctypes, resource, sys
import torch
from topoqa_nb.training.devices import keep_freed_memory
for option in (-1, -3):
    assert ctypes.CDLL(None).mallopt(option, 128 * 1024) == 1
told = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    for _ in range(10):
        states = [torch.ones(14_000, 32 * width) for width in (1, 8, 2, 8, 1)]
        del states
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(told, -faults() + faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of GNU/Linux")
def test_freed_memory_is_used_again():
    found = {}
    for word in ("leave", "keep"):
        command = [sys.executable, "-c", PAGE_FAULTS, word]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found[word] = int(words[1])
        assert words[0] == ("True" if word == "keep" else "None")
    assert found["keep"] < 100 < found["leave"]


def test_the_users_own_allocator_settings_win(monkeypatch: pytest.MonkeyPatch):
    told = []
    library = SimpleNamespace(mallopt=lambda *values: told.append(values) or 1)
    monkeypatch.setattr("topoqa_nb.training.devices.ctypes.CDLL", lambda name: library)
    monkeypatch.setattr("topoqa_nb.training.devices.sys.platform", "linux")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert keep_freed_memory()
    assert told == [(-3, 32 * 2**20)]


def test_so_do_the_tunables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000")
    assert not keep_freed_memory()


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_other_allocators_are_left_alone(system: str, monkeypatch: pytest.MonkeyPatch):
    "As musl, whose library has no such function."
    monkeypatch.setattr("topoqa_nb.training.devices.ctypes.CDLL", lambda name: SimpleNamespace())
    monkeypatch.setattr("topoqa_nb.training.devices.sys.platform", system)
    assert not keep_freed_memory()
