"""Builds the package without a network and runs it from an empty folder."""

import shutil
import tarfile

import pytest
from conftest import ROOT, python

import llama

pytestmark = pytest.mark.slow

LOCAL = {".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".venv"}


def run(*command, cwd, site=""):
    done = python(*command, cwd=cwd, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("source", ["tree", "sdist"])
def test_package_runs_from_an_empty_folder(tmp_path, source):
    tree, site, empty = (tmp_path / name for name in ("tree", "site", "empty"))
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LOCAL))
    if source == "sdist":
        run("setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree)
        [archive] = tmp_path.glob("llama_int8-*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(tmp_path)
        tree = tmp_path / archive.name.removesuffix(".tar.gz")
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    run("-m", "pip", "install", "-q", *offline, "--target", site, tree, cwd=tmp_path)
    for kind in ("*.py", "py.typed"):
        files = {path.relative_to(ROOT) for path in (ROOT / "llama").rglob(kind)}
        assert files and files == {path.relative_to(site) for path in (site / "llama").rglob(kind)}
    empty.mkdir()
    arguments = ["--prompt=The king", "--max_gen_len=5", "--device=cpu", "--seed=1"]
    text = run(site / "bin" / "llama", *arguments, cwd=empty, site=site)
    assert text.startswith("The king") and len(text) > len("The king\n")
    about = "import importlib.metadata, llama; print(importlib.metadata.version('llama-int8'))"
    printed = run("-c", f"{about}; print(llama.__file__)", cwd=empty, site=site)
    assert printed.split() == [llama.__version__, str(site / "llama" / "__init__.py")]
    assert list(empty.iterdir()) == []
