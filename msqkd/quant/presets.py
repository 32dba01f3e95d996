"""Named defaults for families of networks: settings, and rules for the parts known to lose accuracy.

Sources: Krishnamoorthi, arXiv:1806.08342 (depthwise convolutions need one scale a channel); Liu et al.,
arXiv:2106.14156, and Lin et al., arXiv:2111.13824 (softmax, layer normalisation and residual sums of transformers).
"""

from __future__ import annotations

from dataclasses import dataclass

from msqkd.errors import PlanError, did_you_mean
from msqkd.graph.ir import Graph
from msqkd.quant.config import FLOAT, QuantConfig, Rule, WeightQuantizer
from msqkd.quant.rules import RuleBook


@dataclass(frozen=True)
class Preset:
    """Defaults for a family of networks.

    Attributes:
        name: as `msqkd.plan_network` and its companions take it.
        description: one line for people.
        config: the settings of every layer no rule speaks of.
        rules: come before the user's, which therefore win within a level.
    """

    name: str
    description: str
    config: QuantConfig
    rules: tuple[Rule, ...] = ()

    def rules_for(self, graph: Graph) -> tuple[Rule, ...]:
        """The rules that match something in `graph`: a preset speaks of what a family may have."""
        return tuple(rule for rule in self.rules if _matches(graph, rule))


def _matches(graph: Graph, rule: Rule) -> bool:
    try:
        RuleBook(graph, QuantConfig(), [rule])
    except PlanError:
        return False
    return True


def _float(preset: str, kind: str, *patterns: str) -> tuple[Rule, ...]:
    return tuple(Rule(kind, pattern, FLOAT, f"preset {preset}, {kind} {pattern}", True) for pattern in patterns)


_PER_CHANNEL = QuantConfig(weight_quantizer=WeightQuantizer(per_channel=True))

_PRESETS = (
    Preset(
        "cnn", "convolutional networks with ordinary convolutions (ResNet, VGG, DenseNet): wholly int8", _PER_CHANNEL
    ),
    Preset(
        "mobile",
        "networks of depthwise convolutions (MobileNet, EfficientNet, ShuffleNet): wholly int8, weights with the least "
        "squared error a channel",
        QuantConfig(weight_quantizer=WeightQuantizer(per_channel=True, observer="mse")),
    ),
    Preset(
        "transformer",
        "transformers (ViT, Swin, BERT): dense layers and products in int8; the first and the last layer, softmax, "
        "layer normalisation, GELU and residual sums in float",
        _PER_CHANNEL,
        (
            *_float("transformer", "position", "first", "last"),
            *_float("transformer", "op", "Softmax", "LayerNorm", "GeLU", "GeluExt", "Add"),
        ),
    ),
    Preset(
        "detector",
        "detectors (YOLO, SSD): convolutions in int8; sigmoid, softmax, exponential and quotients of the decoding "
        "in float",
        _PER_CHANNEL,
        _float("detector", "op", "Sigmoid", "Softmax", "Exp", "Div", "Divs", "RealDiv"),
    ),
)

PRESETS = {item.name: item for item in _PRESETS}
"""Every preset by name."""


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        PlanError: there is none.
    """
    if name not in PRESETS:
        raise PlanError(f"preset '{name}' is unknown; allowed: {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
