"""From structures to graphs: odd files, kills, signals, parallel builds, and real labels."""

import gzip
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import REPOSITORY, in_turn, is_running, until
from kills import killed_at

from topoqa_nb.build.build import build
from topoqa_nb.build.dockq import dockq, read_native
from topoqa_nb.build.example import HELIX, assemble, helix_pair, make_chain, write_example
from topoqa_nb.build.recipe import Recipe, build_graph
from topoqa_nb.build.structures import pdb_text
from topoqa_nb.cli import main
from topoqa_nb.ground.html_page import requests_of


def decoys(folder: Path, count: int = 3) -> Path:
    "Helices at several distances, and one structure that gives no graph."
    for number in range(count):
        write_example(folder / "1HEL" / f"1HEL_{number}.pdb", helix_pair(8.5 + 0.25 * number))
    write_example(folder / "1HEL" / "far.pdb", helix_pair(60))
    return folder


def contents(out: Path) -> dict[str, bytes]:
    "Graphs, sidecar and labels: what must not depend on how a build went."
    files = [*(out / "graph_data").rglob("*"), *out.glob("labels.csv")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.is_file()}


def test_labels_of_the_sample_structures(shared_dir: Path) -> None:
    samples = shared_dir / "structures"
    if not samples.is_dir():
        pytest.skip("needs the sample structures")
    for row in pd.read_csv(samples / "labels.csv").itertuples():
        model = samples / "decoys" / row.target / f"{row.MODEL}.pdb.gz"
        found = dockq(model, read_native(samples / row.native, 0))
        assert found.mapping == {"A": "A", "B": "B"}
        for part in ("dockq", "fnat", "irmsd", "lrmsd"):
            assert getattr(found.total, part) == pytest.approx(getattr(row, part), abs=1e-4), row.MODEL


def test_graphs_of_the_sample_structures(shared_dir: Path) -> None:
    import torch

    samples = shared_dir / "structures"
    if not samples.is_dir():
        pytest.skip("needs the sample structures")
    for path in sorted((samples / "parity").glob("*.pt"))[::3]:
        graph = build_graph(samples / "decoys" / path.stem[:4] / f"{path.stem}.pdb.gz", Recipe())
        reference = torch.load(path, weights_only=False)
        assert np.array_equal(graph.edge_index, reference.edge_index.numpy())
        for part in ("x", "edge_attr"):
            assert np.allclose(getattr(graph, part), getattr(reference, part).numpy(), rtol=0, atol=1e-6), (
                path
            )


def test_the_notebook_builds_and_reports(tmp_path: Path) -> None:
    decoys(tmp_path / "decoys")
    write_example(tmp_path / "natives" / "1HEL.pdb")
    values = {"structures": ["decoys"], "native": "natives", "jobs": 1}
    executed = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        REPOSITORY / "pipelines" / "build.ipynb", executed, values, cwd=tmp_path, progress_bar=False
    )
    page, text = (tmp_path / "build" / "build_report.html").read_text(), executed.read_text()
    assert requests_of(page) == []
    for part in ("Sizes", "Failures", "topology: loops", "acceptable", "1HEL/far"):
        assert part in page and part in text
    assert text.count('"image/png"') == page.count("data:image/png") == 2


PAIR = pdb_text(helix_pair())
ATOMS = [line for line in PAIR.splitlines() if line.startswith("ATOM")]


def chain_only(letter: str) -> str:
    return "\n".join(line for line in ATOMS if line[21] == letter) + "\nEND\n"


def renamed(second: str) -> str:
    "Both partners under one chain name, with a TER record between them."
    return "".join(
        line[:21] + second + line[22:] + "\n" if line[:4] == "ATOM" else line + "\n"
        for line in PAIR.splitlines()
    )


UNUSABLE = {  # file -> text, a part of the reason
    "one chain.pdb": (chain_only("A"), "found one ('A')"),
    "no interface.pdb": (pdb_text(helix_pair(60)), "within 10 Å, found none"),
    "empty.pdb": ("", "expected atoms, found none"),
    "garbage.pdb": ("\x00\x01garbage\n" * 9, "expected atoms, found none"),
    "CA only.pdb": ("\n".join(line for line in ATOMS if line[12:16] == " CA "), "N, CA, C and O"),
    "nan.pdb": (PAIR.replace(ATOMS[9][30:38], "     nan", 1), "coordinates in columns 31 to 54"),
    "truncated.pdb": (PAIR[: PAIR.index(ATOMS[-1]) + 40], "coordinates in columns 31 to 54"),
    "same names.pdb": (renamed("A"), "--split-on-ter"),
    "blank names.pdb": (renamed(" "), "--split-on-ter"),
    "no atoms.cif": ("data_x\n", "found"),
}


def usable_files(folder: Path) -> dict[str, int]:
    "Odd structures that work: file -> nodes."
    import gemmi

    parsed = gemmi.read_pdb_string(PAIR)
    parsed.setup_entities()
    parsed[0]["A"].name = "Heavy"
    third = [
        line[:21] + "C" + line[22:38] + f"{float(line[38:46]) - 9:8.3f}" + line[46:] for line in ATOMS[:89]
    ]
    texts = {
        "crlf.pdb": PAIR.replace("\n", "\r\n"),
        "no element.pdb": "\n".join(line[:66] for line in PAIR.splitlines()),
        "models.pdb": f"MODEL        1\n{PAIR.replace('END', '')}ENDMDL\nMODEL        2\n{chain_only('A')}ENDMDL\nEND\n",
        "long names.cif": parsed.make_mmcif_document().as_string(),
        "hydrogens.pdb": PAIR.replace(
            ATOMS[0], ATOMS[0] + "\n" + ATOMS[0].replace(" N   ", " H   ", 1)[:77] + "H", 1
        ),
        "altlocs.pdb": PAIR.replace(
            ATOMS[4], "\n".join(ATOMS[4][:16] + letter + ATOMS[4][17:] for letter in "AB"), 1
        ),
        "insertion.pdb": PAIR.replace("A   2 ", "A   1A"),
        "clash.pdb": pdb_text(helix_pair(0.5)),
        "three chains.pdb": PAIR.replace("END", "\n".join(third) + "\nEND"),
        "ünïcode ☂.pdb": PAIR,
        "MSE.pdb": PAIR.replace("ALA A", "MSE A"),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    (folder / "zipped.pdb.gz").write_bytes(gzip.compress(PAIR.encode()))
    nodes = dict.fromkeys([*texts, "zipped.pdb.gz"], 36)
    return nodes | {"three chains.pdb": 54, "MSE.pdb": 36 - sum("CA  ALA A" in line for line in ATOMS)}


def test_odd_structures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import torch

    folder = tmp_path / "with spaces"
    folder.mkdir()
    expected = usable_files(folder)
    for name, (text, _) in UNUSABLE.items():
        (folder / name).write_text(text)
    assert main(["build", str(folder), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    for name, (_, reason) in UNUSABLE.items():
        lines = [line for line in said.splitlines() if Path(name).stem in line]
        assert lines and reason in lines[0], (name, said)
        assert not (tmp_path / "out/graph_data" / Path(name).with_suffix(".pt")).exists()
    for name, nodes in expected.items():
        stem = name.removesuffix(".gz").rpartition(".")[0]
        graph = torch.load(tmp_path / "out/graph_data" / f"{stem}.pt", weights_only=False)
        assert len(graph.x) == nodes, name
    both = [str(folder / "same names.pdb"), str(folder / "blank names.pdb")]
    assert main(["build", *both, "--out", str(tmp_path / "split"), "--jobs", "1", "--split-on-ter"]) == 0


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder = decoys(tmp_path / "decoys", count=2)
    native = write_example(tmp_path / "1HEL.pdb")

    def attempt(out: Path) -> None:
        build([folder], out, native=native, jobs=1)

    attempt(tmp_path / "whole")
    changes = killed_at(None, tmp_path / "counted", lambda: attempt(tmp_path / "counted"))
    assert contents(tmp_path / "counted") == contents(tmp_path / "whole")
    assert changes > 20
    for number in range(0, changes, 4):
        out = tmp_path / f"out{number}"
        killed_at(number, out, lambda out=out: attempt(out))
        attempt(out)
        assert contents(out) == contents(tmp_path / "whole"), number
        before = (out / "build_journal.jsonl").read_bytes()
        attempt(out)  # and there is nothing left to do
        assert (out / "build_journal.jsonl").read_bytes() == before
        shutil.rmtree(out)


STANDS_STILL = """
import sys, time
from topoqa_nb.build.journal import Journal
from topoqa_nb.cli import main
add = Journal.add
def add_and_wait(journal, line):
    add(journal, line)
    if len(journal.graphs) == 8:
        time.sleep(600)
Journal.add = add_and_wait
sys.exit(main(sys.argv[1:]))
"""


def started(folder: Path, out: Path, *python: str) -> subprocess.Popen:
    "A build with two workers."
    command = [sys.executable, *python, "build", str(folder), "--out", str(out), "--jobs", "2"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def session_of(leader: int) -> list[int]:
    "Processes that one started, as far as they still run."
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = []
    for number in numbers:
        try:
            if os.getsid(number) == leader and is_running(number):
                found.append(number)
        except ProcessLookupError:
            continue
    return found


@in_turn("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_build_leaves_no_process_and_goes_on(signum: int, tmp_path: Path) -> None:
    folder = tmp_path / "decoys"
    if not folder.is_dir():
        decoys(folder, count=14)
        build([folder], tmp_path / "whole", jobs=1)
    out = tmp_path / signum.name
    process, journal = started(folder, out, "-c", STANDS_STILL), out / "build_journal.jsonl"
    until(lambda: process.poll() is not None or (journal.exists() and journal.read_bytes().count(b"\n") > 8))
    assert process.poll() is None, process.communicate()
    os.kill(process.pid, signum) if signum == signal.SIGKILL else os.killpg(process.pid, signum)
    said, _ = process.communicate()
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum, said
        assert "Traceback" not in said and f"topoqa: stopped by {signum.name}" in said
    until(lambda: not session_of(process.pid))
    process = started(folder, out, "-m", "topoqa_nb.cli")
    said, _ = process.communicate()
    assert process.returncode == 1, said  # one of the decoys has no interface
    assert contents(out) == contents(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_build_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, out = decoys(tmp_path / "decoys"), tmp_path / "out"
    with monkeypatch.context() as full:

        def refuse(self: Path, content: bytes) -> int:
            raise OSError(28, "No space left on device", str(self))

        full.setattr(Path, "write_bytes", refuse)
        assert main(["build", str(folder), "--out", str(out), "--jobs", "1"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("topoqa: error: ") and "No space left on device" in said
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.pt"))
    assert main(["build", str(folder), "--out", str(out), "--jobs", "1"]) == 1
    assert len(list(out.rglob("*.pt"))) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, place = decoys(tmp_path / "decoys"), tmp_path / "closed"
    place.mkdir(mode=0o555)
    assert main(["build", str(folder), "--out", str(place / "out"), "--jobs", "1"]) == 2
    assert "Permission denied" in capsys.readouterr().err


WITHOUT = """
import sys
for name in ("gemmi", "numba", "optuna", "parasail"):
    sys.modules[name] = None
from topoqa_nb.cli import main
sys.exit(main(sys.argv[1:]))
"""


@in_turn(
    "line, code, words",
    [
        ("build decoys --out out", 2, "pip install 'topoqa_nb[build]'"),
        ("label decoys --native decoys/1HEL/1HEL_0.pdb", 2, "pip install 'topoqa_nb[build]'"),
        ("dockq decoys/1HEL/1HEL_0.pdb decoys/1HEL/1HEL_1.pdb", 2, "pip install 'topoqa_nb[build]'"),
        ("families decoys", 2, "pip install 'topoqa_nb[build]'"),
        ("search --space space.yaml --out out", 2, "pip install 'topoqa_nb[search]'"),
        ("config --show config.yaml", 0, "learning_rate"),
    ],
)
def test_only_what_needs_an_extra_asks_for_it(line: str, code: int, words: str, tmp_path: Path) -> None:
    decoys(tmp_path / "decoys", count=2)
    command = [sys.executable, "-c", WITHOUT, *line.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_would_mix_or_cannot_be_meant_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_example("decoys/a.pdb")
    write_example("twins/a.pdb")
    write_example("twins/a.ent")
    write_example("natives/other.pdb")
    assert main(["build", "decoys", "--out", "done", "--jobs", "1"]) == 0
    for words, said in {
        "build decoys --out new --edge legacy_bend": "did you mean legacy_band?",
        "build decoys --out new --param interface.cutof=12": "did you mean cutoff?",
        "build decoys --out new --param edges.cutoff=12": "did you mean edge?",
        "build decoys --out new --param interface.cutoff=-1": "interface.cutoff: expected a number greater than 0",
        "build twins --out new": "expected one structure called a",
        "build decoys --out new --native natives": "natives of no model: other",
        "build decoys --out done --param interface.cutoff=12": "interface.cutoff: 12.0 here, 10.0 there",
        "build empty --out new": "no such file",
        "build decoys --out new --jobs 0": "expected a number from 1",
        "score decoys --model none.ckpt": "none.ckpt: expected a checkpoint",
        "score twins --model none.ckpt --out s.txt": "expected a file that ends with .csv",
    }.items():
        assert main(words.split()) == 2, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("topoqa: error: ") and said in error, (words, error)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("new", "s.txt"))) == []


def test_chains_that_cannot_be_mapped_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_example(tmp_path / "decoys" / "T" / "T_0.pdb")
    chain = make_chain(np.tile(HELIX, (18, 1)))
    other = assemble({"A": ("G" * 18, chain), "B": ("W" * 18, chain + [0, 8.5, 0])})
    write_example(tmp_path / "natives" / "T.pdb", other)
    words = [
        "build",
        tmp_path / "decoys",
        "--out",
        tmp_path / "out",
        "--native",
        tmp_path / "natives",
        "--jobs",
        1,
    ]
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr().out
    assert "1 without a label: expected a chain with the sequence of each chain of T.pdb" in said
    assert (tmp_path / "out" / "graph_data" / "T" / "T_0.pt").is_file()


def test_a_folder_is_built_by_one_call_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from topoqa_nb.ground.core import held

    folder, out = decoys(tmp_path / "decoys"), tmp_path / "out"
    with held(out):
        assert main(["build", str(folder), "--out", str(out), "--jobs", "1"]) == 2
    assert "another process" in capsys.readouterr().err


def test_a_structure_that_could_not_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = decoys(tmp_path / "decoys", count=1), tmp_path / "out"
    with monkeypatch.context() as patch:

        def refuse(path: Path, recipe: Recipe, watch: object) -> None:
            raise MemoryError

        patch.setattr("topoqa_nb.build.workers.build_graph", refuse)
        assert build([folder], out, jobs=1).graphs == 0
    assert build([folder], out, jobs=1).graphs == 1
