"""The sections of a recipe that make post-training quantisation lose less."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Optional

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, Field, model_validator

from msqkd.quant.algorithms.order import STAGES, against_order
from msqkd.recipe.fields import Count, NotNegative, Number, Section, distinct, filled, value_of
from msqkd.recipe.problems import Allowed, Problem, refuse_value

MethodName = Literal[
    "equalize", "smoothquant", "split", "weight_ranges", "adaround", "reconstruct", "cluster", "bias_correction"
]


def _falling(value: list[float]) -> list[float]:
    if len(value) != 2 or not 1 <= value[1] <= value[0]:
        refuse_value(f"found {value}, allowed: two numbers of 1 or more, the second not above the first")
    return value


Beta = Annotated[
    list[Number], AfterValidator(_falling), Allowed("two numbers of 1 or more, the second not above the first")
]


class EqualizeSection(Section):
    """Cross-layer equalisation of channels, with absorption of high biases (Nagel et al. 2019, arXiv:1906.04721)."""

    iterations: Count = Field(default=20, description="Rounds over the network, at most.")
    tolerance: Annotated[Number, Gt(0), Lt(1)] = Field(
        default=1e-3, description="It ends when no scale changes by more than this share."
    )
    absorb: bool = Field(default=True, description="Move biases far above zero into the layers behind.")
    relu6: Literal["skip", "within"] = Field(
        default="skip",
        description="Channels with a ReLU6 on the way: left as they are, or scaled where no sample reaches 6.",
    )
    additions: bool = Field(default=False, description="Also channels that are added to others, all with one scale.")


class SmoothQuantSection(Section):
    """Outliers of activations moved into weights behind a LayerNorm (Xiao et al. 2022, arXiv:2211.10438)."""

    alpha: Annotated[Number, Ge(0), Le(1)] = Field(
        default=0.5, description="How much of the difficulty the weights take over."
    )


class SplitSection(Section):
    """Input channels with outliers among their weights are computed twice and weigh half each (Zhao et al. 2019,
    arXiv:1901.09504)."""

    ratio: Annotated[Number, Gt(0), Le(1)] = Field(
        default=0.02, description="Share of a layer's input channels that may be added, rounded up."
    )


class WeightRangesSection(Section):
    """Clip ratios of weights by the error of the layer's output, layer after layer (arXiv:2106.08295)."""

    candidates: Annotated[int, Ge(2), Le(1000)] = Field(default=32, description="Ratios tried.")
    lowest: Annotated[Number, Gt(0), Lt(1)] = Field(default=0.4, description="The smallest of them; the largest is 1.")


class RoundingSection(Section):
    """Trained roundings of weights, layer by layer (AdaRound, Nagel et al. 2020, arXiv:2004.10568)."""

    iterations: Count = Field(default=1000, description="Training steps of each layer.")
    batch_size: Count = Field(default=32, description="Samples a step.")
    lr: Annotated[Number, Gt(0), Le(1)] = Field(default=1e-2, description="Learning rate of Adam.")
    warmup: Annotated[Number, Ge(0), Lt(1)] = Field(
        default=0.2, description="Share of the steps without the pull to a decision."
    )
    beta: Beta = Field(default=[20.0, 2.0], description="Exponent of that pull, after the warm-up and at the end.")
    reg: NotNegative = Field(default=0.01, description="Weight of that pull.")


class ReconstructSection(RoundingSection):
    """The same for whole residual blocks, with the scales of their activations (BRECQ, Li et al. 2021,
    arXiv:2102.05426; QDrop, Wei et al. 2022, arXiv:2203.05740)."""

    drop: Annotated[Number, Ge(0), Lt(1)] = Field(
        default=0.5, description="Share of the activations that are left float in a step."
    )


class ClusterSection(Section):
    """Few distinct integers a layer, stored as indices (Deep Compression, Han et al. 2016, arXiv:1510.00149)."""

    clusters: Annotated[int, Ge(2), Le(128)] = Field(default=16, description="How many integers, at most.")
    shared: bool = Field(default=False, description="The same ones for all layers of as many bits.")


class BiasCorrectionSection(Section):
    """What a layer's outputs lose in the mean is added to its bias (Nagel et al. 2019, arXiv:1906.04721)."""

    kind: Literal["empirical", "analytic"] = Field(
        default="empirical",
        description="By what arrives in the quantised network, layer after layer; or by the rounding of weights alone.",
    )


class PtqSection(Section):
    """What is done to the float network so that quantisation without training loses less; it takes the calibration
    samples, and no labels. `msqkd calibrate` exports its result; a training begins from the network as it was."""

    methods: Annotated[list[MethodName], AfterValidator(distinct)] = Field(
        default=[],
        description="What is done, in this order: equalize, smoothquant and split come before the others.",
    )
    equalize: Optional[EqualizeSection] = Field(default=None, description="Settings of equalize.")
    smoothquant: Optional[SmoothQuantSection] = Field(default=None, description="Settings of smoothquant.")
    split: Optional[SplitSection] = Field(default=None, description="Settings of split.")
    weight_ranges: Optional[WeightRangesSection] = Field(default=None, description="Settings of weight_ranges.")
    adaround: Optional[RoundingSection] = Field(default=None, description="Settings of adaround.")
    reconstruct: Optional[ReconstructSection] = Field(default=None, description="Settings of reconstruct.")
    cluster: Optional[ClusterSection] = Field(default=None, description="Settings of cluster.")
    bias_correction: Optional[BiasCorrectionSection] = Field(default=None, description="Settings of bias_correction.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Every method that is used has its settings."""
        methods = value_of(values, "methods", [])
        for name in methods if isinstance(methods, list) else []:
            values = filled(values, name, {}, name in STAGES)
        return values

    def _conflicts(self) -> Iterator[Problem]:
        for name in STAGES:
            if getattr(self, name) is not None and name not in self.methods:
                yield Problem((name,), f"found settings, allowed only with '{name}' in ptq.methods")
        against = against_order(self.methods)
        if against:
            yield Problem(("methods",), against)
