"""Loss, logits and gradients of transformers' models and ours, and how near they have to be; for parity tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniloom.families.spec import ModelSpec
from omniloom.keymap import Tied
from omniloom.models.fusion import OmniModel
from omniloom.types import PackedBatch
from tests.parity.builders import Sample, assemble, published

FORWARD_TOLERANCE = 1e-5  # float32 rounding through a few layers; measured worst is about 2e-6
GRADIENT_TOLERANCE = 1e-4  # of each parameter's norm, or of FLOOR x the global norm where that is larger
FLOOR = 1e-3  # so differences under 1e-7 of the global norm, float32's rounding, pass: some gradients are zero but for
# it (key biases without rotary positions, the router of one expert per token under norm_topk_prob)
SMALLEST_GAP = 3e-6  # closer routing probabilities may order differently by rounding alone


@dataclasses.dataclass
class Result:
    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def run_reference(
    reference: Any,
    spec: ModelSpec,
    config_json: Mapping[str, Any],
    samples: Sequence[Sample],
    run_row: Callable[[Any, Sample], Any],
) -> Result:
    """transformers on each row alone; losses added up, gradients under our names."""
    reference.zero_grad()
    loss, logits = torch.zeros(()), []
    for sample in samples:
        logits.append(run_row(reference, sample).logits[0])
        entropy = F.cross_entropy(logits[-1], sample.labels, reduction="none")  # 0 where there is no label
        loss = loss + (entropy * sample.loss_weights).sum()
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in reference.named_parameters()
    }
    key_map = spec.key_map(spec.read_config(config_json))
    tied = {rule.ours for rule in key_map.rules if isinstance(rule, Tied)}  # second names of a parameter
    ours = {
        name: value for name, value in assemble(key_map, published(reference, gradients)).items() if name not in tied
    }
    return Result(loss=loss.detach(), logits=torch.cat(logits).detach(), gradients=ours)


def run_ours(model: OmniModel, batch: PackedBatch) -> Result:
    model.zero_grad()
    terms = model(batch)
    terms.sums["text"].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient at all, not even zeros, for {missing}"
    with torch.no_grad():
        logits = model.logits(batch)[~batch.is_padding]
    return Result(
        loss=terms.sums["text"].detach(),
        logits=logits,
        gradients={name: p.grad.clone() for name, p in model.named_parameters()},
    )


def assert_equal(ours: Result, reference: Result) -> None:
    torch.testing.assert_close(ours.loss, reference.loss, rtol=FORWARD_TOLERANCE, atol=1e-6)
    scale = reference.logits.abs().max()
    worst = (ours.logits - reference.logits).abs().max() / scale
    assert worst < FORWARD_TOLERANCE, f"logits differ by {worst:.2e} of the largest"
    assert ours.gradients.keys() == reference.gradients.keys()
    total = torch.stack([g.norm() for g in reference.gradients.values()]).norm()
    for name, wanted in reference.gradients.items():
        error, scale = (ours.gradients[name] - wanted).norm(), max(wanted.norm(), FLOOR * total)
        assert error <= GRADIENT_TOLERANCE * scale, f"gradient of {name} differs by {error:.2e} of {scale:.2e}"


def assert_sum(together: Result, alone: Sequence[Result], *, least: float = 1e-7) -> None:
    """Samples in one pack give what they give alone; their gradients are summed in another order."""
    torch.testing.assert_close(together.loss, sum(part.loss for part in alone), rtol=1e-5, atol=0)
    torch.testing.assert_close(together.logits, torch.cat([part.logits for part in alone]), rtol=1e-4, atol=1e-4)
    for name, gradient in together.gradients.items():
        wanted = torch.stack([part.gradients[name] for part in alone]).sum(dim=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + least)


def smallest_router_gap(model: OmniModel, batch: PackedBatch) -> float:
    """Least distance between the last expert chosen and the first one not, over layers and valid tokens."""
    gaps = [float("inf")]

    def record(router, _, outputs):
        count = router.num_experts_per_tok
        if count < outputs[0].shape[1]:
            ranked = outputs[0][~batch.is_padding].sort(dim=-1, descending=True).values
            gaps.append(float((ranked[:, count - 1] - ranked[:, count]).min()))

    handles = [layer.moe.router.register_forward_hook(record) for layer in model.text.layers.values() if layer.moe]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return min(gaps)
