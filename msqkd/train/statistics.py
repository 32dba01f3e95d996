"""BatchNorm's running statistics where several workers train one network."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import nn, ops
from mindspore.nn.layer.normalization import _BatchNorm

from msqkd import parallel
from msqkd.train.ema import AveragingOptimizer


class SharedStatistics(nn.Cell):
    """Gives every worker the mean of all workers' running means and variances.

    A worker normalises its own part of a batch with the statistics of this part. The mean of the running means is that
    of the whole batch; the mean of the variances lacks the variance between the parts (nn.SyncBatchNorm would have it,
    which does not exist on CPU).

    Args:
        network: whose BatchNorm, in cells of `msqkd.graph.cell.to_cell` and in MindSpore's own, is watched.
        optimizer: where it keeps averages of the statistics, these are shared too.
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        found = [parameter for _, part in network.cells_and_names() for parameter in _statistics(part)]
        if isinstance(optimizer, AveragingOptimizer):
            known = {id(parameter) for parameter in found}
            pairs = zip(optimizer.weights, optimizer.averages)
            found += [average for weight, average in pairs if id(weight) in known]
        self.parameters_shared = ms.ParameterTuple(found)
        self.means = parallel.Means([tuple(parameter.shape) for parameter in found])
        self.watched = [part for _, part in network.cells_and_names() if hasattr(part, "batchnorm_frozen")]

    def share(self) -> None:
        """Do it, unless they stand still."""
        if self.means.sizes and not (self.watched and all(part.batchnorm_frozen for part in self.watched)):
            self()

    def construct(self):  # type: ignore[no-untyped-def]
        """One message for all of them."""
        means = self.means(self.parameters_shared)
        done = means[0].sum()
        for parameter, mean in zip(self.parameters_shared, means):
            done = ops.depend(done, ops.assign(parameter, mean))
        return done


def _statistics(part: Any) -> list[Any]:
    """The running means and variances a cell itself holds."""
    if isinstance(part, _BatchNorm):
        return [part.moving_mean, part.moving_variance]
    if not hasattr(part, "parameter_names"):
        return []
    names = {name for node in part.graph.nodes if node.op == "BatchNorm" for name in node.inputs[3:5]}
    return [getattr(part, attribute) for attribute, name in part.parameter_names.items() if name in names]
