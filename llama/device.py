"""Which device and engine a model works with."""

import warnings

import torch


def pick_device(device: str | torch.device | None, use_int8: bool) -> torch.device:
    """CUDA if there is any, unless told otherwise; ValueError or ImportError if it cannot work."""
    try:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        target = torch.device(automatic if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r:.60}, expected cuda, cuda:1 or cpu") from None
    if target.type not in ("cuda", "cpu") or str(target) == f"cpu:{target.index}":
        raise ValueError(f"device is {target}, expected cuda, cuda:1 or cpu")
    if target.type == "cpu":
        return target
    if not torch.cuda.is_available():
        raise ValueError(
            f"device is {target}, but torch {torch.__version__} sees no CUDA GPU: install a CUDA "
            "build of torch and the driver, or pass --device=cpu"
        )
    if (target.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"device is {target}, expected one of cuda:0 to cuda:{count - 1}: those are all that "
            "torch sees"
        )
    from bitsandbytes.cextension import lib

    if use_int8 and getattr(lib, "compiled_with_cuda", False) is not True:
        raise ImportError(
            f"bitsandbytes has no library for CUDA {torch.version.cuda}: reinstall it (pip install "
            "-r requirements.txt), see python -m bitsandbytes, or pass --use_int8=False"
        )
    return target


def pick_engine(device: torch.device, head_dim: int) -> str:
    """The engine triton where our kernels run; elsewhere bnb, and a warning says why."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        reason = f"{device} has compute capability {major}.{minor}, our kernels need 8.0"
    elif head_dim < 16 or head_dim & (head_dim - 1):
        reason = f"attention heads are {head_dim} wide, our kernels need a power of 2, at least 16"
    else:
        return "triton"
    warnings.warn(f"{reason}: bitsandbytes multiplies instead, slower", stacklevel=3)
    return "bnb"
