"""The gated delta rule within the segments of a packed sequence, and the short convolution before it.

A recurrence in place of attention: each head keeps a state, a matrix from keys to values, which forgets by a factor of
its own at every token and is corrected towards the token's value. State and convolution begin anew at each segment, by
`cu_seqlens` alone: nothing is read on the host, and empty segments change nothing. Who owns heads or tokens is not
known here.

`gated_delta_rule_reference` goes token by token and is there to be read. `gated_delta_rule` takes 64 tokens at a time
through matrix products; of what lies between, only the states at the start of every 16 such chunks are kept, and
backward makes the rest again. Both are opaque custom ops, as attention is.
Sources: Yang et al. 2024 (arXiv 2412.06464), equation 10 and section 3.3; Yang et al. 2024 (arXiv 2406.06484) for the
chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.types import RuleKernel, Segments

CHUNK = 64  # tokens whose corrections are found by one triangular system
GROUP = 16 * CHUNK  # tokens whose intermediates are in memory at a time, and between two kept states
NORM_EPS = 1e-6  # under the square root of the length of queries and keys; transformers and FLA have it fixed


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    segments: Segments,
    *,
    kernel: RuleKernel = "chunked",
) -> Tensor:
    """The outputs of each segment's recurrence.

    Args:
        q, k: [T, Hk, Dk], brought to length 1 here; queries are then divided by the root of Dk.
        v: [T, Hv, Dv], Hv a multiple of Hk, whose heads each serve neighbouring ones of v.
        decay: float32 [T, Hv], the log of what the state keeps, at most 0.
        beta: [T, Hv], the share of the way to a token's value that the state goes.
        segments: bounds over T; rows past the last bound are not allowed.
        kernel: what is here, or flash-linear-attention's, which has a precision of its own.

    Returns: [T, Hv, Dv]. What is here computes in float32 at least.
    """
    if kernel == "fla":
        repeats = v.shape[1] // k.shape[1]
        q, k = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (q, k))
        out: Tensor = open_fla()(
            *(x[None] for x in (q, k, v)),
            g=decay[None],
            beta=beta[None],
            cu_seqlens=segments.cu_seqlens.long(),
            use_qk_l2norm_in_kernel=True,
        )[0]
        return out[0]
    return _DeltaRule.apply(q, k, v, decay, beta, segments.cu_seqlens)


def open_fla() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """flash-linear-attention's function of the rule. Raises: ValueError where it is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise ValueError(
            f"model.attention.delta_rule: fla is flash-linear-attention, which cannot be imported here ({error}); "
            "install it, or use chunked"
        ) from error
    rule: Callable[..., tuple[Tensor, Tensor | None]] = chunk_gated_delta_rule
    return rule


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, segments: Segments
) -> Tensor:
    """What `gated_delta_rule` computes, token by token."""
    dtype, repeats = torch.promote_types(v.dtype, torch.float32), v.shape[1] // k.shape[1]
    q, k = (_unit(x.to(dtype))[0].repeat_interleave(repeats, dim=1) for x in (q, k))
    q, values = q * q.shape[-1] ** -0.5, v.to(dtype)
    rows, starts = [], set(segments.cu_seqlens.tolist())
    state = values.new_zeros(v.shape[1], k.shape[-1], v.shape[-1])
    for row in range(v.shape[0]):
        state = state * (float(row not in starts) * decay[row].exp()[:, None, None])
        missing = values[row] - torch.einsum("hkv,hk->hv", state, k[row])
        state = state + torch.einsum("hk,hv->hkv", k[row], beta[row][:, None] * missing)
        rows.append(torch.einsum("hkv,hk->hv", state, q[row]))
    return torch.stack(rows).to(v.dtype)


def causal_convolution(x: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """silu of each channel's weighted sum over a token and the ones before it in its segment.

    x [T, C], weight [C, K], whose last column is that of the token itself -> [T, C]. Accumulates in float32.
    """
    return _Convolution.apply(x, weight, segments.cu_seqlens)


def causal_convolution_reference(x: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """What `causal_convolution` computes, each segment by itself."""
    parts = []
    for rows in x.split(segments.cu_seqlens.diff().tolist()):
        padded = F.pad(rows.T, (weight.shape[1] - 1, 0))
        parts.append(F.conv1d(padded[None], weight[:, None], groups=x.shape[1])[0].T)
    return F.silu(torch.cat(parts))


# ---------------------------------------------------------------------------------------- the rule, by chunks


class _Group(NamedTuple):
    """Some chunks, [n, H, C, ...], in the dtype in which they are computed."""

    q: Tensor  # [n, H, C, Dk], of length Dk^-1/2
    k: Tensor  # [n, H, C, Dk], of length 1
    v: Tensor  # [n, H, C, Dv]
    beta: Tensor  # [n, H, C, 1]
    within: Tensor  # [n, 1, C, C]: 1 where a row's segment holds the column's and the column is not later
    between: Tensor  # [n, H, C, C]: what is left at a row of what the column's token wrote
    reads: Tensor  # [n, H, C, 1]: what is left at a row of the state at the chunk's start, 0 in a new segment
    writes: Tensor  # [n, H, C, 1]: what is left at the chunk's end of what a row wrote, 0 in an ended segment
    keeps: Tensor  # [n, H, 1, 1]: what is left at the chunk's end of the state at its start


class _Solved(NamedTuple):
    """What chunks know of themselves, before the states between them."""

    similar: Tensor  # [n, H, C, C]: products of keys
    system: Tensor  # [n, H, C, C]: unit lower triangular but for its diagonal, which nobody reads
    values: Tensor  # [n, H, C, Dv]: what tokens would write if the state were empty
    removed: Tensor  # [n, H, C, Dk]: times the state, what they write less because of it


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and by what they were multiplied."""
    scale = torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + NORM_EPS)
    return x * scale, scale


def _chunked(x: Tensor, rows: slice, dtype: torch.dtype, repeats: int = 1) -> Tensor:
    """[T, H, D] -> [n, H x repeats, C, D] of these rows, zeros where the last chunk has none."""
    part = x[rows].to(dtype)
    part = F.pad(part, (0, 0, 0, 0, 0, -part.shape[0] % CHUNK)).unflatten(0, (-1, CHUNK)).transpose(1, 2)
    return part.repeat_interleave(repeats, dim=1) if repeats > 1 else part.contiguous()


def _unchunked(x: Tensor, like: Tensor, rows: slice) -> Tensor:
    """[n, H x repeats, C, D] -> rows of `like` [T, H, D], summed over repeats."""
    x = x.unflatten(1, (like.shape[1], -1)).sum(dim=2)
    return x.transpose(1, 2).flatten(0, 1)[: like[rows].shape[0]]


def _gather(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor, rows: slice
) -> tuple[_Group, Tensor, Tensor]:
    """A group of chunks, and by what queries and keys were multiplied."""
    dtype, repeats = torch.promote_types(v.dtype, torch.float32), v.shape[1] // k.shape[1]
    queries, q_scale = _unit(_chunked(q, rows, dtype, repeats))
    keys, k_scale = _unit(_chunked(k, rows, dtype, repeats))
    root = q.shape[-1] ** -0.5
    values = _chunked(v, rows, dtype)
    places = torch.arange(rows.start, rows.start + values.shape[0] * CHUNK, device=v.device)
    segment = torch.searchsorted(cu_seqlens, places, right=True).view(-1, CHUNK)  # [n, C], counted from 1
    before = torch.searchsorted(cu_seqlens, places[::CHUNK] - 1, right=True)  # 0 before the first row
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    within = ((segment[:, :, None] == segment[:, None, :]) & lower)[:, None]  # [n, 1, C, C]
    # summed up in each segment by itself: another one's decay does not even round this one's
    total = within.to(dtype) @ _chunked(decay[:, :, None], rows, dtype)  # [n, H, C, 1]
    between = (total - total.mT).masked_fill(~within, -torch.inf).exp()
    goes_on = (segment == before[:, None])[:, None, :, None]  # [n, 1, C, 1]
    reads = total.masked_fill(~goes_on, -torch.inf).exp()
    group = _Group(
        q=queries * root,
        k=keys,
        v=values,
        beta=_chunked(beta[:, :, None], rows, dtype),
        within=within.to(dtype),
        between=between,
        reads=reads,
        writes=between[:, :, -1, :, None],
        keeps=reads[:, :, -1:],
    )
    return group, q_scale * root, k_scale


def _solve(group: _Group) -> _Solved:
    """The corrections within a chunk depend on one another: each reads what the ones before it wrote."""
    similar = group.k @ group.k.mT
    system = similar * group.between * group.beta
    right = torch.cat((group.v, group.k * group.reads), dim=-1) * group.beta
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, removed = solved.split((group.v.shape[-1], group.k.shape[-1]), dim=-1)
    return _Solved(similar, system, values.contiguous(), removed.contiguous())


def _scan(group: _Group, solved: _Solved, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What tokens write [n, H, C, Dv], the states before each chunk [n, H, Dk, Dv] and the one after the last."""
    writing = (group.k * group.writes).mT
    written, states = torch.empty_like(solved.values), state.new_empty(len(group.k), *state.shape)
    for chunk in range(len(group.k)):
        states[chunk] = state
        torch.baddbmm(solved.values[chunk], solved.removed[chunk], state, alpha=-1, out=written[chunk])
        state = torch.baddbmm(group.keeps[chunk] * state, writing[chunk], written[chunk])
    return written, states, state


@torch.library.custom_op("omniloom::linear_attention", mutates_args=())
def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H, Dv] and the states before each group of chunks [G, H, Dk, Dv]."""
    out, kept = torch.empty_like(v, memory_format=torch.contiguous_format), []
    state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2], dtype=torch.promote_types(v.dtype, torch.float32))
    for start in range(0, v.shape[0], GROUP):
        rows = slice(start, start + GROUP)
        kept.append(state)
        group, *_ = _gather(q, k, v, decay, beta, cu_seqlens, rows)
        written, states, state = _scan(group, _solve(group), state)
        read = (group.q * group.reads) @ states
        out[rows] = _unchunked(read + (group.q @ group.k.mT * group.between) @ written, v, rows)
    return out, torch.stack(kept)


@torch.library.custom_op("omniloom::linear_attention_backward", mutates_args=())
def _linear_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (q, k, v, decay, beta)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    state_grad = torch.zeros_like(kept[0])  # of the state after the group
    for number in reversed(range(len(kept))):
        rows = slice(number * GROUP, (number + 1) * GROUP)
        group, q_scale, k_scale = _gather(*inputs, cu_seqlens, rows)
        out_grad = _chunked(grad, rows, group.v.dtype)
        *parts, state_grad = _group_backward(group, kept[number], out_grad, state_grad)
        # back through the lengths: what would only change them is left out
        parts[0] = q_scale * (parts[0] - group.q * (group.q * parts[0]).sum(dim=-1, keepdim=True) * q.shape[-1])
        parts[1] = k_scale * (parts[1] - group.k * (group.k * parts[1]).sum(dim=-1, keepdim=True))
        for whole, part in zip(grads, parts, strict=True):
            whole[rows] = _unchunked(part, whole if whole.ndim == 3 else whole[:, :, None], rows).view(
                whole[rows].shape
            )
    return grads[0], grads[1], grads[2], grads[3], grads[4]


def _group_backward(
    group: _Group, state: Tensor, out_grad: Tensor, state_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [n, H, C, D], of decay and beta [n, H, C, 1], and of the state before the group.

    With A the system, S the state before a chunk, e the reads, f the writes, w what it keeps, and D between:
    (1 + A) written = beta (v - e k S), out = e q S + (q k^T D) written, S after = w S + (f k)^T written.
    """
    solved = _solve(group)
    written, states, _ = _scan(group, solved, state)
    seen = group.q @ group.k.mT
    from_out = (seen * group.between).mT @ out_grad
    to_state = (group.q * group.reads).mT @ out_grad
    writing = group.k * group.writes
    written_grad, after = torch.empty_like(written), torch.empty_like(states)  # after: of the state after each chunk
    for chunk in reversed(range(len(group.k))):
        after[chunk] = state_grad
        torch.baddbmm(from_out[chunk], writing[chunk], state_grad, out=written_grad[chunk])
        state_grad = torch.baddbmm(
            group.keeps[chunk] * state_grad + to_state[chunk], solved.removed[chunk].mT, written_grad[chunk], alpha=-1
        )
    right_grad = torch.linalg.solve_triangular(solved.system.mT, written_grad, upper=True, unitriangular=True)
    recalled = group.k @ states  # what the state has for each key
    v_grad = group.beta * right_grad
    beta_grad = (right_grad * (group.v - group.reads * recalled)).sum(dim=-1, keepdim=True)
    reads_grad = (out_grad * (group.q @ states) - v_grad * recalled).sum(dim=-1, keepdim=True)
    q_grad = group.reads * (out_grad @ states.mT)
    writing_grad = written @ after.mT
    k_grad = group.writes * writing_grad - group.reads * (v_grad @ states.mT)
    # pairs of tokens: by the system, without its diagonal, and by the output
    system_grad = (right_grad @ written.mT).neg_().tril_(-1).mul_(group.between)
    beta_grad += (system_grad * solved.similar).sum(dim=-1, keepdim=True)
    system_grad *= group.beta
    seen_grad = (out_grad @ written.mT).mul_(group.between)
    k_grad += system_grad @ group.k + system_grad.mT @ group.k + seen_grad.mT @ group.q
    q_grad += seen_grad @ group.k
    pairs = system_grad.mul_(solved.similar).add_(seen_grad.mul_(seen))
    keeps_grad = (states * after).sum(dim=(-2, -1))[..., None, None]
    decay_grad = _decay_gradient(group, pairs, reads_grad, writing_grad, keeps_grad)
    return q_grad, k_grad, v_grad, decay_grad, beta_grad, state_grad


def _decay_gradient(
    group: _Group, pairs: Tensor, reads_grad: Tensor, writing_grad: Tensor, keeps_grad: Tensor
) -> Tensor:
    """Of the decay: each total is in the exponent of what its row reads, and against it in that of what it wrote."""
    total_grad = (pairs.sum(dim=-1) - pairs.sum(dim=-2))[..., None] + reads_grad * group.reads
    of_writes = (group.k * writing_grad).sum(dim=-1, keepdim=True) * group.writes
    total_grad -= of_writes
    total_grad[:, :, -1:] += of_writes.sum(dim=-2, keepdim=True) + keeps_grad * group.keeps
    return group.within.mT @ total_grad


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor) -> Tensor:
        out, kept = _linear_attention(q, k, v, decay, beta, cu_seqlens)
        ctx.save_for_backward(q, k, v, decay, beta, cu_seqlens, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_linear_attention_backward(grad, *ctx.saved_tensors), None


@_linear_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    dtype, shape = torch.promote_types(v.dtype, torch.float32), (v.shape[1], k.shape[2], v.shape[2])
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    return out, v.new_empty(-(-v.shape[0] // GROUP), *shape, dtype=dtype)


@_linear_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, ddecay, dbeta = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, decay, beta)
    )
    return dq, dk, dv, ddecay, dbeta


# ---------------------------------------------------------------------------------------- the convolution


def _weighted_sums(x: Tensor, weight: Tensor, age: Tensor) -> Tensor:
    """What goes into the activation; age [T, 1] is a token's place in its segment."""
    total = x.float() * weight[:, -1].float()
    for back in range(1, min(weight.shape[1], x.shape[0])):
        earlier = x[:-back].masked_fill(age[back:] < back, 0.0)
        total[back:].addcmul_(earlier.float(), weight[:, -1 - back].float())
    return total


def _ages(num_rows: int, cu_seqlens: Tensor) -> Tensor:
    places = torch.arange(num_rows, device=cu_seqlens.device)
    return (places - cu_seqlens[torch.searchsorted(cu_seqlens, places, right=True) - 1])[:, None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, cu_seqlens)
        return F.silu(_weighted_sums(x, weight, _ages(x.shape[0], cu_seqlens))).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, cu_seqlens = ctx.saved_tensors
        age = _ages(x.shape[0], cu_seqlens)
        grad = torch.ops.aten.silu_backward(grad.float(), _weighted_sums(x, weight, age))
        x_grad = grad * weight[:, -1].float()
        weight_grads = [(grad * x).sum(dim=0)]
        for back in range(1, weight.shape[1]):
            later = grad[back:].masked_fill(age[back:] < back, 0.0)
            x_grad[: len(later)].addcmul_(later, weight[:, -1 - back].float())
            weight_grads.insert(0, (later * x[: len(later)]).sum(dim=0))
        return x_grad.to(x.dtype), torch.stack(weight_grads, dim=1).to(weight.dtype), None
