"""The gated delta rule within the segments of a packed sequence, and the short convolution before it.

A recurrence in place of attention: each head keeps a state, a matrix from keys to values, which forgets by a factor of
its own at every token and is corrected towards the token's value. State and convolution begin anew at each segment, by
`cu_seqlens` alone: nothing is read on the host, and empty segments change nothing. Who owns heads or tokens is not
known here.

`gated_delta_rule_reference` goes token by token and is there to be read. `gated_delta_rule` takes 32 tokens at a time
through matrix products; of what lies between, only the states at the start of every 32 such chunks are kept, and
backward makes the rest again. Both are opaque custom ops, as attention is.
Sources: Yang et al. 2024 (arXiv 2412.06464), equation 10 and section 3.3; Yang et al. 2024 (arXiv 2406.06484) for the
chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.types import RuleKernel, Segments

CHUNK = 32  # tokens whose corrections are found by one triangular system; 8 times a power of 2
GROUP = 32 * CHUNK  # tokens whose intermediates are in memory at a time, and between two kept states
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
    within: Tensor  # [n, C, C]: 1 where a row's segment holds the column's and the column is not later
    between: Tensor  # [n, H, C, C]: what is left at a row of what the column's token wrote
    earlier: Tensor  # [n, H, C, C]: the same of columns before the row's token
    reads: Tensor  # [n, H, C, 1]: what is left at a row of the state at the chunk's start, 0 in a new segment
    writes: Tensor  # [n, H, C, 1]: what is left at the chunk's end of what a row wrote, 0 in an ended segment
    keeps: Tensor  # [n, H, 1, 1]: what is left at the chunk's end of the state at its start


class _Solved(NamedTuple):
    """What chunks know of themselves, before the states between them."""

    inverse: Tensor  # [n, H, C, C]: of the system by which corrections depend on one another
    values: Tensor  # [n, H, C, Dv]: what tokens would write if the state were empty
    removed: Tensor  # [n, H, C, Dk]: times the state, what they write less because of it


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and by what they were multiplied."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().add(NORM_EPS).rsqrt()
    return x * scale, scale


def _unit_backward(grad: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """The gradient of rows from that of what `_unit` made of them: what would only change their length is left out."""
    return (grad - unit * (unit * grad).sum(dim=-1, keepdim=True)).mul_(scale)


def _chunked(x: Tensor, repeats: int = 1) -> Tensor:
    """Rows [t, H, D] -> [n, H x repeats, C, D], zeros where the last chunk has none."""
    part = F.pad(x, (0, 0, 0, 0, 0, -x.shape[0] % CHUNK)).unflatten(0, (-1, CHUNK)).transpose(1, 2)
    return part.repeat_interleave(repeats, dim=1) if repeats > 1 else part.contiguous()


def _unchunked(x: Tensor, num_rows: int, num_heads: int) -> Tensor:
    """[n, H x repeats, C, D] -> rows [t, H, D], summed over repeats."""
    if x.shape[1] != num_heads:
        x = x.unflatten(1, (num_heads, -1)).sum(dim=2)
    return x.transpose(1, 2).flatten(0, 1)[:num_rows]


def _gather(rows: Sequence[Tensor], cu_seqlens: Tensor, start: int) -> _Group:
    """Chunks of the rows of q, k, v, decay and beta from row `start` on; queries and keys have length 1."""
    q, k, v, decay, beta = rows
    repeats = v.shape[1] // k.shape[1]
    values = _chunked(v)
    places = torch.arange(start, start + values.shape[0] * CHUNK, device=v.device)
    segment = torch.searchsorted(cu_seqlens, places, right=True).view(-1, CHUNK)  # [n, C], counted from 1
    before = torch.searchsorted(cu_seqlens, places[::CHUNK] - 1, right=True)  # 0 before the first row
    within = (segment[:, :, None] == segment[:, None, :]).to(v.dtype).tril_()  # [n, C, C]
    # summed up in each segment by itself: another one's decay does not even round this one's
    total = (within @ _chunked(decay[:, :, None])[..., 0].mT).mT[..., None].contiguous()  # [n, H, C, 1]
    between = (total - total.mT).clamp_(max=0.0).exp_().mul_(within[:, None])  # pairs that do not count may be above 0
    reads = total.exp() * (segment == before[:, None])[:, None, :, None]
    return _Group(
        q=_chunked(q, repeats) * q.shape[-1] ** -0.5,
        k=_chunked(k, repeats),
        v=values,
        beta=_chunked(beta[:, :, None]),
        within=within,
        between=between,
        earlier=between * torch.ones_like(between[0, 0]).tril_(-1),
        reads=reads,
        writes=between[:, :, -1, :, None].contiguous(),
        keeps=reads[:, :, -1:],
    )


def _solve(group: _Group) -> _Solved:
    """The corrections within a chunk depend on one another: each reads what the ones before it wrote."""
    keys = group.k * group.beta
    inverse = _inverse((keys @ group.k.mT).mul_(group.earlier))
    return _Solved(inverse, inverse @ (group.v * group.beta), inverse @ keys.mul_(group.reads))


def _inverse(lower: Tensor) -> Tensor:
    """Of 1 + lower [..., C, C], strictly lower triangular, by products, which batches of small systems are not.

    Squares of blocks of 8 on the diagonal, then [[X, 0], [-Y B X, Y]] of two neighbouring ones and the block B below.
    """
    size = 8
    one = torch.eye(size, dtype=lower.dtype, device=lower.device)
    power = -_diagonal_blocks(lower, size)[0]
    inverse = one + power
    for _ in range(2):  # (1 + N)(1 + N^2)(1 + N^4), and N^8 is 0
        power = power @ power
        inverse = inverse @ (one + power)
    while size < lower.shape[-1]:
        size *= 2
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = (second @ _diagonal_blocks(lower, size)[1]) @ first
        inverse = torch.cat(
            (F.pad(first, (0, size // 2)), torch.cat((corner.neg_(), second), dim=-1)),
            dim=-2,
        )
    return inverse[..., 0, :, :]


def _diagonal_blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of [..., C, C] the blocks of `size` on the diagonal [..., C / size, size, size], and the lower left of each."""
    blocks = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return blocks, blocks[..., size // 2 :, : size // 2]


def _scan(group: _Group, solved: _Solved, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What tokens write [n, H, C, Dv], the states before each chunk [n, H, Dk, Dv] and the one after the last."""
    writing = (group.k * group.writes).mT
    written, states = torch.empty_like(solved.values), state.new_empty(len(group.k) + 1, *state.shape)
    states[0] = state
    for chunk in range(len(group.k)):
        torch.baddbmm(solved.values[chunk], solved.removed[chunk], states[chunk], alpha=-1, out=written[chunk])
        torch.baddbmm(group.keeps[chunk] * states[chunk], writing[chunk], written[chunk], out=states[chunk + 1])
    return written, states[:-1], states[-1].clone()  # whoever keeps the last one keeps no others


def _rows_of(inputs: tuple[Tensor, ...], number: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """A group's rows of q, k, v, decay and beta, of which q and k are brought to length 1, and by what factors."""
    dtype = torch.promote_types(inputs[2].dtype, torch.float32)
    q, k, *others = (x[number * GROUP : (number + 1) * GROUP].to(dtype) for x in inputs)
    (q, q_scale), (k, k_scale) = _unit(q), _unit(k)
    return [q, k, *others], q_scale, k_scale


def rule_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """The output [T, H, Dv] and the states before each group of chunks [G, H, Dk, Dv]."""
    out, kept = torch.empty_like(v, memory_format=torch.contiguous_format), []
    state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2], dtype=torch.promote_types(v.dtype, torch.float32))
    for number, start in enumerate(range(0, v.shape[0], GROUP)):
        kept.append(state)
        rows, *_ = _rows_of((q, k, v, decay, beta), number)
        group = _gather(rows, cu_seqlens, start)
        written, states, state = _scan(group, _solve(group), state)
        result = (group.q * group.reads) @ states
        result += (group.q @ group.k.mT).mul_(group.between) @ written
        out[start : start + GROUP] = _unchunked(result, *rows[2].shape[:2])
    return out, torch.stack(kept)


def rule_by_chunks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay and beta."""
    inputs = (q, k, v, decay, beta)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    state_grad = torch.zeros_like(kept[0])  # of the state after the group
    for number in reversed(range(len(kept))):
        rows, q_scale, k_scale = _rows_of(inputs, number)
        group = _gather(rows, cu_seqlens, number * GROUP)
        out_grad = _chunked(grad[number * GROUP : (number + 1) * GROUP].to(group.v.dtype))
        *parts, state_grad = _group_backward(group, kept[number], out_grad, state_grad)
        own = [_unchunked(part, len(row), row.shape[1]) for part, row in zip(parts, rows, strict=True)]
        own[0] = _unit_backward(own[0], rows[0], q_scale)
        own[1] = _unit_backward(own[1], rows[1], k_scale)
        for whole, part in zip(grads, own, strict=True):
            whole[number * GROUP : (number + 1) * GROUP] = part.view(-1, *whole.shape[1:])
    return grads[0], grads[1], grads[2], grads[3], grads[4]


_linear_attention = torch.library.custom_op("omniloom::linear_attention", rule_by_chunks, mutates_args=())
_linear_attention_backward = torch.library.custom_op(
    "omniloom::linear_attention_backward", rule_by_chunks_backward, mutates_args=()
)


def _group_backward(
    group: _Group, state: Tensor, out_grad: Tensor, state_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q before its root, k, v [n, H, C, D], decay and beta [n, H, C, 1], and the state before the group.

    With A the system, S the state before a chunk, e the reads, f the writes, w what it keeps, and D between:
    (1 + A) written = beta (v - e k S), out = e q S + (q k^T D) written, S after = w S + (f k)^T written.
    Decays enter by exponents that stand beside q or k, so that their gradients are found in those of q and k.
    """
    solved = _solve(group)
    written, states, _ = _scan(group, solved, state)
    from_out = (group.q @ group.k.mT).mul_(group.between).mT @ out_grad
    to_state = (group.q * group.reads).mT @ out_grad
    writing = group.k * group.writes
    written_grad, state_grads = torch.empty_like(written), state.new_empty(len(group.k) + 1, *state.shape)
    state_grads[-1] = state_grad  # those before are of the states before each chunk
    for chunk in reversed(range(len(group.k))):
        torch.baddbmm(from_out[chunk], writing[chunk], state_grads[chunk + 1], out=written_grad[chunk])
        kept = torch.addcmul(to_state[chunk], group.keeps[chunk], state_grads[chunk + 1])
        torch.baddbmm(kept, solved.removed[chunk].mT, written_grad[chunk], alpha=-1, out=state_grads[chunk])
    after = state_grads[1:]
    right_grad = solved.inverse.mT @ written_grad
    system_grad = (right_grad @ written.mT).mul_(group.earlier)  # against its direction, and before beta
    seen_grad = (out_grad @ written.mT).mul_(group.between)
    q_grad = (out_grad @ states.mT).mul_(group.reads).add_(seen_grad @ group.k)
    # what a key reads, by the state and within the chunk, and what it writes
    reading = (right_grad @ states.mT).mul_(group.reads).add_(system_grad @ group.k).neg_()
    to_later = (written @ after.mT).mul_(group.writes)
    of_key = seen_grad.mT @ group.q - system_grad.mT @ (group.k * group.beta) + to_later
    along = (group.k * reading).sum(dim=-1, keepdim=True)
    beta_grad = (right_grad * group.v).sum(dim=-1, keepdim=True) + along
    total_grad = (group.q * q_grad - group.k * of_key).sum(dim=-1, keepdim=True) + group.beta * along
    total_grad[:, :, -1:] += (group.k * to_later).sum(dim=(-2, -1), keepdim=True)
    total_grad[:, :, -1:] += (states * after).sum(dim=(-2, -1), keepdim=True) * group.keeps
    decay_grad = (group.within.mT @ total_grad[..., 0].mT).mT[..., None]
    root = group.q.shape[-1] ** -0.5
    return (
        q_grad.mul_(root),
        of_key.add_(reading.mul_(group.beta)),
        group.beta * right_grad,
        decay_grad,
        beta_grad,
        state_grads[0],
    )


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
    wide, weight = x.float(), weight.float()
    total = wide * weight[:, -1]
    for back in range(1, min(weight.shape[1], x.shape[0])):
        total[back:].addcmul_(wide[:-back] * (age[back:] >= back).float(), weight[:, -1 - back])
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
        age, wide = _ages(x.shape[0], cu_seqlens), x.float()
        grad = torch.ops.aten.silu_backward(grad.float(), _weighted_sums(wide, weight, age))
        x_grad = grad * weight[:, -1].float()
        weight_grads = [(grad * wide).sum(dim=0)]
        for back in range(1, weight.shape[1]):
            later = grad[back:] * (age[back:] >= back).float()
            x_grad[: len(later)].addcmul_(later, weight[:, -1 - back].float())
            weight_grads.insert(0, (later * wide[: len(later)]).sum(dim=0))
        return x_grad.to(x.dtype), torch.stack(weight_grads, dim=1).to(weight.dtype), None
