"""Ascend NPUs: convolutions and dense layers in int8, their results in float."""

from msqkd.targets.base import WEIGHTED, Int8Op, Target

ASCEND = Target(
    name="ascend",
    description="Ascend NPUs (symmetric int8 activations and weights; only convolutions and dense layers run in int8)",
    ops={
        "Conv2D": Int8Op("Conv2D", WEIGHTED, activations=("ReLU",), float_output=True),
        # Written as a 1×1 convolution: a MatMul has its transposition flags where a third input, the bias, would be.
        "Dense": Int8Op("Conv2D", WEIGHTED, activations=("ReLU",), float_output=True, max_rank=2),
    },
    float_reasons={
        "MatMul": "only a product with a parameter as its second operand, as nn.Dense writes it, is placed in int8",
        "BatchNorm": "it follows no convolution or dense layer it could be folded into",
    },
    act_symmetric=True,
    float16_layers=True,
)
