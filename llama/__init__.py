"""LLaMA in INT8 on one GPU: `LLaMA.build(ckpt_dir, tokenizer_path).generate(["..."], 64)`."""

from llama.generation import LLaMA
from llama.model import ModelArgs, Transformer
from llama.request import Completion
from llama.settings import Settings
from llama.tokenizer import Tokenizer

__version__ = "0.2.0"
__all__ = ["Completion", "LLaMA", "ModelArgs", "Settings", "Tokenizer", "Transformer"]
