"The RAM disk: real volumes, every way in which a run can end, macOS by stand-ins of its programs, and the record."

import ast
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import PATIENCE, forked, until

from topoqa_nb.cli import main
from topoqa_nb.data.tiny import DemoPaths, write_tiny_dataset
from topoqa_nb.ground import machine
from topoqa_nb.ground.core import (
    ConfigError,
    DataError,
    RunError,
    TrainingError,
    read_json,
    write_json,
    write_text,
)
from topoqa_nb.ground.files import find_shipped
from topoqa_nb.ground.machine import cached_fraction, filesystem_type, free_memory
from topoqa_nb.ground.signals import Interrupted
from topoqa_nb.pipeline.plan import DEMO_PHASES, settle
from topoqa_nb.ramdisk import modes, ramdisk, staging
from topoqa_nb.ramdisk import volume as volume_page
from topoqa_nb.ramdisk.modes import asked_pipeline, check_place, settled_parameters
from topoqa_nb.ramdisk.ramdisk import compare, open_comparison
from topoqa_nb.ramdisk.ramdisk_report import conclusion
from topoqa_nb.ramdisk.staging import (
    RamdiskSettings,
    copy_verified,
    file_settings,
    find_source,
    ramdisk_settings,
)
from topoqa_nb.ramdisk.volume import (
    MEMORY_FILESYSTEMS,
    OWNER,
    SHM,
    find_volumes,
    marked_processes,
    ram_volume,
    remove_leftovers,
    stop_processes,
)

NOTEBOOK = Path(__file__).resolve().parent.parent / "pipelines" / "ramdisk_comparison.ipynb"
# A comparison that starts removes what any killed one has left: two such tests are not run at once.
pytestmark = pytest.mark.xdist_group("volumes in memory")

needs_shm = pytest.mark.skipif(
    not (SHM.is_dir() and filesystem_type(SHM) in MEMORY_FILESYSTEMS and os.access(SHM, os.W_OK)),
    reason="needs a /dev/shm in memory that can be written",
)


@pytest.fixture
def name() -> str:
    "A volume name of this test process alone."
    return f"topoqa-test-{os.getpid() % 100000}"


@pytest.fixture
def settings(name: str) -> RamdiskSettings:
    return ramdisk_settings({"name": name, "headroom": "16M", "size": "64M"})


@pytest.fixture
def tiny(tmp_path: Path) -> DemoPaths:
    return write_tiny_dataset(tmp_path / "data", sidecar=True)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_text(tmp_path / "one.yaml", "jobs: [{name: one, config: sched_boost_seed222.yaml}]\n")


def volumes(name: str) -> list[str]:
    return sorted(path.name for path in SHM.glob(f"{name}*"))


# --- volumes that are really in memory


@needs_shm
def test_the_graphs_are_on_tmpfs_and_gone_afterwards(settings, tiny, name):
    source = find_source(tiny.graph_dir)
    with ram_volume(settings, source.needed) as volume:
        copy_verified(source, volume.path / "graphs")
        assert filesystem_type(volume.path / "graphs") == "tmpfs"
        assert find_source(volume.path / "graphs").sizes == source.sizes
        assert volume.path.stat().st_mode & 0o077 == 0
    assert volumes(name) == []


@needs_shm
def test_a_failure_inside_removes_the_volume(settings, name):
    with pytest.raises(ZeroDivisionError), ram_volume(settings, 1):
        assert len(volumes(name)) == 1
        _ = 1 / 0
    assert volumes(name) == []


@needs_shm
def test_a_signal_while_the_volume_is_being_removed_waits(settings, name, monkeypatch):
    remove = volume_page.remove_volume

    def slowly(volume):
        os.kill(os.getpid(), signal.SIGTERM)
        remove(volume)

    monkeypatch.setattr(volume_page, "remove_volume", slowly)
    with pytest.raises(Interrupted), ram_volume(settings, 1):
        pass
    assert volumes(name) == []


@pytest.fixture
def mounted(settings: RamdiskSettings) -> RamdiskSettings:
    "Settings for a tmpfs of its own; the test is skipped where mounting is not permitted."
    settings = settings.model_copy(update={"mount": True, "size": 64 * mmap.PAGESIZE})
    try:
        with ram_volume(settings, 1):
            return settings
    except ConfigError as problem:
        pytest.skip(f"needs permission to mount: {problem}")


def test_a_mount_has_the_ceiling_as_its_size_and_is_unmounted(mounted, tmp_path):
    with ram_volume(mounted, 1) as volume:
        assert volume.path.is_mount()
        assert filesystem_type(volume.path) == "tmpfs"
        (tmp_path / "graphs").mkdir()
        (tmp_path / "graphs" / "large.pt").write_bytes(bytes(100 * mmap.PAGESIZE))
        with pytest.raises(DataError, match="No space left on device; free some memory"):
            copy_verified(find_source(tmp_path / "graphs"), volume.path / "graphs")
    assert not volume.path.exists()


def test_a_busy_mount_disappears_all_the_same(mounted):
    with ram_volume(mounted, 1) as volume:
        busy = (volume.path / "open").open("w")
    assert not volume.path.exists()
    busy.close()


def fake(folder: Path, program: str, script: str) -> None:
    "A program on the path."
    folder.mkdir(exist_ok=True)
    write_text(folder / program, f"#!{sys.executable}\n{script}").chmod(0o755)


def test_a_mount_that_is_not_permitted_is_one_line(settings, tmp_path, monkeypatch):
    fake(tmp_path / "bin", "mount", "import sys; sys.exit('mount: must be superuser to use mount.')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = settings.model_copy(update={"mount": True})
    with (
        pytest.raises(ConfigError, match="must be superuser to use mount.; leave --mount away"),
        ram_volume(settings, 1, system="Linux"),
    ):
        pass
    assert not list(tmp_path.glob(f"{settings.name}*"))


# --- room


@needs_shm
def test_what_does_not_fit_is_refused_before_anything_is_made(tiny, manifest, tmp_path, name):
    values = {"graph_dir": str(tiny.graph_dir), "manifest": str(manifest), "run_root": str(tmp_path / "runs")}
    for given, words in (
        ({"size": "4K"}, "--size: expected room of"),
        ({"headroom": "900T"}, "free memory: expected .* and 900.0T of headroom, found"),
    ):
        with pytest.raises(ConfigError, match=words):
            compare(ramdisk_settings({"name": name} | given), values, environment={})
    assert not (tmp_path / "runs").exists()
    assert volumes(name) == []


def test_no_shared_memory_is_one_line(settings, tiny, tmp_path, monkeypatch):
    source = find_source(tiny.graph_dir)
    monkeypatch.setattr(modes, "SHM", tmp_path / "none")
    with pytest.raises(
        ConfigError, match="none: expected a folder in memory, found no such folder; use --mount"
    ):
        check_place(source, settings)
    monkeypatch.setattr(modes, "SHM", tmp_path)
    monkeypatch.setattr(volume_page, "filesystem_type", lambda path: "ext4")
    with pytest.raises(ConfigError, match="expected a file system in memory, found ext4"):
        check_place(source, settings)


def test_a_small_shared_memory_is_one_line(settings, tiny, monkeypatch):
    monkeypatch.setattr(
        staging.shutil, "disk_usage", lambda path: staging.shutil._ntuple_diskusage(1, 1, 100)
    )
    with pytest.raises(ConfigError, match="found 100 bytes free; use --mount, or start the container"):
        staging.check_room(10_000, settings, 2**40, SHM)


def test_a_container_limit_counts(tmp_path, monkeypatch):
    group = tmp_path / "memory" / "docker"
    group.mkdir(parents=True)
    for file, text in (("limit_in_bytes", "1000000"), ("usage_in_bytes", "700000")):
        write_text(group / f"memory.{file}", f"{text}\n")
    write_text(group / "memory.stat", "cache 5\ntotal_inactive_file 100000\n")
    membership = "5:cpu,cpuacct:/docker\n4:memory:/docker/step\n"
    assert machine.cgroup_free(tmp_path, membership) == 400_000
    monkeypatch.setattr(machine, "cgroup_free", lambda: 400_000)
    assert free_memory() == 400_000


# --- ways in which a run can end


def endless_comparison(told: dict[str, object], run_root: Path) -> None:
    "In a process of its own: a comparison whose pipeline never ends."
    os.environ["SAFE_RAMDISK_TEST_MODE"] = ""
    modes.mode_command = lambda job, outcome: [sys.executable, "-c", "import time; time.sleep(600)"]
    try:
        compare(ramdisk_settings(told), {"run_root": str(run_root)}, say=lambda line: None)
    except Interrupted as stop:
        sys.exit(128 + stop.signum)


@pytest.fixture
def comparison(name, tiny, manifest, tmp_path) -> Iterator[ForkProcess]:
    "A comparison in the middle of its ramdisk mode."
    paths = {"graph_dir": str(tiny.graph_dir), "manifest": str(manifest)}
    told = {"name": name, "headroom": "16M", "skip_baseline": True} | paths
    process = forked(endless_comparison, told, tmp_path / "runs")
    mark = f"{process.pid}_{psutil.Process(process.pid).create_time():.2f}"
    until(lambda: marked_processes(mark))
    yield process
    process.kill()
    process.join()
    stop_processes(mark, patience=0)
    remove_leftovers(name)


def mark_of(name: str) -> str:
    "The mark of the one volume of that name."
    (volume,) = SHM.glob(f"{name}*")
    return read_json(volume / OWNER)["mark"]


@needs_shm
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_the_volume_and_stops_the_pipeline(comparison, name, tmp_path, signum):
    mark = mark_of(name)
    os.kill(comparison.pid, signum)
    comparison.join(PATIENCE)
    assert comparison.exitcode == 128 + signum
    assert volumes(name) == []
    until(lambda: not marked_processes(mark))
    (record,) = (tmp_path / "runs" / "ramdisk_benchmarks").glob("*.json")
    assert read_json(record)["status"] == "interrupted"
    assert signum.name in read_json(record)["reason"]


@needs_shm
def test_what_kill_9_left_is_removed_at_the_next_start(comparison, name):
    mark = mark_of(name)
    assert remove_leftovers(name) == [], "a volume in use is nobody else's to remove"
    assert len(volumes(name)) == 1
    comparison.kill()
    comparison.join()
    assert len(volumes(name)) == 1
    assert marked_processes(mark), "the pipeline outlives the process that started it"
    (line,) = [line for line in remove_leftovers("another-name") if name in line]
    assert "left by a comparison that was killed" in line
    assert volumes(name) == []
    until(lambda: not marked_processes(mark))


@needs_shm
def test_killed_before_the_owner_was_written(name):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    abandoned, alive = SHM / f"{name}_{ended.pid}", SHM / f"{name}_{os.getpid()}"
    abandoned.mkdir()
    alive.mkdir()
    try:
        assert len(remove_leftovers(name)) == 1
        assert volumes(name) == [alive.name]
    finally:
        alive.rmdir()


def test_a_mount_that_was_left_is_unmounted(mounted):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with ram_volume(mounted, 1) as volume:
        write_json(volume.path / OWNER, read_json(volume.path / OWNER) | {"pid": ended.pid})
        assert len(remove_leftovers(mounted.name)) == 1
        assert not volume.path.exists()


def test_other_peoples_folders_are_left_alone(name, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / f"{name}_notes").mkdir()
    (tmp_path / f"{name}_1").symlink_to(tmp_path / "notes")
    write_text(tmp_path / "notes" / "page.txt", "text")
    assert [volume.path.name for volume in find_volumes(name, system="Linux", shm=tmp_path)] == []


# --- macOS

HDIUTIL = """
import json, os, plistlib, sys
from pathlib import Path
here = Path(__file__).parent
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(["hdiutil", *sys.argv[1:]]) + "\\n")
disks = json.loads((here / "disks.json").read_text())
if sys.argv[1] == "attach":
    assert sys.argv[2] == "-nomount" and sys.argv[3].startswith("ram://")
    disks["/dev/disk9"] = {"image-path": sys.argv[3]}
    print("/dev/disk9          \\t         \\t")
elif sys.argv[1] == "detach":
    if disks[sys.argv[-1]].get("busy") and "-force" not in sys.argv:
        sys.exit('hdiutil: couldn\\'t unmount "disk9" - Resource busy')
    disk = disks.pop(sys.argv[-1])
    if "MountPoint" in disk:
        import shutil
        shutil.rmtree(disk["MountPoint"])
elif sys.argv[1:] == ["info", "-plist"]:
    images = [{"image-path": disk["image-path"], "system-entities": [{"dev-entry": device}]} for device, disk in disks.items()]
    sys.stdout.buffer.write(plistlib.dumps({"images": images}))
else:
    sys.exit("hdiutil: unknown verb")
(here / "disks.json").write_text(json.dumps(disks))
"""
DISKUTIL = """
import json, plistlib, sys
from pathlib import Path
here = Path(__file__).parent
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(["diskutil", *sys.argv[1:]]) + "\\n")
disks = json.loads((here / "disks.json").read_text())
if sys.argv[1] == "eraseVolume":
    assert sys.argv[2] == "HFS+"
    if (here / "refuse").exists():
        sys.exit("Error: -69877: Couldn't open device")
    mount = here / "Volumes" / sys.argv[3]
    mount.mkdir(parents=True)
    disks[sys.argv[4]] |= {"VolumeName": sys.argv[3], "MountPoint": str(mount)}
    print("Started erase on disk9\\nFinished erase on disk9 " + sys.argv[3])
elif sys.argv[1:3] == ["info", "-plist"]:
    sys.stdout.buffer.write(plistlib.dumps(disks[sys.argv[3]]))
else:
    sys.exit("diskutil: unknown verb")
(here / "disks.json").write_text(json.dumps(disks))
"""


@pytest.fixture
def mac(tmp_path, monkeypatch) -> Path:
    "A folder with `hdiutil` and `diskutil` that keep their disks in a file and write down every call."
    folder = tmp_path / "mac"
    fake(folder, "hdiutil", HDIUTIL)
    fake(folder, "diskutil", DISKUTIL)
    write_json(folder / "disks.json", {})
    monkeypatch.setenv("PATH", str(folder))
    return folder


def calls(mac: Path) -> list[list[str]]:
    return [json.loads(line) for line in (mac / "calls.jsonl").read_text().splitlines()]


def test_macos_attaches_formats_and_detaches(mac, settings, tiny):
    source, label = find_source(tiny.graph_dir), f"{settings.name}_{os.getpid()}"
    with ram_volume(settings, source.needed, system="Darwin") as volume:
        copy_verified(source, volume.path / "graphs")
        assert (volume.path.name, volume.device) == (label, "/dev/disk9")
        assert (volume.path / ".metadata_never_index").exists()
    attach, erase, info, detach = calls(mac)
    sectors = int(attach.pop().removeprefix("ram://"))
    assert source.needed < 512 * sectors <= settings.size
    assert attach == ["hdiutil", "attach", "-nomount"]
    assert erase == ["diskutil", "eraseVolume", "HFS+", label, "/dev/disk9"]
    assert info == ["diskutil", "info", "-plist", "/dev/disk9"]
    assert detach == ["hdiutil", "detach", "/dev/disk9"]
    assert read_json(mac / "disks.json") == {}


def test_macos_the_size_is_a_ceiling(mac, settings):
    with ram_volume(settings, settings.size, system="Darwin"):
        assert calls(mac)[0][-1] == f"ram://{settings.size // 512}"


def test_macos_a_format_that_fails_leaves_no_disk(mac, settings):
    (mac / "refuse").touch()
    with (
        pytest.raises(ConfigError, match="found Error: -69877: Couldn't open device"),
        ram_volume(settings, 4096, system="Darwin"),
    ):
        pass
    assert calls(mac)[-1] == ["hdiutil", "detach", "/dev/disk9"]
    assert read_json(mac / "disks.json") == {}


def test_macos_a_busy_disk_is_forced(mac, settings):
    with ram_volume(settings, 4096, system="Darwin"):
        disks = read_json(mac / "disks.json")
        write_json(mac / "disks.json", {device: disk | {"busy": True} for device, disk in disks.items()})
    assert calls(mac)[-1] == ["hdiutil", "detach", "-force", "/dev/disk9"]
    assert read_json(mac / "disks.json") == {}


def test_macos_leftovers_are_detached_and_other_disks_kept(mac, settings):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    disks = {}
    for number, (label, image) in enumerate(
        [
            (f"{settings.name}_{ended.pid}", "ram://2048"),  # ours, abandoned
            (f"{settings.name}_{os.getpid()}", "ram://2048"),  # ours, in use
            ("Xcode", "ram://2048"),  # somebody's RAM disk
            (f"{settings.name}_{ended.pid}", "/Users/somebody/image.dmg"),  # not in memory
        ],
        start=4,
    ):
        mount = mac / "Volumes" / str(number) / label
        mount.mkdir(parents=True)
        disks[f"/dev/disk{number}"] = {"image-path": image, "MountPoint": str(mount), "VolumeName": label}
    disks["/dev/disk8"] = {"image-path": "ram://4096"}  # attached, not formatted
    write_json(mac / "disks.json", disks)
    assert len(remove_leftovers(settings.name, system="Darwin")) == 1
    assert sorted(read_json(mac / "disks.json")) == [f"/dev/disk{number}" for number in (5, 6, 7, 8)]


def test_macos_without_its_programs(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ConfigError, match="hdiutil: expected this program on the path, found none"),
        ram_volume(settings, 4096, system="Darwin"),
    ):
        pass


# --- the comparison, with a stand-in for the pipeline


@pytest.fixture
def stand_in(monkeypatch) -> list:
    "No pipeline runs; what each mode was asked is kept, with the files it would have found."
    asked = []

    def timed(parameters, folder):
        store = Path(parameters.overrides["paths.store"])
        write_text(store / "packed.bin", "x" * 10_000)
        graphs = find_source(parameters.graph_dir).sizes
        asked.append({"parameters": parameters, "graphs": graphs, "filesystem": filesystem_type(store)})
        seconds = {"packing_seconds": 0.5, "opening_seconds": 0.1, "pipeline_seconds": 3.0}
        return {
            "status": "completed",
            "score": -0.5,
            **seconds,
            "runs": [{"name": "one", "epoch_seconds": [0.4, 0.2]}],
        }

    monkeypatch.setattr(modes, "timed_process", timed)
    return asked


@pytest.fixture
def run(settings, tiny, manifest, tmp_path) -> Callable[..., dict]:
    "A comparison on the tiny data set."

    def run(environment=None, values=None, **changes):
        given = {"graph_dir": tiny.graph_dir, "manifest": manifest} | changes
        values = {"run_root": str(tmp_path / "runs")} | (values or {})
        return compare(
            settings.model_copy(update=given), values, environment=environment or {}, say=lambda line: None
        )

    return run


@needs_shm
def test_the_record(run, stand_in, tiny, tmp_path, name):
    record = run(repeats=2)
    file = Path(record["file"])
    assert file.parent == tmp_path / "runs" / "ramdisk_benchmarks"
    assert record["status"] == "completed" and not record["test_mode"]
    assert [(each["mode"], each["repeat"]) for each in record["measurements"]] == [
        ("baseline", 1),
        ("ramdisk", 1),
        ("baseline", 2),
        ("ramdisk", 2),
    ]
    baseline, ram = record["measurements"][:2]
    assert baseline["staging"] is None and baseline["staging_seconds"] == 0
    assert ram["staging"]["kind"] == "directory" and ram["filesystem"] == "tmpfs" == ram["store_filesystem"]
    assert baseline["filesystem"] == filesystem_type(tiny.graph_dir)
    assert baseline["store_bytes"] == ram["store_bytes"] == 10_000
    assert (ram["first_epoch_seconds"], ram["later_epoch_seconds"]) == (0.4, 0.2)
    assert ram["total_seconds"] == pytest.approx(ram["staging_seconds"] + 0.5 + 3.0, abs=1e-3)
    assert set(ram["page_cache"]) == {"source_before", "source_after", "store"}
    assert record["source"]["bytes"] == find_source(tiny.graph_dir).bytes
    assert "torch" in record["environment"]["packages"]
    assert record["conclusion"] == conclusion(record)
    assert volumes(name) == []


@needs_shm
def test_each_mode_reads_its_own_place_and_packs_its_own_store(run, stand_in, tiny):
    run(values={"overrides": ["trainer.num_epochs=7"]})
    baseline, ram = stand_in
    assert baseline["parameters"].graph_dir == tiny.graph_dir
    assert ram["parameters"].graph_dir.is_relative_to(SHM)
    assert baseline["graphs"] == ram["graphs"]
    assert (baseline["filesystem"], ram["filesystem"]) == (filesystem_type(tiny.root), "tmpfs")
    for each in stand_in:
        assert each["parameters"].train_labels == tiny.train_labels
        assert each["parameters"].overrides["trainer.num_epochs"] == 7
        assert each["parameters"].num_workers == 0
        assert not Path(each["parameters"].overrides["paths.store"]).exists(), (
            "a store is removed with its mode"
        )
    assert baseline["parameters"].run_root != ram["parameters"].run_root


@needs_shm
def test_modes_that_differ_in_more_than_the_storage_are_said_to(run, stand_in):
    record = run(ram_num_workers=2)
    assert [each["num_workers"] for each in record["measurements"]] == [0, 2]
    assert record["differences"] == ["num_workers is 0 in the baseline and 2 in the ramdisk mode"]
    assert record["conclusion"][0].startswith("The modes differ in more than the storage")


@needs_shm
def test_without_a_baseline(run, stand_in):
    record = run(skip_baseline=True)
    assert [each["mode"] for each in record["measurements"]] == ["ramdisk"]
    assert record["conclusion"] == ["There was no baseline, so there is nothing to compare with."]


def test_test_mode_reads_the_source_itself_and_says_so(run, stand_in, tiny, name):
    record = run(environment={"SAFE_RAMDISK_TEST_MODE": "1"}, size=1)  # a ceiling that nothing would fit
    assert record["test_mode"]
    assert [each["parameters"].graph_dir for each in stand_in] == [tiny.graph_dir] * 2
    assert "Test mode" in record["conclusion"][-1]
    assert record["measurements"][1]["staging"]["kind"] == "none (test mode)"
    assert volumes(name) == []


def test_test_mode_is_told_on_the_command_line(stand_in, tiny, manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAFE_RAMDISK_TEST_MODE", "1")
    monkeypatch.setattr(ramdisk, "write_report", lambda record: record.with_suffix(".html"))
    options = ["--graph-dir", str(tiny.graph_dir), "--manifest", str(manifest), "--skip-baseline"]
    assert main(["ramdisk", *options, "--", "--run-root", str(tmp_path / "runs"), "--fast-dev-run"]) == 0
    assert "Test mode: nothing was staged" in capsys.readouterr().out
    (record,) = (tmp_path / "runs" / "ramdisk_benchmarks").glob("*.json")
    assert read_json(record)["test_mode"] is True
    assert [each["parameters"].fast_dev_run for each in stand_in] == [True]


def test_graph_dir_of_the_environment_is_used_unless_told_otherwise(settings, tiny, tmp_path):
    environment = {"GRAPH_DIR": str(tiny.graph_dir)}
    other = str(tmp_path / "other")
    assert asked_pipeline(settings, {}, environment).graph_dir == tiny.graph_dir
    assert asked_pipeline(settings, {"graph_dir": other}, environment).graph_dir == Path(other)
    flag = settings.model_copy(update={"graph_dir": Path(other)})
    assert asked_pipeline(flag, {"graph_dir": "third"}, environment).graph_dir == Path(other)


@needs_shm
def test_a_pipeline_that_fails_leaves_a_record_and_no_volume(run, tmp_path, name, monkeypatch):
    program = "import sys, json; open(sys.argv[1], 'w').write(json.dumps({'status': 'failed', 'error': {'kind': 'TrainingError', 'text': 't', 'where': 'one', 'expected': 'a finite loss', 'found': 'nan', 'fix': 'lower it'}}))"
    monkeypatch.setattr(
        modes, "mode_command", lambda job, outcome: [sys.executable, "-c", program, str(outcome)]
    )
    with pytest.raises(TrainingError, match="one: expected a finite loss, found nan"):
        run(skip_baseline=True)
    (file,) = (tmp_path / "runs" / "ramdisk_benchmarks").glob("*.json")
    assert read_json(file)["status"] == "failed"
    assert "nan" in read_json(file)["reason"]
    assert volumes(name) == []


@needs_shm
def test_a_pipeline_that_dies_without_a_word_is_named(run, monkeypatch):
    monkeypatch.setattr(
        modes, "mode_command", lambda job, outcome: [sys.executable, "-c", "raise SystemExit(9)"]
    )
    with pytest.raises(TrainingError, match="console.log"):
        run(skip_baseline=True)


def test_a_mistake_in_the_pipeline_shows_before_anything_is_copied(run, stand_in, tmp_path):
    with pytest.raises(ConfigError, match="learning_rate"):
        run(values={"overrides": ["learning_rat=1"]})
    with pytest.raises(ConfigError, match="nothing is run"):
        run(values={"skip_sweep": True, "skip_fine": True})
    with pytest.raises(ConfigError, match="--baseline-num-workers and --ram-num-workers"):
        run(values={"overrides": ["dataloader.num_workers=2"]})
    with pytest.raises(ConfigError, match="each mode has a folder of its own"):
        run(values={"reports_dir": "here"})
    assert stand_in == [] and not (tmp_path / "runs").exists()


def test_skip_sweep_starts_both_modes_from_one_checkpoint(settings, tiny, manifest, tmp_path, monkeypatch):
    checkpoint = write_text(tmp_path / "runs" / "best" / "model_checkpoints" / "best.chkpt", "weights")
    start = {"run_name": "best", "checkpoint": "best/model_checkpoints/best.chkpt"}
    monkeypatch.setattr(modes, "earlier_runs", lambda pipeline: [start])
    monkeypatch.setattr(modes, "best_run", lambda runs: runs[0])
    values = {"graph_dir": str(tiny.graph_dir), "run_root": str(tmp_path / "runs"), "skip_sweep": True}
    parameters = settled_parameters(settle(asked_pipeline(settings, values, {})))
    assert parameters.resume_from == checkpoint


def test_the_demo_data_keep_their_manifest_and_short_phases(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters = settled_parameters(settle(asked_pipeline(settings, {}, {})))
    assert parameters.graph_dir.is_relative_to(tmp_path)
    assert parameters.manifest.name == "run_demo.yaml"
    assert parameters.phase_overrides == DEMO_PHASES
    assert "paths.summary" in parameters.overrides, "the builder's summary lies outside of what is copied"


# --- copy, settings, page cache


def test_a_copy_that_is_damaged_is_noticed(tiny, tmp_path, monkeypatch):
    source = find_source(tiny.graph_dir)
    monkeypatch.setattr(staging, "sha256_file", lambda path: "another")
    with pytest.raises(DataError, match="bytes of .*; start again when nothing writes to the graphs"):
        copy_verified(source, tmp_path / "copy")


def test_a_graph_that_disappears_while_copying_is_one_line(tiny, tmp_path):
    source = find_source(tiny.graph_dir)
    next(iter(source.files.values())).unlink()
    with pytest.raises(DataError, match="No such file or directory; check the file"):
        copy_verified(source, tmp_path / "copy")


def test_only_what_a_training_reads_is_copied(tiny, tmp_path):
    write_text(tiny.graph_dir / "archive.tar", "x" * 10_000)
    source = find_source(tiny.graph_dir)
    assert "archive.tar" not in source.files
    assert "graph_metadata.json" in source.files


def test_the_shipped_settings_and_a_key_with_a_typing_error(tmp_path):
    shipped = file_settings(find_shipped("ramdisk.yaml"))
    assert shipped["size"] == "12G" and shipped["headroom"] == "4G" and shipped["name"] == "TopoQARAM"
    assert shipped["baseline_num_workers"] == shipped["ram_num_workers"] == 0
    wrong = write_text(tmp_path / "ramdisk.yaml", "ramdisk: {sise: 12G}\n")
    with pytest.raises(ConfigError, match="did you mean ramdisk.size?"):
        file_settings(wrong)
    wrong.write_text("ramdisk: 12G\n")
    with pytest.raises(ConfigError, match="ramdisk.yaml: ramdisk: expected a section with keys, found '12G'"):
        file_settings(wrong)


def test_the_page_cache_is_measured(tmp_path):
    file = tmp_path / "graph.pt"
    with file.open("wb") as writing:
        writing.write(os.urandom(64 * mmap.PAGESIZE))
        writing.flush()
        os.fsync(writing.fileno())
    if cached_fraction([file]) is None or filesystem_type(tmp_path) in MEMORY_FILESYSTEMS:
        pytest.skip("needs Linux and a temporary folder on a disk")
    file.read_bytes()
    assert cached_fraction([file]) == 1.0
    with file.open("rb") as reading:
        os.posix_fadvise(reading.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_fraction([file]) < 1.0


# --- the notebook


def parameter_cell() -> str:
    notebook = nbformat.read(NOTEBOOK, 4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell.source


def test_the_notebook_has_typed_parameters_and_hands_its_namespace_on():
    source = parameter_cell()
    names = [line.target.id for line in ast.parse(source).body]
    assert names == [*RamdiskSettings.model_fields, "pipeline", "record"]
    assert all("  # " in line for line in source.splitlines())
    code = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code")
    assert "open_comparison(globals())" in code
    others = code.replace(source, "").split("open_comparison(globals())")[0]
    bound = [node for node in ast.walk(ast.parse(f"{others}0")) if isinstance(node, ast.alias | ast.Name)]
    assert not {getattr(node, "id", None) or node.asname or node.name for node in bound} & set(names)


def test_the_notebook_holds_no_logic():
    logic = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.If, ast.For, ast.While, ast.Try)
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if cell.cell_type == "code":
            assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, logic)]
            assert not cell.outputs


def test_an_unknown_parameter_is_refused_with_the_nearest_name(monkeypatch):
    monkeypatch.setattr(ramdisk, "injected_names", lambda history: ["grahp_dir"])
    monkeypatch.setattr(
        ramdisk,
        "get_ipython",
        lambda: type("Shell", (), {"history_manager": type("History", (), {"input_hist_raw": []})}),
    )
    with pytest.raises(ConfigError, match="did you mean graph_dir?"):
        open_comparison({"record": None})


def test_a_record_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(RunError, match="no such file"):
        open_comparison({"record": str(tmp_path / "none.json")})
