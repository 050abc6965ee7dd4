"""How is a decode step captured and replayed?

Launched one by one from Python, the kernels of a step take longer to launch than to run. A CUDA
graph launches them all at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def captured(step: Callable[[], None], state: list[Tensor]) -> Callable[[], None]:
    """step as a CUDA graph. It is run once to compile and warm up; `state`, the tensors that it
    changes and reads again, is put back afterwards. Other threads may use the GPU meanwhile."""
    before = [tensor.clone() for tensor in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Torch's own stream for captures stays on the GPU that captured first in this process.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    for tensor, value in zip(state, before):
        tensor.copy_(value)
    return graph.replay
