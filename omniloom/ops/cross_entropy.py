"""Weighted cross entropy of a language-model head, without ever holding all logits.

Gradients are computed in the forward pass, chunk by chunk of tokens, so memory does not grow with tokens times
vocabulary. The head's sharding is not known here: a vocabulary-parallel version replaces this one from outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGIT_BUDGET_BYTES = 2**28  # of float32 logits held at a time


def choose_chunk_tokens(vocab_size: int, budget_bytes: int = LOGIT_BUDGET_BYTES) -> int:
    """The largest power of two of tokens whose float32 logits stay within the budget, at least 1."""
    fitting = max(1, budget_bytes // (4 * vocab_size))
    return 1 << (fitting.bit_length() - 1)


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Sum over tokens of weight x cross entropy of `hidden @ head.T` against `labels`, a float32 scalar.

    Args:
        hidden: [L, C], float32 or bfloat16. L may be 0: the loss is then 0 and all gradients are zeros.
        head: [V, C], same dtype.
        labels: int64 [L], all in 0..V-1 (rows without a label are not passed).
        weights: float32 [L]; no gradient flows to them.
        chunk_tokens: tokens whose logits are held at a time; None chooses by LOGIT_BUDGET_BYTES.
    """
    chunk = choose_chunk_tokens(head.shape[0]) if chunk_tokens is None else chunk_tokens
    return _LinearCrossEntropy.apply(hidden, head, labels, weights, chunk, torch.is_grad_enabled())


def linear_cross_entropy_reference(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """What `linear_cross_entropy` computes, with all logits at once."""
    logits = F.linear(hidden, head).float()
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, chunk_tokens: int, with_gradients: bool
    ) -> Tensor:
        hidden_wanted = with_gradients and ctx.needs_input_grad[0]
        head_wanted = with_gradients and ctx.needs_input_grad[1]
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.zeros_like(hidden) if hidden_wanted else None
        # float32, since in bfloat16 the sum over many chunks would lose the small ones
        head_grad = torch.zeros_like(head, dtype=torch.float32) if head_wanted else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part, label, weight = hidden[rows], labels[rows, None], weights[rows, None]
            logits = F.linear(part, head).float()
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            loss += ((normaliser - logits.gather(1, label)) * weight).sum()
            if not (hidden_wanted or head_wanted):
                continue
            logits_grad = logits.sub_(normaliser).exp_().mul_(weight)  # weight x softmax, in the logits' memory
            logits_grad.scatter_add_(1, label, -weight)
            logits_grad = logits_grad.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(logits_grad, head, out=hidden_grad[rows])
            if head_grad is not None:
                head_grad += logits_grad.T @ part
        ctx.hidden_grad, ctx.head_grad, ctx.head_dtype = hidden_grad, head_grad, head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad = None if ctx.hidden_grad is None else (ctx.hidden_grad * loss_grad).to(ctx.hidden_grad.dtype)
        head_grad = None if ctx.head_grad is None else (ctx.head_grad * loss_grad).to(ctx.head_dtype)
        return hidden_grad, head_grad, None, None, None, None
