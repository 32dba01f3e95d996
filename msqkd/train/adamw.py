"""AdamW (Loshchilov & Hutter, arXiv:1711.05101): Adam whose weight decay is apart from the gradient."""

from __future__ import annotations

from typing import Any

from mindspore import nn, ops
from mindspore.ops import functional as F

_decay = ops.MultitypeFuncGraph("decoupled_weight_decay")


@_decay.register("Tensor", "Number", "Tensor", "Bool")
def _shrink(rate, share, parameter, decays):  # type: ignore[no-untyped-def]
    """The parameter becomes (1 - rate * share) of itself."""
    return F.assign(parameter, parameter * (1.0 - rate * share)) if decays else parameter


class AdamW(nn.Adam):
    """Adam with bias correction, whose parameters shrink by lr · weight_decay before each update.

        w ← w · (1 − lr · λ);   w ← w − lr · m̂ / (√v̂ + ε)   (β₁ = 0.9, β₂ = 0.999, ε = 1e-8)

    `nn.AdamWeightDecay` leaves the bias correction out, and so steps too far at first; `nn.Adam` adds the decay to the
    gradient, where the division by √v̂ cancels most of it; `mint.optim.AdamW` has no kernel on CPU.

    Args:
        parameters: a list of parameters or of groups, as MindSpore's optimisers take it.
        learning_rate: a number, or one a step.
        weight_decay: λ, for the groups that name none.
    """

    def __init__(self, parameters: Any, learning_rate: Any, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, learning_rate, weight_decay=weight_decay)
        given = self.weight_decay if self.is_group else [self.weight_decay] * len(self.parameters)
        self.shares = tuple(float(share) for share in given)
        self.decayed = tuple(share > 0 for share in self.shares)
        self.decays = any(self.decayed)
        self.exec_weight_decay = False  # the gradient is left alone

    def _apply_adam(self, params, beta1_power, beta2_power, moment1, moment2, lr, gradients):  # type: ignore[no-untyped-def]
        """Shrink the parameters that decay, then update all of them as `nn.Adam` does.

        `nn.Adam` calls this with the rate it has read. Reading it a second time is not safe: the compiler may move that
        beyond the count of the step, to the rate of the next one.
        """
        if self.decays and self.is_group_lr:
            self.hyper_map(_decay, lr, self.shares, params, self.decayed)
        elif self.decays:
            self.hyper_map(F.partial(_decay, lr), self.shares, params, self.decayed)
        return super()._apply_adam(params, beta1_power, beta2_power, moment1, moment2, lr, gradients)
