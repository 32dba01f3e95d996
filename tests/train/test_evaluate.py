from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msqkd.data import ArraySplit, InputSpec, TensorSplit
from msqkd.errors import ModelError
from msqkd.train.evaluate import agreement, input_batches, measured, output_arrays
from msqkd.train.metric import accuracy_of

IMAGES = np.random.default_rng(0).normal(size=(11, 1, 2, 2)).astype(np.float32)
LABELS = np.arange(11, dtype=np.int32) % 3
SPLIT = ArraySplit(IMAGES, LABELS, ("a", "b", "c"), name="toy")


class Net(nn.Cell):
    def __init__(self, two: bool = False) -> None:
        super().__init__()
        self.flat, self.fc, self.drop, self.two = nn.Flatten(), nn.Dense(4, 3), nn.Dropout(p=0.9), two

    def construct(self, x):  # type: ignore[no-untyped-def]
        y = self.drop(self.fc(self.flat(x)))
        return (y, x) if self.two else y


@pytest.mark.parametrize("size", [1, 4, 11, 50])
@pytest.mark.parametrize("two", [False, True])
def test_answers_do_not_depend_on_the_batch_size(size: int, two: bool) -> None:
    net = Net(two)
    net.set_train()
    shapes = []

    def spy(x: ms.Tensor) -> object:
        shapes.append(x.shape[0])
        return net(x)

    net.set_train(False)
    w, b = net.fc.weight.asnumpy(), net.fc.bias.asnumpy()
    logits = output_arrays(spy, SPLIT, size)[0]
    np.testing.assert_allclose(logits, IMAGES.reshape(11, 4) @ w.T + b, rtol=1e-5, atol=1e-6)
    assert len(set(shapes)) == 1, "one compilation serves"


def test_a_network_is_measured_in_evaluation_mode() -> None:
    net = Net()
    net.set_train()
    first, second = output_arrays(net, SPLIT, 4)[0], output_arrays(net, SPLIT, 4)[0]
    np.testing.assert_array_equal(first, second)
    assert not net.training


def test_progress_counts_samples() -> None:
    seen: list[int] = []
    output_arrays(Net(), SPLIT, 4, progress=seen.append)
    assert seen == [4, 8, 11]


def test_input_batches_cover_the_split_in_order() -> None:
    parts = list(input_batches(SPLIT, 4))
    assert [len(p) for p in parts] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(parts), IMAGES)


def test_accuracy_and_agreement_are_in_percent() -> None:
    logits = np.eye(4, dtype=np.float32)
    assert accuracy_of(logits, np.array([0, 1, 2, 0])) == 75.0
    assert agreement(logits, logits[::-1]) == 0.0
    assert agreement(logits, logits * 5 - 1) == 100.0
    perfect = ArraySplit(IMAGES, LABELS, ("a", "b", "c"), name="toy")
    net = Net()
    best = output_arrays(net, perfect, 5)[0].argmax(-1).astype(np.int32)
    assert measured(net, ArraySplit(IMAGES, best, ("a", "b", "c"), name="toy"), 5) == 100.0


def test_outputs_of_several_rows_a_sample_are_cut_with_the_last_batch() -> None:
    def rows(x: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
        return x.reshape(-1, 2), x

    flat, plain = output_arrays(rows, SPLIT, 4)
    np.testing.assert_array_equal(flat, IMAGES.reshape(-1, 2))
    np.testing.assert_array_equal(plain, IMAGES)
    (only,) = output_arrays(rows, SPLIT, 4, (1,))
    np.testing.assert_array_equal(only, IMAGES)
    with pytest.raises(ModelError, match=r"output 0 has shape \(\) for 4 samples; each needs as many rows"):
        output_arrays(lambda x: x.sum(), SPLIT, 4)


def test_every_input_is_fed_in_order() -> None:
    specs = (InputSpec("a", (4,)), InputSpec("b", (), "int32"))
    split = TensorSplit((IMAGES.reshape(11, 4), np.arange(11)), LABELS, specs)
    (found,) = output_arrays(lambda a, b: a * b.reshape(-1, 1), split, 4)
    np.testing.assert_allclose(found, IMAGES.reshape(11, 4) * np.arange(11)[:, None], rtol=1e-6)
