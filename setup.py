"""`pip install .` (the package with its demo model), `pip install .[test]` for the tests."""

from setuptools import setup

setup(
    name="llama-int8",
    version="0.1.0",
    description="LLaMA inference in INT8 on one GPU",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="GPL-3.0-only",
    python_requires=">=3.10",
    packages=["llama", "llama.demo", "llama.kernels"],
    package_data={
        "llama.demo": ["*.json", "*.pth", "tokenizer.model", "SOURCES.md"],
    },
    install_requires=[
        "torch>=2.11",
        "bitsandbytes>=0.50",
        "sentencepiece>=0.2",
        "fire>=0.7",
        "tqdm>=4.66",
    ],
    extras_require={
        "plot": ["matplotlib>=3.9"],  # the picture of llama.perplexity
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "numpy>=2",
            "ruff==0.17.6",
            # CUDA builds of torch bring triton; on a CPU it is for interpreting kernels.
            "triton>=3.6; sys_platform == 'linux'",
            "matplotlib>=3.9",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "ray[data]>=2.40",
        ],
    },
)
