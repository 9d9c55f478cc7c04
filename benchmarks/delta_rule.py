"""What the gated delta rule costs per token by length, and how far it is from float64; beside transformers' function.

    python benchmarks/delta_rule.py [--lengths 4096 16384 65536 262144] [--heads 2] [--dim 64]

Forward and backward, float32, one thread's own time on the CPU, the best of `--rounds`, the contenders in turn.
transformers' function takes one sample, and is left out above `--theirs-to` tokens, since all its chunks are in memory
at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from omniloom.ops.delta_rule import gated_delta_rule
from omniloom.types import Segments


def random_inputs(num_tokens: int, heads: int, dim: int) -> list[Tensor]:
    """q, k, v, decay and beta."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(num_tokens, heads, dim, generator=generator) for _ in range(3))
    decay, beta = (torch.rand(num_tokens, heads, generator=generator) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v, -0.3 * decay, beta)]


def ours(inputs: list[Tensor], segments: Segments) -> Tensor:
    return gated_delta_rule(*inputs, segments)


def theirs(inputs: list[Tensor], segments: Segments) -> Tensor:
    q, k, v, decay, beta = (x[None] for x in inputs)
    out: Tensor = torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0][0]
    return out


def seconds(rule: Callable[[list[Tensor], Segments], Tensor], inputs: list[Tensor], segments: Segments) -> float:
    start = time.process_time()
    torch.autograd.grad(rule(inputs, segments).sum(), inputs)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536, 262144])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--theirs-to", type=int, default=16384)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| tokens | microseconds per token | transformers' | error of the output | transformers' |")
    print("|---|---|---|---|---|")
    for length in options.lengths:
        inputs, segments = random_inputs(length, options.heads, options.dim), Segments.from_lengths([length])
        contenders = [ours, theirs] if length <= options.theirs_to else [ours]
        best = dict.fromkeys(contenders, float("inf"))
        for _ in range(options.rounds):
            for rule in contenders:
                best[rule] = min(best[rule], seconds(rule, inputs, segments))
        with torch.no_grad():
            exact = gated_delta_rule(*(x.double() for x in inputs), segments)
            errors = [float((rule(inputs, segments) - exact).abs().max() / exact.abs().max()) for rule in contenders]
        times = [f"{1e6 * best[rule] / length:.2f}" for rule in contenders]
        cells = [times[0], times[1] if times[1:] else "", f"{errors[0]:.1e}", f"{errors[1]:.1e}" if errors[1:] else ""]
        print(f"| {length} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
