"""Whether an error means that memory ran out: PyTorch has no class for it but that of CUDA."""

import errno

import torch
from safetensors import SafetensorError

__all__ = ["is_out_of_memory"]

# Of a processor (Linux, macOS; Windows), of MPS and of a CUDA call outside the allocator, of cuBLAS and cuDNN.
OUT_OF_MEMORY_SIGNS = ("allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | SafetensorError) and any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)
