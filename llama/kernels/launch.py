"""How kernels are launched.

A decode step is a chain of short kernels in one CUDA graph, and the overhead is the start of each.
From compute capability 9.0 on they are launched as programmatic dependents: each requests its own
weights, waits for the kernel before it, and lets the next one start before it ends itself.

Launching a short prompt takes longer than computing it. The first pass of a length is launched
kernel by kernel, the second is captured, later ones are replayed. Triton would examine every
argument of every launch, which takes 20 us on a slow host; for layers that repeat, examining those
of the first is enough.
"""

import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

_thread = threading.local()  # compiled: the kernels of the first layer; at: which comes next


def repeating(layers: Iterable) -> Iterator:
    """The layers, each of which must launch the same kernels as the first, with tensors of the same
    types, alignment and strides. Close the iterator when done with it."""
    _thread.compiled = []
    try:
        for layer in layers:
            _thread.at = 0
            yield layer
    finally:
        del _thread.compiled


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """kernel[grid](*args, **options), or what Triton compiled for the first of repeating layers."""
    compiled, at = getattr(_thread, "compiled", []), getattr(_thread, "at", 0)
    if at < len(compiled) and compiled[at]:  # None where the interpreter runs it
        compiled[at][(*grid, 1, 1)](*args)
    else:
        compiled.append(kernel[grid](*args, **options))
    _thread.at = at + 1


def captured(work: Callable[[], None], warm_up: bool) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `work` launches. With warm_up it runs before, to compile; else it must
    have run, and call no library that makes a workspace for each stream, as cuBLAS does. Other
    threads may use the GPU meanwhile."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    if warm_up:
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.stream(stream):
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            work()
        finally:  # after Ctrl-C, too: a stream left capturing would refuse all other work
            if torch.cuda.is_current_stream_capturing():
                graph.capture_end()
    return graph


def dependent(x: Tensor) -> dict:
    """Launch options: as a programmatic dependent where the GPU can."""
    can = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"PDL": can, "launch_pdl": True} if can else {"PDL": False}
