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

from omniloom.ops.linear_map import LinearMap, dropped

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
            parts, label, weight = [each[rows] for each in inputs], labels[rows, None], weights[rows, None]
            logits = F.linear(parts[0], heads[0])
            if len(parts) == 1 and join_vocabulary is None and logits.dtype != torch.float32:
                logits = logits.log_softmax(dim=-1, dtype=torch.float32)  # widened and normalised in one pass
                normaliser = None
            else:
                logits = logits.float()
                for part, head in zip(parts[1:], heads[1:], strict=True):
                    logits += F.linear(part, head)
                normaliser = logits.logsumexp(dim=-1, keepdim=True)
            if join_vocabulary is None or normaliser is None:
                here, label_logits = torch.ones_like(weight), logits.gather(1, label)
            else:
                here = ((label >= 0) & (label < logits.shape[1])).float()
                label = label.clamp(0, logits.shape[1] - 1)
                normaliser, label_logits = join_vocabulary(normaliser, logits.gather(1, label) * here)
            loss += ((-label_logits if normaliser is None else normaliser - label_logits) * weight).sum()
            if not any(wanted):
                continue
            # the softmax, in the logits' memory
            logits_grad = (logits if normaliser is None else logits.sub_(normaliser)).exp_()
            logits_grad.scatter_add_(1, label, -here)
            if logits_grad.dtype == parts[0].dtype:
                logits_grad.mul_(weight)
            else:  # weighted and rounded in one pass
                low_grad = torch.empty_like(logits_grad, dtype=parts[0].dtype)
                logits_grad = torch.mul(logits_grad, weight, out=low_grad)
            for part, head, input_grad, head_grad in zip(parts, heads, grads[::2], grads[1::2], strict=True):
                if input_grad is not None:
                    torch.mm(logits_grad, head, out=input_grad[rows])
                if head_grad is not None:
                    head_grad += logits_grad.T @ part
        ctx.grads, ctx.dtypes = grads, [factor.dtype for factor in factors]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.grads, ctx.dtypes, strict=True)
        return (None,) * 5 + tuple(None if grad is None else (grad * loss_grad).to(dtype) for grad, dtype in pairs)
