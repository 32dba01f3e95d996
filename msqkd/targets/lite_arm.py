"""MindSpore Lite's int8 CPU kernels, as measured on the 2.7 runtime; its defects are avoided here, by data."""

from msqkd.targets.base import FREE, SHARED, SHARED_ROUNDED, WEIGHTED, Int8Op, Target

_RELUS = ("ReLU", "ReLU6")

LITE_ARM = Target(
    name="lite_arm",
    description="MindSpore Lite on ARM CPUs (asymmetric int8 activations, symmetric int8 weights)",
    ops={
        "Conv2D": Int8Op("Conv2DFusion", WEIGHTED, activations=_RELUS),
        # Written as a 1×1 convolution, the only form of a dense layer the converter keeps wholly int8.
        "Dense": Int8Op("Conv2DFusion", WEIGHTED, activations=_RELUS, max_rank=2),
        # Broadcast operands are read from batch 0 only.
        "Add": Int8Op("AddFusion", FREE, activations=_RELUS, same_shape=True),
        "Concat": Int8Op("Concat", FREE),
        "HSwish": Int8Op("Activation", FREE),
        "MaxPool": Int8Op("MaxPoolFusion", SHARED),
        # With differing parameters the average wraps instead of saturating; above 128 elements its int16 sum overflows.
        "AvgPool": Int8Op("AvgPoolFusion", SHARED_ROUNDED, max_window=128),
        # ReduceMean is wrong on arm64 unless H·W is a multiple of 16; an average pool over the whole plane is right.
        "ReduceMean": Int8Op("AvgPoolFusion", SHARED_ROUNDED, max_window=128, global_spatial=True),
        "Reshape": Int8Op("Reshape", SHARED),
        "Transpose": Int8Op("Transpose", SHARED),
        "Squeeze": Int8Op("Squeeze", SHARED),
        "ExpandDims": Int8Op("Unsqueeze", SHARED),
    },
    float_reasons={
        "ReLU": "it follows no int8 convolution, dense layer or addition; the stand-alone kernel loses the last bit",
        "ReLU6": "it follows no int8 convolution, dense layer or addition; the stand-alone kernel may wrap",
        "Sigmoid": "the runtime's table gives 0 for the largest input",
        "LeakyReLU": "the runtime applies the slope to the raw integer and is right for zero point 0 only",
        "Mul": "the runtime reads a broadcast operand from batch 0 only",
        "BatchNorm": "it follows no convolution or dense layer it could be folded into",
        "MatMul": "only a product with a parameter as its second operand, as nn.Dense writes it, is placed in int8",
    },
    grouped_per_channel=False,
)
