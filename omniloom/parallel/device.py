"""The one file that speaks to the accelerator: which device, which backend, how much memory.

Everything goes through `torch.accelerator`, so CUDA, Ascend NPU and CPU are one case. Knows nothing of ranks beyond
the local index that picks a device.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# Segments that grow: packs differ in their media, whose sizes would leave gaps that nothing else fits into. By device
# the variable that is set, and another that sets the same; torch_npu refuses both at once.
GROWING_SEGMENTS = "expandable_segments:True"
ALLOCATOR_SETTINGS = {
    "cuda": ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    "npu": ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
}
# What vendors' libraries read once, before their first product or collective, to add up in a fixed order.
FIXED_ORDER = {"cuda": ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), "npu": ("HCCL_DETERMINISTIC", "true")}


def choose_device(local_rank: int) -> torch.device:
    """The accelerator with this local index, made current, or the CPU where there is none.

    Its allocator is set up by `ALLOCATOR_SETTINGS`, unless the environment says otherwise.
    """
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
    names = ALLOCATOR_SETTINGS.get(accelerator.type, ())
    if names and not any(name in os.environ for name in names):
        os.environ[names[0]] = GROWING_SEGMENTS  # read when the device is first used
    torch.accelerator.set_device_index(local_rank)
    torch.backends.cudnn.allow_tf32 = False  # 10 bits of mantissa in convolutions of float32; products have all 23
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


@contextmanager
def only_deterministic(device: torch.device) -> Iterator[None]:
    """Inside, operations give the same bits each time, or raise where they cannot. Enter before anything is computed.

    Flash attention's backward asks PyTorch for this setting and then adds up in a fixed order.
    """
    if device.type in FIXED_ORDER:
        os.environ.setdefault(*FIXED_ORDER[device.type])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def collect_on_call(generation: int = 1) -> Iterator[Callable[[], None]]:
    """Inside, Python's garbage is collected when what this yields is called, and at no other time.

    All ranks then pause in the same step; left to itself each rank pauses in another one, and all others wait for it.
    """
    gc.collect()
    gc.freeze()  # what was imported and built stays: to look through it again takes a tenth of a second
    gc.disable()
    try:
        yield lambda: (gc.collect(generation), None)[1]
    finally:
        gc.enable()
        gc.unfreeze()


class HostCopies:
    """Copies between the device and host memory on a queue of their own, beside what computes. On CPU plain copies.

    Device memory is held here until computing has waited for its copy (`turn`), and goes back to what computes then.
    `Tensor.record_stream` would have the allocator find out by itself, when the host asks it for memory, which runs far
    ahead of the device: nothing would be free, and as much be taken as if nothing were moved.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pins = device, device.type != "cpu"
        module: Any = torch.get_device_module(device)
        self._module: Any = module if self.pins else None
        self._queue: Any = module.Stream() if self.pins else None
        self._held: dict[int, Tensor] = {}  # by id, since the last turn
        self._before: tuple[dict[int, Tensor], Any] = ({}, None)  # in the turn before, and when its copies are over

    def put(self, tensor: Tensor, host: Tensor) -> None:
        """Copy a tensor, once it is computed, to (pinned) host memory."""
        if self._module is None:
            host.copy_(tensor)
        else:
            self._copy(tensor, host, tensor)

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy to the device, behind all that was put; what is there already comes as it is. For `wait`."""
        if self._module is None:
            return host.clone(), None
        if not host.is_cpu:
            return host, None
        tensor = torch.empty_like(host, device=self.device)
        self._copy(host, tensor, tensor)
        return tensor, self._queue.record_event()

    def wait(self, fetched: tuple[Tensor, Any]) -> Tensor:
        """The tensor for computing, which waits for the copy; the host does not."""
        tensor, arrived = fetched
        if arrived is not None:
            self._module.current_stream().wait_event(arrived)
            for held in (self._held, self._before[0]):
                held.pop(id(tensor), None)
        return tensor

    def turn(self) -> None:
        """Have computing wait for all copies that were begun before the last turn, and let go of what they copied."""
        if self._module is None:
            return
        if self._before[1] is not None:
            self._module.current_stream().wait_event(self._before[1])
        self._held, self._before = {}, (self._held, self._queue.record_event())

    def settle(self) -> None:
        """`turn` of all copies begun so far."""
        self.turn()
        self.turn()

    def _copy(self, source: Tensor, target: Tensor, on_device: Tensor) -> None:
        self._queue.wait_stream(self._module.current_stream())
        with self._module.stream(self._queue):
            target.copy_(source, non_blocking=True)
        self._held[id(on_device)] = on_device


def widest_float(device: torch.device) -> torch.dtype:
    """In which sums over packs and ranks are kept: NPUs and their collectives have no float64."""
    return torch.float32 if device.type == "npu" else torch.float64


def synchronize(device: torch.device) -> None:
    """Wait for the device. For timing and the end of a run, never inside a step."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes held so far: by the device's allocator, or, on CPU, resident in this process."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.get_device_module(device).max_memory_allocated(device))


def total_memory_bytes(device: torch.device) -> int:
    """Memory of the device, or, on CPU, of this machine."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(torch.get_device_module(device).mem_get_info(device)[1])


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has products of bf16; one without puts them together, ten times slower than float32's."""
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    if device.type == "cuda":
        return bool(torch.get_device_module(device).get_device_capability(device) >= (8, 0))
    return True


def waits_for_grouped_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped GEMM reads the sizes of groups on the host. Source: PyTorch, _grouped_mm's fallback on CUDA."""
    if device.type != "cuda" or not torch.accelerator.is_available():
        return False
    major, _ = torch.get_device_module(device).get_device_capability(device)
    return dtype != torch.bfloat16 or major not in (9, 10)


def use_in_thread(device: torch.device) -> None:
    """Make the device this thread's own: a new one's is the first of the machine, on which it would claim memory."""
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
