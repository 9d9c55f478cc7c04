"""The one file that speaks to the accelerator: which device, which backend, how much memory.

Everything goes through `torch.accelerator`, so CUDA, Ascend NPU and CPU are one case. Knows nothing of ranks beyond
the local index that picks a device.
"""

from __future__ import annotations

import ctypes
import os
import resource

import torch
import torch.distributed as dist

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def choose_device(local_rank: int) -> torch.device:
    """The accelerator with this local index, made current, or the CPU where there is none."""
    if not torch.accelerator.is_available():
        _keep_freed_memory()
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise ValueError(
            f"parallel: local rank {local_rank} needs a device of its own, this machine has {count}; "
            f"start at most {count} processes here (--nproc {count})"
        )
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "torch.accelerator is available but names no device"
    device = torch.device(accelerator.type, local_rank)
    torch.accelerator.set_device_index(local_rank)
    return device


def _keep_freed_memory() -> None:
    """Have glibc keep what tensors on the CPU free, instead of handing it to the system and asking for it anew.

    A step allocates gigabytes in pieces of megabytes; the page faults of fresh ones cost up to a tenth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def backend_of(device: torch.device) -> str:
    """Name of the process-group backend: gloo for host tensors and, on accelerators, the device's own beside it."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def synchronize(device: torch.device) -> None:
    """Wait for the device. For timing and the end of a run, never inside a step."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes held so far: by the device's allocator, or, on CPU, resident in this process."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


def total_memory_bytes(device: torch.device) -> int:
    """Memory of the device, or, on CPU, of this machine."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.accelerator.get_memory_info(device)[1]
