"""The published way to build a graph, as a measure of speed: Biopython, mkdssp and gudhi. What it finds is thrown away.

    PYTHON benchmarks/build_slowly.py FILE.pdb...

PYTHON is that of an environment with gudhi and biopython, and mkdssp is on the path; none of them is a dependency of this
package (gudhi brings CGAL, GPL). Prints seconds of processor time of each structure, mkdssp's included.
"""

import json
import resource
import sys
import tempfile
import warnings
from itertools import combinations
from pathlib import Path

import gudhi
import numpy as np
from Bio.PDB import NeighborSearch, PDBParser
from Bio.PDB.DSSP import DSSP

SETS = ("C", "N", "O", "CN", "CO", "NO", "CNO")
HEAD = "HEADER".ljust(79) + "\n" + "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
BINS = np.append(np.arange(1, 11), np.inf)  # Å


def spent() -> float:
    "Processor time of this process and of those that it has waited for (s)."
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def topology(atoms: list) -> None:
    "Components and loops of seven sets of atoms."
    for elements in SETS:
        points = np.array([atom.coord for atom in atoms if atom.id[0] in elements], float)
        if len(points):
            gudhi.RipsComplex(points=points).create_simplex_tree(max_dimension=1).persistence()
            gudhi.AlphaComplex(points=points).create_simplex_tree().persistence()


def secondary_structure(path: Path, model: object) -> None:
    "mkdssp of the file, with the header that it asks for."
    with tempfile.NamedTemporaryFile("w", suffix=".pdb") as file:
        file.write(HEAD + path.read_text())
        file.flush()
        DSSP(model, file.name, dssp="mkdssp")


def edges(nodes: list) -> None:
    "Distances of the atoms of all pairs that are near each other."
    for one, other in combinations(nodes, 2):
        if one.parent.id != other.parent.id and one["CA"] - other["CA"] < 10:
            first, second = (np.array([atom.coord for atom in residue]) for residue in (one, other))
            np.histogram(np.linalg.norm(first[:, None] - second[None], axis=-1), BINS)


def build(path: Path) -> int:
    "All that a graph needs; how many nodes it has."
    model = PDBParser(QUIET=True).get_structure("s", path)[0]
    residues = [residue for residue in model.get_residues() if residue.id[0] == " " and "CA" in residue]
    positions = np.array([residue["CA"].coord for residue in residues])
    chains = np.array([residue.parent.id for residue in residues])
    near = np.linalg.norm(positions[:, None] - positions[None], axis=-1) < 10
    nodes = [residues[place] for place in np.flatnonzero((near & (chains[:, None] != chains)).any(axis=1))]
    search = NeighborSearch(list(model.get_atoms()))
    for residue in nodes:
        topology(search.search(residue["CA"].coord, 8.0))
    secondary_structure(path, model)
    edges(nodes)
    return len(nodes)


def main() -> None:
    warnings.simplefilter("ignore")
    times = []
    for name in sys.argv[1:]:
        before = spent()
        build(Path(name))
        times.append(spent() - before)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
