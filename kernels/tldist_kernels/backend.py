"""Which implementation of an op runs: its Triton kernel or its plain torch reference; and on how many threads."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]
"""`auto`: Triton for CUDA tensors where Triton is installed, torch otherwise. `triton` on CPU tensors needs
TRITON_INTERPRET=1 in the environment before the kernels are first imported: Triton reads it at decoration."""

HAS_TRITON: bool = importlib.util.find_spec("triton") is not None


def use_triton(tensor: torch.Tensor, backend: Backend) -> bool:
    """Whether `tensor`'s op runs as a Triton kernel. ValueError where that is asked for without Triton."""
    if backend == "auto":
        return HAS_TRITON and tensor.is_cuda
    if backend == "triton" and not HAS_TRITON:
        raise ValueError('backend="triton" needs the triton package; install it or pass backend="torch"')
    return backend == "triton"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch's CPU operations called by this thread run on it alone, inside; also a decorator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
