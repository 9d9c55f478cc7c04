"""Weighted cross entropy of a language-model head, without ever holding all logits.

Gradients are computed in the forward pass, chunk by chunk of tokens, so memory does not grow with tokens times
vocabulary. The head's sharding is not known here: a vocabulary-parallel version replaces this one from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.ops.linear_map import LinearMap, dropped, multiply_wide

LOGIT_BUDGET_BYTES = 2**28  # of float32 logits held at a time
DEVICE_LOGIT_BUDGET_BYTES = 2**31  # on accelerators: every chunk there adds the whole head to its gradient once more

# each row's log of the sum of exponentials and logit of the label, both float32 [n, 1], over parts of the vocabulary
JoinVocabulary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def choose_chunk_tokens(vocab_size: int, device_type: str) -> int:
    """The largest power of two of tokens whose float32 logits stay within the device's budget, at least 1."""
    budget = LOGIT_BUDGET_BYTES if device_type == "cpu" else DEVICE_LOGIT_BUDGET_BYTES
    fitting = max(1, budget // (4 * vocab_size))
    return 1 << (fitting.bit_length() - 1)


def linear_cross_entropy(
    hidden: Tensor,
    head: LinearMap,
    labels: Tensor,
    weights: Tensor,
    *,
    chunk_tokens: int | None = None,
    join_vocabulary: JoinVocabulary | None = None,
) -> Tensor:
    """Sum over tokens of weight x cross entropy of `head(hidden)` against `labels`, a float32 scalar.

    Args:
        hidden: [L, C], float32 or bfloat16. L may be 0: the loss is then 0 and all gradients are zeros.
        head: to [L, V], in the same dtype, without bias or scale; its low and up train too.
        labels: int64 [L], all in 0..V-1 (rows without a label are not passed).
        weights: float32 [L]; no gradient flows to them.
        chunk_tokens: tokens whose logits are held at a time; None chooses by the device's budget.
        join_vocabulary: where `head` is a part of the vocabulary, joins the parts of a row; labels then count from
            the part's first entry, and lie outside of it where another part has them.
    """
    chunk = choose_chunk_tokens(head.weight.shape[0], hidden.device.type) if chunk_tokens is None else chunk_tokens
    low = () if head.low is None else (F.linear(dropped(hidden, head.dropout), head.low), head.up)
    factors = (hidden, head.weight, *low)
    return _LinearCrossEntropy.apply(labels, weights, chunk, join_vocabulary, torch.is_grad_enabled(), *factors)


def linear_cross_entropy_reference(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """What `linear_cross_entropy` computes, with all logits at once."""
    logits = F.linear(hidden, head).float()
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """`factors` are pairs of inputs [L, n] and weights [V, n], whose products add up to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        weights: Tensor,
        chunk_tokens: int,
        join_vocabulary: JoinVocabulary | None,
        with_gradients: bool,
        *factors: Tensor,
    ) -> Tensor:
        inputs, heads = factors[::2], factors[1::2]
        loss = weights.new_zeros((), dtype=torch.float32)
        wanted = [with_gradients and needs for needs in ctx.needs_input_grad[5:]]
        # of weights in float32, since in bfloat16 the sum over many chunks would lose the small ones
        grads = [
            torch.zeros_like(factor, dtype=torch.float32 if place % 2 else None) if wanted[place] else None
            for place, factor in enumerate(factors)
        ]
        for start in range(0, len(labels), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            parts = [each[rows] for each in inputs]
            logits = multiply_wide(parts[0], heads[0].T)
            for part, head in zip(parts[1:], heads[1:], strict=True):
                logits = multiply_wide(part, head.T, logits)
            dtype = parts[0].dtype if any(wanted) else None
            sums, logits_grad = _of_logits(logits, labels[rows, None], weights[rows, None], join_vocabulary, dtype)
            loss += sums
            for part, head, input_grad, head_grad in zip(parts, heads, grads[::2], grads[1::2], strict=True):
                if logits_grad is not None and input_grad is not None:
                    torch.mm(logits_grad, head, out=input_grad[rows])
                if logits_grad is not None and head_grad is not None:
                    multiply_wide(logits_grad.T, part, head_grad)
            del logits, logits_grad  # the next chunk's take their place
        ctx.grads, ctx.dtypes = grads, [factor.dtype for factor in factors]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None,) * 5 + tuple(
            None if grad is None else torch.mul(grad, loss_grad, out=torch.empty_like(grad, dtype=dtype))
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        )


def _of_logits(
    logits: Tensor, label: Tensor, weight: Tensor, join_vocabulary: JoinVocabulary | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The weighted sum of losses, and its gradient to `logits` [n, V] in `dtype`, if any; `logits` are overwritten.

    label int64 [n, 1], weight float32 [n, 1].
    """
    largest, place = logits.max(dim=-1, keepdim=True)
    here = torch.ones_like(label, dtype=torch.bool)
    if join_vocabulary is not None:
        here = (label >= 0) & (label < logits.shape[1])
        label = label.clamp(0, logits.shape[1] - 1)
    label_logits = logits.gather(1, label) * here
    softmax = torch.softmax(logits, dim=-1, out=logits)
    # the largest entry is 1 / sum of exponentials: two passes less than to take the log of the sum first
    own = normaliser = largest - softmax.gather(1, place).log()
    if join_vocabulary is not None:
        normaliser, label_logits = join_vocabulary(own, label_logits)
    loss = ((normaliser - label_logits) * weight).sum()
    if dtype is None:
        return loss, None
    logits_grad = softmax if softmax.dtype == dtype else torch.empty_like(softmax, dtype=dtype)
    torch.mul(softmax, weight * (own - normaliser).exp(), out=logits_grad)  # weighted and rounded in one pass
    # of labels anew: of a rounded probability near 1 less 1 nothing would be left
    of_label = torch.expm1(label_logits - normaliser) * weight
    of_label = torch.where(here, of_label.to(dtype), logits_grad.gather(1, label))
    return loss, logits_grad.scatter_(1, label, of_label)
