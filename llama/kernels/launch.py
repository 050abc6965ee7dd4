"""How does a kernel start?

Decoding is bound by reading the weights once a token, so a step is a chain of short kernels in one
CUDA graph, and what is lost is the ramp at each start. From compute capability 9.0 on, kernels are
launched as programmatic dependents: each lets the next one start at once, requests its own weights,
which depend on no earlier kernel, and only then waits for the one before it.

A prompt is some hundred short kernels too, but of a length that no graph was captured for. Triton
looks at each argument of each launch, which takes 20 us of a slow host; in layers that repeat, a
look at the first one is enough.
"""

import torch
from torch import Tensor


def dependent(x: Tensor) -> dict:
    """Launch options: as a programmatic dependent where the GPU can."""
    can = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"PDL": can, "launch_pdl": True} if can else {"PDL": False}


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    kernel[grid](*args, **options)


class Repeated:
    """launch() for a sequence that is launched again and again with other tensors of the same kind,
    aligned alike: from the second time on with what Triton compiled at the first."""

    def __init__(self):
        self.compiled = []
        self.at = 0

    def again(self) -> None:
        self.at = 0

    def __call__(self, kernel, grid: tuple[int, ...], *args, **options) -> None:
        if self.at == len(self.compiled):
            self.compiled.append(kernel[grid](*args, **options))  # the interpreter returns None
        elif self.compiled[self.at] is None:
            kernel[grid](*args, **options)
        else:
            self.compiled[self.at][(*grid, 1, 1)](*args)
        self.at += 1
