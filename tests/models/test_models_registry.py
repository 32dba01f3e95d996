import sys
import textwrap

import numpy as np
import pytest
from mindspore import Tensor, nn

from msqkd.errors import MissingDependencyError, ModelError, MsqkdError
from msqkd.models import MODELS, build_model, default_input_shape
from msqkd.models.lenet5 import LeNet5

USER_FILE = textwrap.dedent(
    """
    from mindspore import nn
    from msqkd.errors import DataError

    class Mine(nn.Cell):
        def __init__(self, width=2):
            super().__init__()
            self.dense = nn.Dense(3, width)

        def construct(self, x):
            return self.dense(x)

    def broken(width=2):
        raise RuntimeError("first line\\nsecond line")

    def refused():
        raise DataError("a sentence")

    def number():
        return 7

    def anything(**options):
        return Mine(**options)

    constant = 3
    """
)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_own_models(name: str) -> None:
    net = build_model("msqkd", name, {"num_classes": 4, "in_channels": 2})
    assert isinstance(net, nn.Cell)
    assert net.trainable_params()[-1].shape == (4,)
    assert default_input_shape("msqkd", name, {"in_channels": 2}) == (2, 32, 32)


def test_default_input_shape() -> None:
    assert default_input_shape("msqkd", "lenet5", {}) == (1, 32, 32)
    assert default_input_shape("msqkd", "resnet56", {}) == (3, 32, 32)
    assert default_input_shape("mindcv", "resnet50", {}) is None
    assert default_input_shape("python", "a:b", {}) is None


@pytest.mark.parametrize(
    ("source", "name", "args", "said"),
    [
        ("mscv", "x", {}, "source 'mscv' is unknown; allowed: msqkd, mindcv, python; did you mean 'mindcv'"),
        ("msqkd", None, {}, "source msqkd needs a name"),
        ("python", "", {}, "source python needs a target such as package.module:factory"),
        ("msqkd", "lenet", {}, "no network 'lenet'; allowed: lenet5, .*; did you mean 'lenet5'"),
        (
            "msqkd",
            "lenet5",
            {"num_class": 3},
            "takes no argument 'num_class'; allowed: num_classes.* mean 'num_classes'",
        ),
        ("msqkd", "resnet20", {"blocks": 3}, "could not be made|takes no argument 'blocks'"),
        ("msqkd", "lenet5", {"num_classes": -1}, "'lenet5' could not be made: ValueError"),
        ("python", "no_colon", {}, "must be package.module:factory or path/to/file.py:factory"),
        ("python", "no.such.module:f", {}, "module 'no.such.module' cannot be imported: ModuleNotFoundError"),
        ("python", "no/such/file.py:f", {}, r"file\.py does not exist"),
        ("python", "msqkd.models.lenet5:LeNet", {}, "has no 'LeNet'; did you mean 'LeNet5'"),
    ],
)
def test_refusals_are_one_sentence_with_the_place(source: str, name: str, args: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said) as error:
        build_model(source, name, args, where="teacher")
    assert str(error.value).startswith("teacher: ")
    assert "\n" not in str(error.value)


def test_factory_in_a_module() -> None:
    assert isinstance(build_model("python", "msqkd.models.lenet5:LeNet5", {"in_channels": 3}), LeNet5)


def test_module_in_the_working_directory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_networks.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "my_own_networks", raising=False)
    assert type(build_model("python", "my_own_networks:Mine", {})).__name__ == "Mine"


def test_factory_in_a_file(tmp_path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(USER_FILE)
    net = build_model("python", f"{file}:Mine", {"width": 5})
    assert net(Tensor(np.zeros((2, 3), np.float32))).shape == (2, 5)
    assert build_model("python", f"{file}:anything", {"width": 3}).dense.weight.shape == (3, 3)
    other = tmp_path / "other" / "nets.py"
    other.parent.mkdir()
    other.write_text(USER_FILE.replace("width=2", "width=9"))
    assert build_model("python", f"{other}:Mine", {}).dense.weight.shape == (9, 3)
    assert build_model("python", f"{file}:Mine", {}).dense.weight.shape == (2, 3)


@pytest.mark.parametrize(
    ("factory", "args", "said"),
    [
        ("broken", {}, "could not be made: RuntimeError: first line \\(at .*:[0-9]+\\)$"),
        ("number", {}, "gave a int; a mindspore.nn.Cell is needed"),
        ("constant", {}, "is a int; a class or function is needed"),
        ("Mime", {}, "has no 'Mime'; did you mean 'Mine'"),
        ("Mine", {"widht": 3}, "takes no argument 'widht'; allowed: width; did you mean 'width'"),
        ("anything", {"widht": 3}, "could not be made: TypeError"),
    ],
)
def test_factories_that_fail(factory: str, args: dict, said: str, tmp_path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(USER_FILE)
    with pytest.raises(ModelError, match=said):
        build_model("python", f"{file}:{factory}", args)


def test_own_errors_of_a_factory_pass(tmp_path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(USER_FILE)
    with pytest.raises(MsqkdError, match=r"^a sentence$"):
        build_model("python", f"{file}:refused", {})


def test_file_that_does_not_run(tmp_path) -> None:
    file = tmp_path / "nets.py"
    file.write_text("def f(:\n")
    with pytest.raises(ModelError, match=r"nets\.py cannot be imported: SyntaxError"):
        build_model("python", f"{file}:f", {})
    with pytest.raises(ModelError, match=r"net\.py does not exist; did you mean 'nets\.py'"):
        build_model("python", f"{tmp_path / 'net.py'}:f", {})


def test_mindcv_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mindcv", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'msqkd\[mindcv\]'"):
        build_model("mindcv", "resnet50", {})


def test_mindcv() -> None:
    pytest.importorskip("mindcv")
    net = build_model("mindcv", "resnet18", {"num_classes": 3})
    assert net.classifier.weight.shape[0] == 3
    with pytest.raises(ModelError, match=r"no network 'resnet51'.*did you mean 'resnet50'"):
        build_model("mindcv", "resnet51", {})
