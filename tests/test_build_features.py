"""From structures to arrays: against graphs of a slow reference, against gudhi and mkdssp, and on odd input."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import in_turn

pytest.importorskip("gemmi", reason="needs the extra build")
pytest.importorskip("numba", reason="needs the extra build")

from topoqa_nb.build.accessibility import accessibility
from topoqa_nb.build.alpha import alpha_complex
from topoqa_nb.build.dssp import secondary_structure
from topoqa_nb.build.edges import edges_legacy_band, edges_multi_scale
from topoqa_nb.build.example import helix_pair, write_example
from topoqa_nb.build.interface import interface_residues, node_columns, node_features
from topoqa_nb.build.persistence import persistence, topology_columns, topology_features
from topoqa_nb.build.structures import Structure, StructureError, pdb_text, read_structure
from topoqa_nb.build.tessellation import tessellate
from topoqa_nb.ground.core import ConfigError, TopoqaError

PARITY = [
    "1ACB_01",
    "1ACB_10",
    "1BVK_12",
    "1R6Q_08",
    "1US7_09",
    "2IDO_11",
    "2X9A_04",
    "2X9A_09",
    "3AAD_08",
    "3K75_05",
]


@pytest.fixture(scope="session")
def structures(shared_dir: Path) -> Path:
    folder = shared_dir / "structures"
    if not folder.is_dir():
        pytest.skip("needs the sample structures of the shared data")
    return folder


@pytest.fixture(scope="session")
def example() -> Structure:
    return helix_pair()


def decoy(structures: Path, name: str) -> Path:
    return structures / "decoys" / name[:4] / f"{name}.pdb.gz"


@pytest.mark.parametrize("name", PARITY)
def test_graphs_equal_those_of_the_slow_reference_in_every_column(structures: Path, name: str):
    from topoqa_nb.data.graphs import read_graph

    expected = read_graph(structures / "parity" / f"{name}.pt")
    structure = read_structure(decoy(structures, name))
    interface = interface_residues(structure)
    nodes = node_features(structure, interface, topology_features(structure, interface))
    edge_index, edge_attr = edges_legacy_band(structure, nodes.residues)
    labels = json.loads((structures / "parity" / "residues.json").read_text())[name]
    assert [structure.label(residue) for residue in nodes.residues] == labels
    assert len(nodes.columns) == nodes.x.shape[1]
    np.testing.assert_allclose(nodes.x, expected.x.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(edge_index, expected.edge_index.numpy())
    np.testing.assert_allclose(edge_attr, expected.edge_attr.numpy(), rtol=0, atol=1e-6)


def test_columns_are_those_of_real_graphs(shared_dir: Path):
    content = json.loads((shared_dir / "data" / "graphs" / "graph_metadata.json").read_text())
    columns = next(
        entry["node_feature_columns"] for entry in content.values() if "node_feature_columns" in entry
    )
    assert node_columns() == columns


# Clouds whose points lie on one sphere, in one plane, on one line or in one place


def bars(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = tessellate(points)
    deaths, loops = persistence(alpha_complex(points, *found), len(points), len(found.corners))
    lasting = loops[loops[:, 1] - loops[:, 0] >= 0.01]
    return np.sort(deaths[deaths > 0]), np.sort(lasting, axis=0)


def ring(count: int, radius: float, height: float = 0.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    flat = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.column_stack([flat, np.full(count, height)]).round(3)


def degenerate_clouds() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    lattice = 1.5 * np.array(list(np.ndindex(4, 4, 4)), float)
    some = (lattice[:20] + generator.normal(size=(20, 3))).round(3)
    plane = np.column_stack([generator.uniform(-5, 5, (20, 2)).round(3), np.zeros(20)])
    line = np.outer(generator.permutation(12), [1.0, 2, -1])
    named = {
        "lattice": lattice,
        "shuffled lattice": generator.permutation(lattice),
        "twice the same": np.concatenate([some, some[:5]]),
        "ring and axis": np.concatenate([ring(12, 4), [[0, 0, 3], [0, 0, -3]]]),
        "two rings": np.concatenate([ring(10, 3), ring(10, 3, 2)]),
        "plane and one": np.concatenate([plane, [[0, 0, 1.0]]]),
        "plane": plane,
        "square lattice": 1.5 * np.array([[x, y, x - y] for x in range(4) for y in range(4)], float),
        "line": line,
        "line and one": np.concatenate([line, [[0.5, 0, 0]]]),
        **{f"{count} points": some[:count] for count in range(1, 6)},
    }
    coarse = (np.unique(generator.integers(-4, 5, (40, 3)), axis=0).astype(float) for _ in range(200))
    return named | {f"coarse {place}": cloud for place, cloud in enumerate(coarse)}


@in_turn("name, cloud", degenerate_clouds().items())
def test_degenerate_clouds_do_not_depend_on_the_order_of_their_points(name: str, cloud: np.ndarray):
    "Of several right tessellations every one gives the same bars, and Euler's sum is 1."
    found = tessellate(cloud)
    complex_ = alpha_complex(cloud, *found)
    real = (found.corners < len(cloud)).all(axis=1).sum() if len(found.corners) else 0
    points = len(np.unique(cloud, axis=0))
    assert points - len(complex_.edges) + len(complex_.triangles) - real == 1
    deaths, loops = bars(cloud)
    again = bars(np.random.default_rng(1).permutation(cloud))
    assert len(deaths) == points - 1
    np.testing.assert_allclose(again[0], deaths, atol=1e-9)
    np.testing.assert_allclose(again[1], loops, atol=1e-9)


def test_persistence_equals_gudhi(example: Structure):
    "gudhi brings CGAL (GPL) and is never a dependency: pip install gudhi in an environment of its own."
    gudhi = pytest.importorskip("gudhi", reason="an oracle that is not installed: pip install gudhi")
    clouds = list(degenerate_clouds().values()) + [example.coords[:70].astype(float)]
    for cloud in clouds:
        tree = gudhi.AlphaComplex(points=cloud).create_simplex_tree()
        tree.compute_persistence()
        expected = np.array(tree.persistence_intervals_in_dimension(1)).reshape(-1, 2)
        expected = expected[expected[:, 1] - expected[:, 0] >= 0.01]
        found = bars(cloud)[1]
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, np.sort(expected, axis=0), atol=1e-6)


def mkdssp(path: Path, folder: Path) -> list[tuple[str, float, float, float]]:
    "State, phi, psi and area of every residue by the program."
    text = "HEADER".ljust(79) + "\n"
    text += "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
    text += gzip.decompress(path.read_bytes()).decode()
    (folder / "in.pdb").write_text(text)
    command = ["mkdssp", "--output-format", "dssp", folder / "in.pdb", folder / "out.dssp"]
    subprocess.run(command, check=True, capture_output=True)
    lines = (folder / "out.dssp").read_text().split("  #  RESIDUE")[1].splitlines()[1:]
    rows = [line for line in lines if line[13] != "!"]
    return [(line[16], float(line[103:109]), float(line[109:115]), float(line[34:38])) for line in rows]


def test_secondary_structure_equals_mkdssp(structures: Path, tmp_path: Path):
    "The program needs its dictionary: apt-get install dssp."
    if shutil.which("mkdssp") is None:
        pytest.skip("an oracle that is not installed: apt-get install dssp")
    for name in PARITY:
        structure = read_structure(decoy(structures, name))
        found = secondary_structure(structure)
        state, phi, psi, area = zip(*mkdssp(decoy(structures, name), tmp_path), strict=True)
        assert [letter if letter in "HBEGITS" else "-" for letter in state] == found.state.tolist()
        np.testing.assert_allclose(np.round(found.phi.astype(float), 1), phi, atol=1e-6)
        np.testing.assert_allclose(np.round(found.psi.astype(float), 1), psi, atol=1e-6)
        np.testing.assert_array_equal(np.rint(accessibility(structure, found.residues)), area)


# Odd and bad input


def changed(text: str, change) -> str:
    return "".join(change(line) for line in text.splitlines(keepends=True))


def odd_files() -> dict[str, str]:
    "Files of the same example that any reader should understand."
    text = pdb_text(helix_pair())
    atoms = [line for line in text.splitlines(keepends=True) if line.startswith("ATOM")]
    return {
        "as it is": text,
        "no TER, no END": "".join(atoms),
        "CRLF": text.replace("\n", "\r\n"),
        "no element column": changed(text, lambda line: line[:66].rstrip() + "\n"),
        "HADDOCK's segment in the charge": changed(text, lambda line: line[:72] + "A   " + line[76:78] + "AB\n" if line[:4] == "ATOM" else line),
        "lower case in a remark": "REMARK  atoms of x\n" + text,
        "two models": f"MODEL        1\n{''.join(atoms)}ENDMDL\nMODEL        2\n{''.join(atoms[:9])}ENDMDL\n",
        "chains mixed": "".join(sorted(atoms, key=lambda line: (line[22:26], line[21]))),
        "second places": changed(text, lambda line: line[:16] + "A" + line[17:] + line[:16] + "B" + line[17:30] + "   9.000   9.000   9.000  0.20" + line[60:] if line[12:16] == " CB " else line),
    }  # fmt: skip


@in_turn("name, text", odd_files().items())
def test_odd_files_are_the_same_structure(name: str, text: str, example: Structure, tmp_path: Path):
    path = tmp_path / "model.pdb"
    path.write_bytes(text.encode())
    found = read_structure(path)
    assert found.chain_names == ("A", "B")
    assert [found.label(residue) for residue in range(len(found))] == [
        example.label(place) for place in range(36)
    ]
    np.testing.assert_allclose(found.coords, example.coords, atol=6e-4)


def bad_files() -> dict[str, tuple[str, str]]:
    text = pdb_text(helix_pair())
    lines = text.splitlines(keepends=True)
    return {
        "empty.pdb": ("", "expected atoms, found none"),
        "words.pdb": ("not a structure\n", "expected atoms, found none"),
        "words.cif": ("not a structure\n", "expected PDB or mmCIF"),
        "cut.pdb": ("".join(lines[:40]) + lines[40][:50] + "\n", "coordinates in columns 31 to 54 of line 41"),
        "stars.pdb": (text.replace(lines[3][30:38], "********", 1), "columns 31 to 54 of line"),
        "nan.pdb": (text.replace(lines[3][30:38], "     nan", 1), "columns 31 to 54 of line"),
        "one.pdb": (text.split("TER")[0], "expected two protein chains or more, found one ('A')"),
        "same.pdb": (changed(text, lambda line: line[:21] + "A" + line[22:] if line[:4] == "ATOM" else line), "twice; give the partners"),
        "blank.pdb": (changed(text, lambda line: line[:21] + " " + line[22:] if line[:4] == "ATOM" else line), "of chain '' twice"),
        "water.pdb": ("HETATM    1  O   HOH A   1       1.000   1.000   1.000\n", "found no residue with a CA atom"),
        "ca.pdb": (changed(text, lambda line: line if line[12:16] == " CA " else ""), "expected interface residues with N, CA, C and O"),
        "far.pdb": (pdb_text(helix_pair(60)), "expected CA atoms of different chains within 10 Å, found none"),
    }  # fmt: skip


@in_turn("name, text, message", [(name, *values) for name, values in bad_files().items()])
def test_bad_files_are_one_line(name: str, text: str, message: str, tmp_path: Path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(StructureError) as caught:
        structure = read_structure(path)
        interface = interface_residues(structure)
        node_features(structure, interface, np.zeros((len(interface), len(topology_columns()))))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_partners_of_one_name_are_split_at_ter_records(example: Structure, tmp_path: Path):
    text = changed(
        pdb_text(example), lambda line: line[:21] + "A" + line[22:] if line[:4] == "ATOM" else line
    )
    (tmp_path / "same.pdb").write_text(text)
    found = read_structure(tmp_path / "same.pdb", split_on_ter=True)
    assert found.chain_names == ("A", "A2")
    np.testing.assert_array_equal(interface_residues(found), interface_residues(example))


def test_long_chain_names_and_numbers_that_are_none_in_mmcif(example: Structure, tmp_path: Path):
    import gemmi

    parsed = gemmi.read_pdb_string(pdb_text(example))
    for place, chain in enumerate(parsed[0]):
        chain.name = f"a-chain-with-a-long-name-{place}"
    text = parsed.make_mmcif_document().as_string()
    (tmp_path / "long.cif").write_text(text)
    found = read_structure(tmp_path / "long.cif")
    assert found.chain_names == ("a-chain-with-a-long-name-0", "a-chain-with-a-long-name-1")
    np.testing.assert_allclose(found.coords, example.coords, atol=6e-4)
    first = f"{example.coords[0, 0]:.3f}"
    for instead in ("?", "north"):
        (tmp_path / "odd.cif").write_text(text.replace(first, instead, 1))
        with pytest.raises(StructureError, match="expected finite coordinates"):
            read_structure(tmp_path / "odd.cif")


def test_missing_folder_and_directory_are_one_line(tmp_path: Path):
    for path, reason in ((tmp_path / "none.pdb", "No such file"), (tmp_path, "found a directory")):
        with pytest.raises(StructureError, match=reason):
            read_structure(path)


@in_turn(
    "name, values",
    [
        ("neighbor_distance", {"neighbor_distance": 0}),
        ("neighbor_distance", {"neighbor_distance": 18.5}),
        ("neighbor_distance", {"neighbor_distance": float("nan")}),
        ("filtration_cutoff", {"filtration_cutoff": -1}),
        ("min_persistence", {"min_persistence": -0.1}),
        ("element_filters", {"element_filters": []}),
    ],
)
def test_parameters_of_topology_are_checked(name: str, values: dict, example: Structure):
    with pytest.raises(ConfigError, match=name):
        topology_features(example, np.arange(4), **values)


def test_three_chains_are_one_graph(example: Structure, tmp_path: Path):
    text = pdb_text(example)
    third = changed(
        text.split("TER\n")[0],
        lambda line: line[:21] + "C" + line[22:38] + f"{float(line[38:46]) + 17:8.3f}" + line[46:],
    )
    (tmp_path / "three.pdb").write_text(text.replace("END\n", third + "TER\nEND\n"))
    structure = read_structure(tmp_path / "three.pdb")
    interface = interface_residues(structure)
    edge_index, _ = edges_legacy_band(structure, interface)
    joined = {tuple(pair) for pair in structure.chain[interface][edge_index].T.tolist()}
    assert {(0, 1), (1, 0), (1, 2), (2, 1)} <= joined
    assert all(one != other for one, other in joined)


def test_multi_scale_equals_a_plain_computation(example: Structure):
    interface = interface_residues(example, cutoff=14.0)
    edge_index, edge_attr = edges_multi_scale(example, interface)
    assert edge_attr.shape[1] == 24
    for (source, target), row in list(zip(interface[edge_index].T, edge_attr, strict=True))[:20]:
        a, b = (example.coords[example.residue == residue].astype(float) for residue in (source, target))
        gaps = np.linalg.norm(a[:, None] - b[None], axis=-1)
        counts = np.histogram(gaps, np.arange(0, 21, 2))[0]
        way = b[1] - a[1]  # CA is the second atom
        distance = np.linalg.norm(way)
        band = int(np.digitize(distance, [6, 10]))
        chains = (example.chain[[source, target]] + 1) / 26
        np.testing.assert_allclose(row[:5], [distance, 1 / distance, *way / distance], atol=1e-4)
        np.testing.assert_allclose(row[5:7], chains, atol=1e-6)
        np.testing.assert_allclose(row[9:13], [band, *np.eye(3)[band]])
        np.testing.assert_allclose(row[13:23], counts / counts.sum(), atol=1e-6)
        assert row[23] == (gaps <= 5).sum()


def test_the_package_needs_neither_gemmi_nor_numba():
    "Importing the builder's readers asks for them only when they are used, in one line."
    program = """
import sys
sys.modules["gemmi"] = sys.modules["numba"] = None
import topoqa_nb
from topoqa_nb.build import structures, example, dssp
from topoqa_nb.ground.core import ConfigError
for use in (lambda: structures.needed("gemmi"), lambda: __import__("topoqa_nb.build.edges")):
    try:
        use()
    except ConfigError as problem:
        print(problem)
print("torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *lines, torch = found.stdout.splitlines()
    assert torch == "False"
    assert len(lines) == 2 and all("pip install 'topoqa_nb[build]'" in line for line in lines)


def test_an_example_is_written_and_read(tmp_path: Path, example: Structure):
    found = read_structure(write_example(tmp_path / "example.pdb"))
    np.testing.assert_allclose(found.coords, example.coords, atol=6e-4)
    assert issubclass(StructureError, TopoqaError) and len(list(tmp_path.iterdir())) == 1
