"""Which device, engine and cores a model works with."""

import ctypes
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OPENMP = ctypes.CDLL(torch._C.__file__)  # torch links it
# Models of fewer weights run on one core of a CPU: more are no faster, and far slower beside other
# programs. The demo writes 180 tokens/s; beside a busy process 6 on two cores, 147 on one.
ONE_CORE = 2**24


def use_cores(count: int) -> int:
    """Lets this thread compute on so many cores; returns how many it had. Unlike
    torch.set_num_threads this changes nothing for threads that begin meanwhile."""
    before = torch.get_num_threads()  # at its first use in a thread torch sets OpenMP's number
    if hasattr(OPENMP, "omp_set_num_threads"):
        OPENMP.omp_set_num_threads(count)
    return before


@contextmanager
def at_work(device: torch.device, cores: int | None) -> Iterator[None]:
    """Computes on this device (torch and Triton by themselves would work on cuda:0), on so many
    cores of a CPU, and exactly, though the program around it may be in an autocast."""
    on_device = torch.accelerator.device_index(device.index)  # does nothing on the CPU
    exact = torch.autocast(device.type, enabled=False)
    with on_device, exact, torch.inference_mode():
        before = use_cores(cores or torch.get_num_threads())
        try:
            yield
        finally:
            use_cores(before)


@contextmanager
def forgetting() -> Iterator[None]:
    """After an error, clears the variables of the frames that it came through: IPython keeps the
    last exception, and with it they would keep the weights or the KV cache in memory. An error
    that was being handled before stays as it is."""
    before = sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        came = error
        while came and came is not before:
            traceback.clear_frames(came.__traceback__)
            came = came.__context__
        raise


def pick_device(device: str | torch.device | None, use_int8: bool) -> torch.device:
    """CUDA if there is any, unless told otherwise; ValueError or ImportError if it cannot work."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        target = torch.device(("cuda" if count else "cpu") if device is None else device)
    except (RuntimeError, TypeError):
        target = None
    if target is None or target.type != "cuda" and str(target) != "cpu":
        raise ValueError(f"device is {str(device)!r:.60}, expected cuda, cuda:1 or cpu")
    if target.type == "cpu":
        return target
    if not count:
        raise ValueError(
            f"device is {target}, but torch {torch.__version__} sees no CUDA GPU: install a CUDA "
            "build of torch and the driver, or pass --device=cpu"
        )
    if (target.index or 0) >= count:
        raise ValueError(f"device is {target}, expected one of the {count} that torch sees, cuda:0")
    from bitsandbytes.cextension import lib

    if use_int8 and getattr(lib, "compiled_with_cuda", False) is not True:
        raise ImportError(
            f"bitsandbytes has no library for CUDA {torch.version.cuda}: reinstall it (pip install "
            "-r requirements.txt), see python -m bitsandbytes, or pass --use_int8=False"
        )
    return target


def pick_engine(device: torch.device, head_dim: int) -> str:
    """The engine triton where our kernels run; elsewhere bnb, and a warning says why."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        reason = f"{device} has compute capability {capability}, our kernels need (8, 0)"
    elif head_dim < 32 or head_dim & (head_dim - 1):
        reason = f"attention heads are {head_dim} wide, our kernels need a power of 2, at least 32"
    else:
        return "triton"
    warnings.warn(f"{reason}: bitsandbytes multiplies instead, slower", stacklevel=3)
    return "bnb"
