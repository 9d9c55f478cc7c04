"""A device that computes nothing, in the place of an accelerator, and a record of what was asked of it.

Tensors on the device are fake: they have shapes, dtypes and strides and no values. What concerns the host alone runs
for real, so that loading, planning and routing give their real results. Process groups are PyTorch's fake ones: one
process stands for one rank of a job of any size. Two kinds of device can be had:

- `fake`: PyTorch's slot for devices of others (PrivateUse1), in pure Python;
- `cuda`: the device type `cuda` itself, with a guard that does nothing (`fake_cuda.cpp`, loaded before torch).

`install` holds for the rest of the process, so it runs in processes of its own.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives of fake tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import omniloom
from omniloom.parallel.mesh import Ranks

PACKAGE = f"{next(iter(omniloom.__path__))}/"
WHOLE = ("aten::silu_backward", "aten::_fused_rms_norm")
GATHERS = {"_allgather_base_", "all_gather_into_tensor"}
EXCHANGES = {"alltoall_base_", "alltoall_", "all_to_all_single", "all_to_all_rows", "all_to_all_rows_back"}


class Queue:
    """A stream or an event of a device that is never busy."""

    device_index, stream_id, device_type, priority = 0, 0, 1, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, _: str) -> Callable[..., Queue]:
        return lambda *_, **__: self

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class Backend(_DummyBackendModule):
    """What PyTorch asks of `torch.<device type>`."""

    Stream = Event = Queue

    def current_stream(self, *_: Any) -> Queue:
        return Queue()

    def stream(self, _: Queue) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def device_count(self) -> int:
        return 8

    def set_device(self, _: Any) -> None: ...

    def synchronize(self, *_: Any) -> None: ...

    def max_memory_allocated(self, *_: Any) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install(kind: str) -> torch.device:
    """Take the place of an accelerator in this process, for good."""
    torch.Tensor.record_stream = lambda self, stream: None
    torch.accelerator.current_stream = lambda *_: Queue()
    ShardingPropagator._fake_mode_lock = _Planning()
    FakeTensor.tolist = _read_list
    if kind == "fake":
        _setup_privateuseone_for_python_backend("fake", backend_module=Backend())
        # one kernel each on CUDA, and taken apart before anybody sees them where a device has none
        for operator in WHOLE:
            torch.library.impl(operator, "PrivateUse1", lambda *_: None)
    else:
        for name in (
            "current_stream",
            "stream",
            "device_count",
            "set_device",
            "synchronize",
            "is_available",
            "max_memory_allocated",
        ):
            setattr(torch.cuda, name, getattr(Backend(), name))
        torch.cuda.Stream = torch.cuda.Event = Queue
        torch.cuda.current_device, torch.cuda._lazy_init = lambda: 0, lambda: None
    return torch.device(kind, 0)


@contextlib.contextmanager
def one_of(world_size: int, rank: int, device: torch.device) -> Iterator[Ranks]:
    """This process as one rank of a job, the others being imagined."""
    made, store = dist.new_group, FakeStore()

    def new_group(*given: Any, backend: str | None = None, **named: Any) -> Any:
        return made(*given, backend="fake", **named)  # gloo would look for the others

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=store)
    dist.new_group = dist.distributed_c10d.new_group = new_group
    dist.ProcessGroup.set_timeout = lambda *_: None  # of which the fake backend knows nothing
    try:
        yield Ranks(rank=rank, world_size=world_size, local_rank=0, device=device, store=store)
    finally:
        dist.new_group = dist.distributed_c10d.new_group = made
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that concerns more than the device: `gather`, `exchange`, `wait` (of the host), `copy` (to it) or
    `offload` (from it to pinned memory, without a wait)."""

    kind: str
    where: str  # the function of the package that asked, or, of an FSDP gather, the modules it is for
    phase: str
    pack: int
    pinned: bool = True  # of a copy: whether from memory that lets the host go on


@dataclass(kw_only=True)
class Record(TorchDispatchMode):
    """Runs host operations for real, hands the rest to `FakeTensorMode` below it, and keeps what is worth knowing.

    `rows` is what every read of integer counts adds up to, spread evenly: what routing would tell the host.
    `on_op` is called with the record, each operation on the device, its arguments and result. `phase` and `pack` say
    where in the step the record is.
    """

    device: torch.device
    rows: int = 0
    on_op: Callable[[Record, Any, tuple, dict, Any], None] | None = None
    phase: str = ""
    pack: int = -1
    events: list[Event] = field(default_factory=list)
    plans: bool = False  # DTensor tries an operation on tensors of global shapes, which no device will see

    def __post_init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: set[int] = set()
        self._kept: list[Tensor] = []  # so that no storage's address is given to another

    def __enter__(self) -> Record:
        global _current
        self._fake.__enter__()
        _current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """So that Dynamo compiles under it; what a compiled graph computes comes here as from any other code."""
        return True

    def count(self, kind: str) -> Counter[str]:
        """How often something of a kind happened, by where."""
        return Counter(event.where for event in self.events if event.kind == kind)

    def note(self, kind: str, where: str, *, pinned: bool = True) -> None:
        self.events.append(Event(kind=kind, where=where, phase=self.phase, pack=self.pack, pinned=pinned))

    def __torch_dispatch__(self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if name == "device" or self.plans:
            return func(*args, **kwargs)
        if any(issubclass(kind, Tensor) and kind.__name__ in ("DTensor", "AsyncCollectiveTensor") for kind in types):
            return NotImplemented  # they come back as the tensors they are made of
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        wanted = kwargs.get("device")
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        pins = name in ("is_pinned", "_pin_memory")  # these name the device for which memory is pinned
        if not on_device and (pins or wanted is None or torch.device(wanted).type in ("cpu", "meta")):
            with unset_fake_temporarily():
                return self._on_host(name, func, tensors, args, kwargs)
        if name == "_local_scalar_dense":
            self.note("wait", _asker())
            return False if tensors[0].dtype == torch.bool else self.rows
        pins = kwargs.pop("pin_memory", False)  # of host memory for something like what is on the device
        given = (args, kwargs) if on_device else tree_map_only(Tensor, self._fake.from_tensor, (args, kwargs))
        out = func(*given[0], **given[1])
        if pins:
            self._pin(out)
        self._observe(name, func, tensors, args, kwargs, out)
        return out

    def _on_host(self, name: str, func: Any, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any:
        if name == "is_pinned":
            return self._is_pinned(tensors[0])
        pins = name == "_pin_memory" or kwargs.pop("pin_memory", False)
        out = tensors[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
        if pins:
            self._pin(out)
        return out

    def _pin(self, host: Tensor) -> None:
        self._pinned.add(host.untyped_storage()._cdata)
        self._kept.append(host)

    def _is_pinned(self, host: Tensor) -> bool:
        return host.untyped_storage()._cdata in self._pinned

    def _observe(self, name: str, func: Any, tensors: list[Tensor], args: tuple, kwargs: dict, out: Any) -> None:
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in GATHERS:
            self.note("gather", _gathered_for())
        elif name == "exchange_sizes":  # one operation: the exchange, and the copy to the host that is waited for
            self.note("wait", _asker())
        elif name in EXCHANGES:
            self.note("exchange", _asker())
        elif name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type == "cpu" and results[0].device.type != "cpu" and source.ndim:
                self.note("copy", _asker(), pinned=self._is_pinned(source))
            elif source.device.type != "cpu" and results[0].device.type == "cpu":
                goes_on = name == "copy_" and self._is_pinned(args[0]) and (*args, kwargs.get("non_blocking", False))[2]
                self.note("offload" if goes_on else "wait", _asker())
        if self.on_op is not None:
            self.on_op(self, func, args, kwargs, out)


_current: Record | None = None  # the one that is entered: `tolist` of a fake tensor has no other way to it


class _Planning:
    """In the place of the lock around DTensor's planning."""

    def __enter__(self) -> None:
        if _current is not None:
            _current.plans = True

    def __exit__(self, *_: Any) -> None:
        if _current is not None:
            _current.plans = False


def _read_list(tensor: FakeTensor) -> list:
    """What `tensor.tolist()` gives: one wait of the host, unless it is there already."""
    assert _current is not None, "a device tensor is read outside of any record"
    if tensor.device.type != "cpu":
        _current.note("wait", _asker())
    shape = list(tensor.shape)
    value: Any = 0.0 if tensor.is_floating_point() else _current.rows // shape[-1]
    for size in reversed(shape):
        value = [value] * size
    return value


def _asker() -> str:
    """The innermost function of the package under way, as `file:function`."""
    frame = sys._getframe(1)
    while frame is not None:
        if (path := frame.f_code.co_filename).startswith(PACKAGE):
            return f"{path.removeprefix(PACKAGE)}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "outside"


def _gathered_for() -> str:
    """The modules whose parameters FSDP gathers right now."""
    frame = sys._getframe(1)
    while frame is not None:
        group = frame.f_locals.get("self")
        if type(group).__name__ == "FSDPParamGroup":
            return group._module_fqn or "several"
        frame = frame.f_back
    return _asker()
