"""Can the package be built, twice the same, and does it run from an empty folder? No network."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATE = {"SOURCE_DATE_EPOCH": "1700000000"}
LOCAL = {".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".venv"}


def run(*command, cwd, **more):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **DATE, **more},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sdist(folder):
    """Made from a copy of the tree, whose files have another date in each copy."""
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LOCAL))
    for path in folder.rglob("*.py"):
        path.touch()
    run("setup.py", "-q", "sdist", "-d", folder, cwd=folder / "tree")
    return next(folder.glob("*.tar.gz"))


def wheel(tree, out):
    pip = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "-w", out, tree, cwd=tree)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two sdists, a wheel of the tree, a wheel of the unpacked sdist, and where that lies."""
    one, two, other = (tmp_path_factory.mktemp(name) for name in ("one", "two", "unpacked"))
    sdists = sdist(one), sdist(two)
    with tarfile.open(sdists[0]) as archive:
        archive.extractall(other)
    [tree] = other.iterdir()
    return *sdists, wheel(one / "tree", one), wheel(tree, other), tree


def test_builds_are_equal_bit_for_bit(built):
    sdist_one, sdist_two, wheel_one, wheel_two = (path.read_bytes() for path in built[:4])
    assert sdist_one == sdist_two and wheel_one == wheel_two


def test_sdist_holds_the_tree(built):
    *_, tree = built
    kinds = "*.py", "*.json", "*.pth", "*.model", "*.md", "*.txt", "*.sh", "LICENSE", ".pytest.ini"
    for folder in ("llama", "llama/demo", "llama/kernels", "tests", "."):
        files = [file for kind in kinds for file in (ROOT / folder).glob(kind)]
        assert files
        for file in files:
            assert (tree / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    assert os.access(tree / "download.sh", os.X_OK)


def test_wheel_runs_from_an_empty_folder(built, tmp_path):
    *_, whl, _ = built
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(whl) as archive:
        archive.extractall(site)
    modules = {p.relative_to(ROOT) for p in (ROOT / "llama").rglob("*.py")}
    assert modules == {p.relative_to(site) for p in (site / "llama").rglob("*.py")}
    arguments = ["--prompt", "The king", "--max_gen_len=5", "--device=cpu", "--seed=1"]
    text = run("-m", "llama", *arguments, cwd=empty, PYTHONPATH=str(site))
    assert text.startswith("The king") and len(text) > len("The king\n")
    where = run("-c", "import llama; print(llama.__file__)", cwd=empty, PYTHONPATH=str(site))
    assert where.strip() == str(site / "llama" / "__init__.py")
    assert list(empty.iterdir()) == []
