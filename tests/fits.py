"""Does a size fit, and is the estimate right? python tests/fits.py 13B FOLDER LIMIT_GIB

Loads FOLDER (tests/random_model.py writes it) with torch held to LIMIT_GIB of GPU memory, generates
64 tokens at the end of 2,048, and prints what that took beside what llama.memory says. The limit
does not count CUDA's own context, the driver's figures do. Host memory is in the line that loading
prints. For a GPU that nobody else uses.
"""

import sys
import time

import torch

from llama import LLaMA, Settings, memory, room
from llama.room import GIB

LENGTH = 2048
NEW_TOKENS = 64


def taken() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def main(size: str, folder: str, limit: float) -> None:
    memory.main(size, max_batch_size=1, max_seq_len=LENGTH)
    torch.ones(1, device="cuda")
    context = taken()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit * GIB / total)

    started = time.perf_counter()
    llm = LLaMA.build(folder, max_seq_len=LENGTH, max_batch_size=1)
    print(f"load: {time.perf_counter() - started:.1f} s")
    weights = torch.cuda.memory_reserved()

    ids = [llm.tokenizer.bos_id] + [100] * (LENGTH - NEW_TOKENS - 1)
    started = time.perf_counter()
    [result] = llm.complete([ids], Settings(NEW_TOKENS, temperature=0))
    print(f"generate: {len(result.tokens)} tokens in {time.perf_counter() - started:.1f} s")

    need = room.need(llm.model, 1, LENGTH, torch.float16)
    print(f"limit for torch: {limit:.2f} GiB; CUDA itself took {context / GIB:.2f} at the start")
    print(f"{'GiB':16}{'said':>8}{'measured':>10}{'said / measured':>17}")
    for name, said, measured in (
        ("weights, torch", need.weights, weights),
        ("peak, torch", need.total, torch.cuda.max_memory_reserved()),
        ("peak, driver", need.total + memory.CONTEXT * GIB, taken()),
    ):
        print(f"{name:16}{said / GIB:8.2f}{measured / GIB:10.2f}{said / measured:17.3f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
