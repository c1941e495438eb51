"""What is declared, what is pinned, what a wheel carries, and what `make` says to an old Python."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
COMES_WITH = {"pydantic-core": "pydantic"}  # pins its own exact version of it
SHIPPED = {"configs": "*.yaml", "manifests": "*.yaml", "pipelines": "*.ipynb"}


def requirements(*extras: str) -> list[Requirement]:
    "The declared run-time requirements and those of the given extras."
    lines = PROJECT["dependencies"] + [
        line for extra in extras for line in PROJECT["optional-dependencies"][extra]
    ]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    "Canonical package name -> version in constraints.txt."
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pinned}


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"


def required_imports(module: Path) -> set[str]:
    "Top-level names that the module cannot do without; an import inside `try`, or for types alone, is optional."
    tree = ast.parse(module.read_text())
    blocks = [block for block in ast.walk(tree) if isinstance(block, ast.Try) or _is_for_types(block)]
    optional = {id(node) for block in blocks for node in ast.walk(block)}
    nodes = [node for node in ast.walk(tree) if id(node) not in optional]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"topoqa_nb"}


def test_what_a_module_imports_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    distributions = packages_distributions()
    for module in (REPOSITORY / "topoqa_nb").rglob("*.py"):
        for name in required_imports(module):
            found = {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
            known = found | {COMES_WITH.get(one) for one in found}
            assert known & declared, f"{module} imports {name}"


def test_every_requirement_is_pinned_within_its_bounds():
    pinned = pins()
    for requirement in requirements("dev", "docs"):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_pins_are_exact_and_belong_to_no_machine():
    for name, version in pins().items():
        assert re.fullmatch(r"[a-z0-9-]+ \d+(\.\w+)*", f"{name} {version}"), f"{name}=={version}"


def test_one_version_everywhere():
    settings = (REPOSITORY / "settings.ini").read_text()
    version = re.search(r"^version = (\S+)$", settings, flags=re.MULTILINE)[1]
    assert f'__version__ = "{version}"' in (REPOSITORY / "topoqa_nb" / "__init__.py").read_text()
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The wheel of a copy of the repository; building writes beside the source."
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("topoqa_nb", "scripts", *SHIPPED):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", out, copy], check=True)
    return next(out.glob("*.whl"))


def test_a_wheel_carries_configs_manifests_and_pipelines(wheel: Path):
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in SHIPPED.items():
        files = {f"topoqa_nb/_data/{folder}/{path.name}" for path in (REPOSITORY / folder).glob(pattern)}
        assert files
        assert files <= packed


def test_a_wheel_carries_every_module_and_its_types(wheel: Path):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "topoqa_nb").rglob("*.py")}
    assert len(modules) > 40
    assert modules | {"topoqa_nb/py.typed"} <= packed


def test_importing_the_package_alone_is_light():
    program = "import sys, topoqa_nb; print([name for name in ('torch', 'pandas', 'pydantic') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_shipped_files_are_found_from_a_wheel_outside_a_checkout(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = "from topoqa_nb.ground.files import find_shipped; print(find_shipped('config.yaml', 'configs'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == tmp_path / "site" / "topoqa_nb" / "_data" / "configs" / "config.yaml"


def test_make_refuses_an_old_python_in_one_line(tmp_path: Path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" || exit 1\n')
    old.chmod(0o755)
    command = ["make", "--silent", "lint", f"PYTHON={old}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "expected Python 3.11 or newer, found Python 3.9.1" in result.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()
