"""What Inductor would launch for a compiled module on the fake device, by its own lowering and scheduling.

Dynamo, AOTAutograd, Inductor's passes, its partitioner, its lowering and its scheduler run as they do for a GPU; only
the code of kernels is neither written nor built, for which Triton would be needed. A compiled module then computes as
the fake device does, and says at each call which kernels it would have launched.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
import torch._inductor.utils
from torch import Tensor
from torch._dynamo.device_interface import DeviceInterface, register_interface_for_device
from torch._inductor import ir
from torch._inductor.codegen.common import (
    DeviceOpOverrides,
    register_backend_for_device,
    register_device_op_overrides,
)
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    _recursive_record_original_output_strides,
    compile_fx,
    fake_tensor_prop,
    view_to_reshape,
)
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import (
    BaseSchedulerNode,
    BaseScheduling,
    ExternKernelSchedulerNode,
    NopKernelSchedulerNode,
    Scheduler,
)
from torch._inductor.virtualized import V
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel: an `operation` as eager PyTorch has it, or one that Triton would build of several."""

    names: str  # of the operations in it
    bytes: int  # read and written, by Inductor's own count
    operation: tuple[Any, tuple[Any, ...], dict[str, Any], Any] | None = None  # with arguments and result

    def at(self, sizes: Mapping[Any, int], rows: int) -> Launch:
        """With numbers for sizes that a graph leaves open; those that it reads from tensors are `rows`."""

        def number(size: int | torch.SymInt) -> int:
            if isinstance(size, int):
                return size
            expression = size.node.expr
            return int(expression.xreplace({symbol: sizes.get(symbol, rows) for symbol in expression.free_symbols}))

        def known(value: Any) -> Any:
            if isinstance(value, Tensor):
                shape, stride = (tuple(map(number, each)) for each in (value.shape, value.stride()))
                return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
            return number(value) if isinstance(value, torch.SymInt) else value

        return replace(self, operation=tree_map(known, self.operation))


class Interface(DeviceInterface):
    """An H200, as far as a scheduler asks."""

    class Worker:
        @staticmethod
        def get_device_properties(_: Any = None) -> Any:
            return SimpleNamespace(
                multi_processor_count=132,
                major=9,
                minor=0,
                regs_per_multiprocessor=65536,
                max_threads_per_multi_processor=2048,
                max_threads_per_block=1024,
                warp_size=32,
            )

    @staticmethod
    def get_compute_capability(_: Any = None) -> int:
        return 90

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 8

    @staticmethod
    def is_available() -> bool:
        return True


class TritonScheduler(Scheduler):
    """Inductor's, without asking whether Triton is installed."""

    def create_backend(self, device: torch.device) -> BaseScheduling:
        return super().create_backend(device) if device.type == "cpu" else TritonScheduling(self)


def install_inductor(device: torch.device) -> None:
    """Have Inductor take the fake device for a GPU whose kernels Triton would build, for the rest of the process."""
    for name in (device.type, str(device)):
        register_interface_for_device(name, Interface)
    register_device_op_overrides(device.type, DeviceOpOverrides())
    register_backend_for_device(device.type, TritonScheduling, PythonWrapperCodegen)
    torch._inductor.utils.GPU_TYPES.append(device.type)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # each number of rows has a graph and figures of its own
    torch._dynamo.config.automatic_dynamic_shapes = False
    # constants would be computed on the device
    torch._inductor.config.joint_graph_constant_folding = False
    getattr(torch, device.type).is_available = lambda: False


def launching(
    module: GraphModule,
    inputs: list[Any],
    *,
    rows: int,
    on_launches: Callable[[Sequence[Launch]], contextlib.AbstractContextManager[None]],
) -> Any:
    """A backend of `torch.compile`: each call of a graph is made within what `on_launches` gives for its kernels.

    `rows`: the size that graphs read from tensors.
    """

    def compile_graph(graph: GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        eager = copy.deepcopy(graph)
        expected = [node.meta["val"] for node in eager.graph.find_nodes(op="placeholder")]
        launches = schedule(graph, inputs, rows, **settings)

        @cache
        def launches_at(sizes: tuple[tuple[Any, int], ...]) -> list[Launch]:
            return [launch.at(dict(sizes), rows) for launch in launches]

        def call(*given: Any) -> Any:
            with on_launches(launches_at(_sizes(expected, given))):
                return eager(*given)

        return call

    return compile_fx(module, inputs, inner_compile=compile_graph)


def _sizes(expected: Sequence[Any], given: Sequence[Any]) -> tuple[tuple[Any, int], ...]:
    """What the symbols of a graph's arguments stand for in a call."""
    pairs: list[tuple[Any, int]] = []
    for value, actual in zip(expected, given, strict=True):
        pairs += zip(value.shape, actual.shape, strict=True) if isinstance(value, Tensor) else [(value, actual)]
    symbolic = ((size.node.expr, number) for size, number in pairs if isinstance(size, torch.SymInt))
    return tuple((size, number) for size, number in symbolic if size.is_symbol)


def schedule(
    graph: GraphModule,
    inputs: Sequence[Any],
    rows: int,
    *,
    is_inference: bool = False,
    is_backward: bool = False,
    **_: Any,
) -> list[Launch]:
    """The kernels of a graph, as `torch._inductor.compile_fx._InProcessFxCompile` comes to them. Changes the graph."""
    with _disable_current_modes(), DebugContext():
        view_to_reshape(graph)
        with torch.no_grad():
            fake_mode = fake_tensor_prop(graph, inputs)
        for node in graph.graph.nodes:
            for symbol in free_unbacked_symbols(node.meta.get("val")):
                fake_mode.shape_env.var_to_hint_override[symbol] = rows
        _recursive_record_original_output_strides(graph)
        with V.set_fake_mode(fake_mode):
            _recursive_post_grad_passes(graph, is_inference=is_inference)
            lowering = GraphLowering(
                graph,
                example_inputs=inputs,
                shape_env=fake_mode.shape_env,
                is_inference=is_inference,
                is_backward=is_backward,
            )
            lowering.freeze_runtime_asserts()
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
                lowering.run(*inputs)
                lowering.init_wrapper_code()
                lowering.scheduler = TritonScheduler(lowering.operations)
                return [launch for node in lowering.scheduler.nodes if (launch := _launch(node)) is not None]


NO_KERNELS = (ir.MultiOutput, ir.DynamicScalar, ir.AssertScalar)


def _launch(node: BaseSchedulerNode) -> Launch | None:
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, NO_KERNELS):
        return None
    if (device := node.get_device()) is not None and device.type == "cpu":
        return None
    num_bytes = node.get_read_write_buffers_sizes()
    # a scatter is an operation of its own, and no longer the one that was asked for
    if not isinstance(node, ExternKernelSchedulerNode) or isinstance(node.node, ir.ScatterFallback):
        origins = itertools.chain.from_iterable(each.node.get_origins() for each in node.get_nodes())
        return Launch(names=" ".join(sorted({_name(origin) for origin in origins})), bytes=num_bytes)
    origin = _operation(node.node)
    args, kwargs = map_arg((origin.args, origin.kwargs), _value)
    operation = origin.target, tuple(args), dict(kwargs), _value(origin)
    return Launch(names=_name(origin), bytes=num_bytes, operation=operation)


def _operation(kernel: ir.ExternKernel) -> Node:
    """What a kernel that is not fused computes."""
    if (origin := kernel.get_origin_node()) is not None:
        return origin
    assert kernel.op_overload is not None, f"no operation is known of {type(kernel)} {kernel}"
    name = kernel.op_overload.overloadpacket.__name__.removesuffix("_")  # it may have become one that works in place
    found = [each for each in kernel.get_origins() if _name(each).removesuffix("_") == name]
    assert len(found) == 1, f"{len(found)} operations are known of {kernel}"
    return found[0]


def _value(node: Node) -> Any:
    return node.meta["val"]


def _name(node: Node) -> str:
    return str(node.target.overloadpacket.__name__)
