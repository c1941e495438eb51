"""The audit of a data set: it lists everything, whatever the files hold."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import in_turn
from torch_geometric.data import Data

from topoqa_nb.cli import main
from topoqa_nb.data.audit import Audit, audit, label_facts, sound_labels
from topoqa_nb.data.audit_graphs import Finding
from topoqa_nb.data.audit_report import as_text, load_profile, to_dict
from topoqa_nb.data.demo import write_demo
from topoqa_nb.data.labels import read_labels
from topoqa_nb.data.tiny import DemoPaths, write_tiny_dataset
from topoqa_nb.ground.core import DataError, to_json


def graph(nodes: int = 6, edges: int = 8, *, node_width: int = 5, edge_width: int = 3, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return Data(
        x=torch.rand(nodes, node_width, generator=generator),
        edge_index=torch.stack([torch.zeros(edges), torch.ones(edges)]).long(),
        edge_attr=torch.rand(edges, edge_width, generator=generator),
    )


def save(content: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def csv(path: Path, rows: str) -> Path:
    path.write_text(f"MODEL,dockq\n{rows}\n")
    return path


def found(report: Audit, check: str, severity: str = "error") -> list[Finding]:
    return [finding for finding in report.findings if (finding.check, finding.severity) == (check, severity)]


class Executes:
    "A pickle of this creates a directory when it is loaded without restrictions."

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


@pytest.fixture
def tiny(tmp_path: Path) -> DemoPaths:
    return write_tiny_dataset(tmp_path / "tiny", targets=4, decoys=3, sidecar=True)


def labels_of(paths: DemoPaths) -> list[Path]:
    return [paths.train_labels, paths.val_labels]


# --- sound data ---


def test_the_demo_data_set_is_sound(tmp_path: Path):
    demo = write_demo(tmp_path / "demo", targets=4, decoys=3)
    report = audit(demo.graph_dir, labels_of(demo))
    assert report.ok, as_text(report)
    assert report.counts["warning"] == 0, as_text(report)


def test_the_real_data_set_is_sound_and_its_degenerate_graph_is_named(shared_dir: Path):
    report = audit(
        shared_dir / "data" / "graphs", [shared_dir / "data" / f"{name}.csv" for name in ("train", "val")]
    )
    assert report.ok, as_text(report)
    assert {finding.names for finding in found(report, "interface", "warning")} == {("1HIA/1HIA_10",)}
    numbers = to_dict(report)["summary"]
    assert [numbers["files"], numbers["nodes"]["min"], numbers["edges"]["max"]] == [1044, 2, 434]
    assert [entry["with_graph"] for entry in numbers["labels"]] == [792, 252]


# --- files ---


def test_every_broken_file_is_listed_and_the_others_are_read(tiny: DemoPaths, tmp_path: Path):
    proof = tmp_path / "code_ran"
    unsafe = graph()
    unsafe.metadata = {"builder": Executes(proof)}
    bad = tiny.graph_dir / "BAD"
    save(unsafe, bad / "unsafe.pt")
    save({"x": 1}, bad / "dictionary.pt")
    save(graph(nodes=0, edges=0), bad / "empty.pt")
    (bad / "no_bytes.pt").touch()
    (bad / "cut.pt").write_bytes(save(graph(), tmp_path / "whole.pt").read_bytes()[:1000])
    for name, value in (("nan", torch.nan), ("infinite", torch.inf)):
        wrong = graph()
        wrong.edge_attr[2, 1] = value
        save(wrong, bad / f"{name}.pt")
    outside = graph()
    outside.edge_index[1, 3] = 6
    save(outside, bad / "outside.pt")
    report = audit(tiny.graph_dir, labels_of(tiny))
    checks = {finding.where: finding.check for finding in report.findings if finding.severity == "error"}
    assert checks == {
        "BAD/cut.pt": "file",
        "BAD/dictionary.pt": "file",
        "BAD/no_bytes.pt": "file",
        "BAD/unsafe.pt": "file",
        "BAD/empty.pt": "x",
        "BAD/nan.pt": "edge_attr",
        "BAD/infinite.pt": "edge_attr",
        "BAD/outside.pt": "edge_index",
    }
    assert not proof.exists()
    assert (report.files, len(report.graphs)) == (20, 12)
    assert not report.ok


def test_a_directory_in_which_no_file_can_be_read(tmp_path: Path):
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "a.pt").write_bytes(b"not a graph")
    report = audit(tmp_path / "graphs", [csv(tmp_path / "train.csv", "a,0.5")])
    assert [finding.where for finding in report.findings if finding.severity == "error"] == ["a.pt"]
    assert to_dict(report)["summary"]["nodes"] is None
    assert "1 graph files, 0 readable" in as_text(report)


def test_the_smaller_group_of_a_width_is_named_whole(tiny: DemoPaths):
    for number in range(7):
        save(graph(edge_width=9, seed=number), tiny.graph_dir / "WIDE" / f"WIDE_{number}.pt")
    save(graph(node_width=4), tiny.graph_dir / "NARROW" / "a.pt")
    report = audit(tiny.graph_dir)
    assert [(f.problem, len(f.names)) for f in found(report, "widths")] == [
        ("4 features per node, but 5 in 19 graphs", 1),
        ("9 features per edge, but 3 in 13 graphs", 7),
    ]


def test_a_flat_edge_attr_is_one_feature(tmp_path: Path):
    flat = graph(edge_width=1)
    flat.edge_attr = flat.edge_attr.flatten()
    save(flat, tmp_path / "g" / "flat.pt")
    save(graph(edge_width=1, seed=1), tmp_path / "g" / "matrix.pt")
    assert audit(tmp_path / "g").ok


def test_a_graph_without_edges_is_a_warning_and_no_error(tiny: DemoPaths):
    save(graph(edges=0), tiny.graph_dir / "APART" / "a.pt")
    report = audit(tiny.graph_dir)
    assert report.ok
    assert [finding.names for finding in found(report, "interface", "warning")] == [("APART/a",)]


def test_constant_columns_have_the_names_of_the_sidecar(tmp_path: Path):
    paths = write_tiny_dataset(tmp_path / "tiny", sidecar=True)
    for path in paths.graph_dir.rglob("*.pt"):
        content = torch.load(path, weights_only=False)
        content.x[:, 3] = 0.25
        torch.save(content, path)
    (finding,) = found(audit(paths.graph_dir), "constant", "info")
    assert finding.names == ("node_3",)


# --- sidecar ---


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"TINY01/TINY01_00": 5}'])
def test_a_sidecar_that_cannot_be_used_is_a_warning(tiny: DemoPaths, content: str):
    (tiny.graph_dir / "graph_metadata.json").write_text(content)
    report = audit(tiny.graph_dir)
    assert report.ok
    assert found(report, "sidecar", "warning")


def test_a_sidecar_of_another_build_is_an_error(tiny: DemoPaths):
    path = tiny.graph_dir / "graph_metadata.json"
    content = json.loads(path.read_text())
    for entry in content.values():
        entry["node_feature_columns"] = ["one", "two"]
        entry["edge_metadata"]["feature_dim"] = 24
    path.write_text(json.dumps(content))
    report = audit(tiny.graph_dir)
    assert {finding.problem for finding in found(report, "sidecar")} == {
        "24 features per edge, but the tensors have 3",
        "2 names of node columns, but the tensors have 5",
    }
    assert all(len(finding.names) == 12 for finding in found(report, "sidecar"))


def test_two_orders_of_columns_in_one_directory(tiny: DemoPaths):
    path = tiny.graph_dir / "graph_metadata.json"
    content = json.loads(path.read_text())
    content["TINY02/TINY02_00"]["node_feature_columns"].reverse()
    path.write_text(json.dumps(content))
    (finding,) = found(audit(tiny.graph_dir), "sidecar")
    assert (finding.problem, finding.names) == (
        "2 lists of node columns in one directory",
        ("TINY02/TINY02_00",),
    )


# --- labels ---


def test_all_rows_that_break_a_rule_are_listed(tmp_path: Path):
    rows = "a,0.5\nb,71\n,0.2\nc,0.1\nc,0.2\n../d,0.3\ne,-1\nf,\na,0.5\ng,1.0000001\ng,1"
    labels, problems = sound_labels(csv(tmp_path / "bad.csv", rows))
    assert labels.table.to_dict("list") == {"MODEL": ["a", "g"], "dockq": [0.5, 1.0]}
    assert labels.dropped == 1
    assert len(problems) == 5


@in_turn("rows", ["a,0.5\nb,0.25", "a,0.5\na,0.5\nb,", " a ,1e-1", "a,1.0000001\nb,-1e-6\na,1"])
def test_sound_labels_are_what_read_labels_reads(tmp_path: Path, rows: str):
    path = csv(tmp_path / "good.csv", rows)
    labels, problems = sound_labels(path)
    assert problems == []
    assert labels.table.equals(read_labels(path).table)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "an empty file"),
        ("MODEL,score\na,0.5\n", "found columns"),
        ("MODEL,dockq\na,nan\n", "none with a finite dockq"),
        ("MODEL,dockq\na,2\n", "found 2 for a"),
        ("MODEL,dockq\na,0.1,0.2\n", "Expected 2 fields"),
    ],
)
def test_a_label_file_without_a_usable_row_is_a_finding(
    tiny: DemoPaths, tmp_path: Path, content: str, problem: str
):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    report = audit(tiny.graph_dir, [path, tiny.val_labels])
    (finding,) = found(report, "labels")
    assert problem in finding.problem
    assert [labels.path for labels in report.labels] == [tiny.val_labels]


def test_all_labels_without_a_clear_graph_are_listed(tmp_path: Path):
    names = ["A/one", "B/one", "A/two", "B/two", "A/three"]
    path = csv(tmp_path / "labels.csv", "one,0.1\ntwo,0.2\nthree,0.3\nA__three,0.4\ngone,0.5\nA/one,0.6")
    facts, findings = label_facts(path, names)
    assert facts.dockq == {"A/three": 0.3, "A/one": 0.6}
    assert [finding.problem.split("found ")[-1] for finding in findings[:3]] == [
        "2: A/one.pt, B/one.pt",
        "2: A/two.pt, B/two.pt",
        "three and A__three",
    ]
    assert findings[3].names == ("gone",)


def test_labels_of_another_data_set(tiny: DemoPaths, tmp_path: Path):
    path = csv(tmp_path / "other.csv", "\n".join(f"other_{number},0.5" for number in range(50)))
    (finding,) = found(audit(tiny.graph_dir, [path]), "labels")
    assert (finding.problem, len(finding.names)) == ("labels without a graph: 50 of 50", 50)


def test_a_label_of_an_unreadable_graph_is_not_missing(tiny: DemoPaths):
    (tiny.graph_dir / "TINY01" / "TINY01_00.pt").write_bytes(b"")
    report = audit(tiny.graph_dir, labels_of(tiny))
    assert [finding.check for finding in report.findings if finding.severity == "error"] == ["file"]


def test_dropped_rows_and_equal_duplicates_are_warnings(tiny: DemoPaths, tmp_path: Path):
    path = csv(tmp_path / "train.csv", "TINY01_00,0.5\nTINY01_00,0.5\nTINY01_01,n/a")
    report = audit(tiny.graph_dir, [path])
    assert report.ok
    assert len(found(report, "labels", "warning")) == 2


# --- leaks ---


def test_targets_graphs_and_contents_in_two_files(tiny: DemoPaths, tmp_path: Path):
    twin = tiny.graph_dir / "TWIN" / "TWIN_00.pt"
    twin.parent.mkdir()
    twin.write_bytes((tiny.graph_dir / "TINY02" / "TINY02_01.pt").read_bytes())
    one = csv(tmp_path / "train.csv", "TINY01_00,0.1\nTINY01_01,0.2\nTINY02_01,0.3")
    other = csv(tmp_path / "val.csv", "TINY01_01,0.2\nTINY01_02,0.4\nTWIN_00,0.3")
    report = audit(tiny.graph_dir, [one, other])
    assert [(finding.problem, finding.names) for finding in found(report, "leak")] == [
        ("targets in both: 1", ("TINY01",)),
        ("graphs in both: 1", ("TINY01/TINY01_01",)),
        ("identical graphs in both: 1", ("TWIN/TWIN_00",)),
    ]


def test_a_family_in_two_files_is_a_leak(tiny: DemoPaths, tmp_path: Path, capsys: pytest.CaptureFixture):
    one, other = csv(tmp_path / "train.csv", "TINY01_00,0.1"), csv(tmp_path / "val.csv", "TINY02_01,0.2")
    assert not found(audit(tiny.graph_dir, [one, other]), "leak")
    families = tmp_path / "families.csv"
    families.write_text("target,family\nTINY01,kinase\nTINY02,kinase\n")
    words = [
        "validate",
        "--graph-dir",
        tiny.graph_dir,
        "--labels",
        one,
        "--labels",
        other,
        "--families",
        families,
    ]
    assert main([*map(str, words), "--format", "json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (leak,) = [finding for finding in report["findings"] if finding["check"] == "leak"]
    assert (leak["severity"], leak["problem"], leak["names"]) == ("error", "families in both: 1", ["kinase"])
    assert report["summary"]["labels"][0]["dockq"]["at_least_0.23"] == 0.0
    families.write_text("target,group\nTINY01,kinase\n")
    assert main(list(map(str, words))) == 2
    assert "columns target and family" in capsys.readouterr().err


def test_targets_of_a_flat_directory_come_from_the_expression(tmp_path: Path):
    for number, name in enumerate(("1ACB_00", "1ACB_01")):
        save(graph(seed=number), tmp_path / "g" / f"{name}.pt")
    labels = [csv(tmp_path / "train.csv", "1ACB_00,0.1"), csv(tmp_path / "val.csv", "1ACB_01,0.2")]
    unknown = audit(tmp_path / "g", labels)
    assert unknown.ok
    assert "2 of 2" in found(unknown, "leak", "info")[0].problem
    known = audit(tmp_path / "g", labels, target_regex="^([^_]+)_")
    assert found(known, "leak")[0].names == ("1ACB",)


# --- the report ---


def test_a_wrong_place_is_raised_before_anything_is_read(
    tiny: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "topoqa_nb.data.audit_graphs.graph_facts", lambda *_, **__: pytest.fail("a graph was read")
    )
    with pytest.raises(DataError, match="no such directory"):
        audit(tmp_path / "absent")
    with pytest.raises(DataError, match=r"absent\.csv: expected a label file, found no such file"):
        audit(tiny.graph_dir, [tmp_path / "absent.csv"])


def test_errors_come_first_and_the_json_form_has_everything(tiny: DemoPaths):
    for number in range(40):
        (tiny.graph_dir / f"cut_{number:02}.pt").touch()
    save(graph(edges=0), tiny.graph_dir / "apart.pt")
    report = audit(tiny.graph_dir, labels_of(tiny))
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=("error", "warning", "info").index)
    content = json.loads(to_json(to_dict(report)))
    assert (
        content["counts"]["error"] == sum(entry["severity"] == "error" for entry in content["findings"]) == 40
    )
    assert sum("cut_" in line and line.startswith("error") for line in as_text(report).splitlines()) == 10
    assert "and 30 more" in as_text(report)


def test_a_narrow_terminal_gets_narrow_lines(tiny: DemoPaths):
    (tiny.graph_dir / "a_file_with_quite_a_long_name.pt").touch()
    text = as_text(audit(tiny.graph_dir), width=90)
    table = text[text.index("severity") :]
    assert max(map(len, table.splitlines())) <= 90


def test_nothing_is_printed_where_no_terminal_is(tiny: DemoPaths, capfd: pytest.CaptureFixture):
    audit(tiny.graph_dir, labels_of(tiny))
    assert capfd.readouterr() == ("", "")


def test_timings_are_measured_and_kept_out_of_the_report(tiny: DemoPaths):
    report = audit(tiny.graph_dir)
    profile = load_profile(report.graphs, slowest=2)
    assert 0 < profile["median_ms"] <= profile["p95_ms"] <= profile["slowest"][0]["ms"]
    assert (
        profile["slowest"][0]["bytes"]
        == (tiny.graph_dir / f"{profile['slowest'][0]['name']}.pt").stat().st_size
    )
    assert "seconds" not in to_json(to_dict(report))
