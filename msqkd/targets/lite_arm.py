"""MindSpore Lite's int8 CPU kernels, as measured on the 2.7 runtime; its defects are avoided here, by data."""

from msqkd.targets import limits
from msqkd.targets.base import (
    DEPTHWISE,
    FREE,
    HARD_SIGMOID,
    RESCALED,
    SHARED,
    SHARED_ROUNDED,
    WEIGHTED,
    Defect,
    FusedForm,
    Int8Op,
    Target,
)

_RELUS = ("ReLU", "ReLU6")
_WEIGHTED = (*_RELUS, "HSigmoid")
_PRODUCT = Int8Op("MatMulFusion", FREE, operands=2)
_SLICE = Int8Op("SliceFusion", SHARED)
_NEAREST = Int8Op("Resize", SHARED, asymmetric="resize_half_pixel")

_DEFECTS = (
    Defect(
        "batch_broadcast",
        "an addition or product with an (N, C, 1, 1) operand reads that operand from the batch's first item only",
        "additions stay float, products are int8 in files of batch 1 and refused in others",
    ),
    Defect(
        "global_mean",
        "the mean over H and W is garbage on arm64 unless H·W is a multiple of 16, reads past its buffer for batches "
        "with C not a multiple of 4, and is off by up to 1 level on x86",
        "it is written as a depthwise convolution over the whole plane, all weights 127",
    ),
    Defect(
        "average_wraps",
        "an average pool whose input and output parameters differ wraps instead of saturating, and rounds twice",
        "both have the same parameters",
    ),
    Defect(
        "average_overflow",
        "an average pool over more than 128 elements overflows its int16 sum",
        "it is written as a depthwise convolution, or stays float where it pads",
    ),
    Defect(
        "maximum_wraps",
        "a maximum pool whose input and output parameters differ wraps instead of saturating",
        "both have the same parameters",
    ),
    Defect(
        "lone_relu",
        "the stand-alone ReLU loses the last bit, and wraps on arm64 where its output has the finer scale",
        "it is computed in the kernel before it, or is a depthwise convolution with the weight 1",
    ),
    Defect(
        "lone_relu6",
        "the stand-alone ReLU6 wraps above 127",
        "it is computed in the kernel before it, or is a depthwise convolution with the weight 1",
    ),
    Defect("sigmoid_at_127", "the sigmoid of the largest input, 127, is always 0", "it stays float"),
    Defect(
        "leaky_zero_point",
        "LeakyReLU applies its slope to the raw integer and is right for zero point 0 only",
        "it stays float",
    ),
    Defect("division_threads", "a division with more than one thread leaves values unwritten", "it stays float"),
    Defect(
        "grouped_per_channel",
        "a grouped convolution that is not depthwise is refused with per-channel weights",
        "one scale per tensor is used",
    ),
    Defect(
        "padded_pointwise",
        "a 1×1 convolution pads with the integer 0 instead of the zero point",
        "its kernel is embedded into zeros, so that the padding is that of a larger kernel",
    ),
    Defect("flatten", "Flatten has no int8 kernel and drags its neighbours to float", "it is written as Reshape"),
    Defect(
        "resize_zero_point",
        "a bilinear resize with a zero point other than 0 truncates, and differs from one CPU to the next",
        "it stays float",
    ),
    Defect(
        "softmax_parameters",
        "the softmax ignores its output's parameters and always gives scale 1/256 and zero point -128",
        "its output has just these",
    ),
    Defect("softmax_sum", "the sum of a softmax over 512 values or more is undefined", "it stays float"),
    Defect(
        "resize_half_pixel",
        "a resize to the nearest neighbour ignores half-pixel coordinates",
        "it stays float",
    ),
)

LITE_ARM = Target(
    name="lite_arm",
    description="MindSpore Lite on ARM CPUs (asymmetric int8 activations, symmetric int8 weights)",
    ops={
        "Conv2D": Int8Op("Conv2DFusion", WEIGHTED, activations=_WEIGHTED, limited=True),
        # Written as a 1×1 convolution for the converter, the only form of a dense layer it keeps wholly int8.
        "Dense": Int8Op("MatMulFusion", WEIGHTED, activations=_WEIGHTED),
        "MatMul": _PRODUCT,
        "MatMulExt": _PRODUCT,
        "BatchMatMul": _PRODUCT,
        "Add": Int8Op("AddFusion", FREE, activations=_RELUS, operands=2, same_shape="batch_broadcast"),
        "Sub": Int8Op("SubFusion", FREE, operands=2),
        "Mul": Int8Op("MulFusion", FREE, operands=2, sample_broadcast="batch_broadcast"),
        "Concat": Int8Op("Concat", FREE, joins=True),
        "HSwish": Int8Op("Activation", FREE),
        "Tanh": Int8Op("Activation", FREE),
        "MaxPool": Int8Op("MaxPoolFusion", SHARED, avoids=("maximum_wraps",)),
        "AvgPool": Int8Op(
            "AvgPoolFusion",
            SHARED_ROUNDED,
            max_window=limits.AVERAGE_WINDOW,
            large_window=DEPTHWISE,
            window_defect="average_overflow",
            avoids=("average_wraps",),
        ),
        "ReduceMean": Int8Op(
            "Conv2DFusion",
            FREE,
            global_spatial=True,
            form=DEPTHWISE,
            max_window=limits.MEAN_PLANE,
            avoids=("global_mean",),
        ),
        "AdaptiveAvgPool2D": Int8Op(
            "Conv2DFusion",
            FREE,
            global_spatial=True,
            form=DEPTHWISE,
            max_window=limits.MEAN_PLANE,
            avoids=("global_mean",),
        ),
        "BatchNorm": Int8Op("Conv2DFusion", FREE, activations=_RELUS, form=DEPTHWISE, maps_only=True, follows=True),
        "ReLU": Int8Op("Conv2DFusion", FREE, form=DEPTHWISE, maps_only=True, follows=True, avoids=("lone_relu",)),
        "ReLU6": Int8Op("Conv2DFusion", FREE, form=DEPTHWISE, maps_only=True, follows=True, avoids=("lone_relu6",)),
        "Softmax": Int8Op(
            "Softmax",
            FREE,
            follows=True,
            fixed_range=(0.0, 255 / 256),
            max_row=limits.SOFTMAX_ROW,
            row_defect="softmax_sum",
            avoids=("softmax_parameters",),
        ),
        "LayerNorm": Int8Op("LayerNormFusion", WEIGHTED, follows=True, per_tensor=True),
        "Reshape": Int8Op("Reshape", SHARED),
        "Transpose": Int8Op("Transpose", SHARED),
        "Squeeze": Int8Op("Squeeze", SHARED),
        "ExpandDims": Int8Op("Unsqueeze", SHARED),
        "Split": Int8Op("Split", SHARED),
        "Unstack": Int8Op("Split", SHARED),
        "StridedSlice": _SLICE,
        "Gather": Int8Op("Gather", SHARED),
        "Pad": Int8Op("PadFusion", SHARED),
        "PadV3": Int8Op("PadFusion", SHARED),
        "ResizeNearestNeighbor": _NEAREST,
        "ResizeNearestNeighborV2": _NEAREST,
    },
    fused_forms={"HSigmoid": FusedForm(HARD_SIGMOID, (0.0, 1.0))},
    rescaling=Int8Op("MulFusion", RESCALED),
    rescaled=("Mul", "Muls", "Div", "Divs", "RealDiv"),
    float_reasons={
        "HSigmoid": "it follows no int8 convolution or dense layer",
    },
    float_defects={
        "Sigmoid": "sigmoid_at_127",
        "LeakyReLU": "leaky_zero_point",
        "Div": "division_threads",
        "RealDiv": "division_threads",
        "ResizeBilinear": "resize_zero_point",
        "ResizeBilinearV2": "resize_zero_point",
        "UpsampleBilinear2D": "resize_zero_point",
    },
    defects={defect.name: defect for defect in _DEFECTS},
    float16_reason="MindSpore Lite chooses float16 for a whole session (SetEnableFP16), not for a layer",
    grouped_per_channel="grouped_per_channel",
    padded_pointwise="padded_pointwise",
)
