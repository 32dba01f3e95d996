"""The kernels of MindSpore Lite's CPU runtime, one family a file; importing this package registers them all."""

from msqkd.integer.kernels import (  # noqa: F401
    activation,
    arithmetic_ops,
    cast,
    conv,
    float_ops,
    matmul,
    norm,
    pool,
    reduce,
    resize,
    shape,
    softmax,
)
