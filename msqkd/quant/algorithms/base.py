"""What methods of post-training quantisation have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Callable, ClassVar, Optional

import numpy as np

from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.order import FLOAT_STAGE as FLOAT_STAGE
from msqkd.quant.algorithms.order import INTEGER_STAGE as INTEGER_STAGE
from msqkd.quant.plan import QuantPlan


@dataclass
class Work:
    """A network while methods improve it.

    Attributes:
        graph: the deployment graph, the method's to change: parameters may get other values, of the same dtype. Nodes
            and values stay, by name; every convolution and dense layer that can have one has a bias. Shapes stay too,
            but for those of channels between layers that a method of the float stage adds copies to: it adapts the
            parameters, the types of the values, and what operations are told of them.
        plan: its plan; from the integer stage on with ranges. Methods of this stage may set scales and clip ratios of
            weights in it (a method replaces it, it is not changed in place).
        reference: the float network before any method, with the same nodes and values, in the shapes it had. Not
            changed.
        samples: gives the unlabelled calibration samples from the first on, a tuple of arrays (N, ...) a batch.
        seed: of everything drawn.
        progress: told, from time to time, the steps done and how many there are.
        exact: what `graph` was in float before a method of the integer stage gave its weights values that answer
            differently; None where none did.
    """

    graph: Graph
    plan: QuantPlan
    reference: Graph
    samples: Callable[[], Iterator[tuple[np.ndarray, ...]]]
    seed: int = 0
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    exact: Optional[Graph] = None


class Method(ABC):
    """One method; its settings are the fields of the dataclass it is."""

    name: ClassVar[str]
    stage: ClassVar[str]

    @abstractmethod
    def apply(self, work: Work) -> list[str]:
        """Change `work`; returns in words what was done and, by layer name, what could not be done and why."""
