"""The objects a recipe describes."""

from __future__ import annotations

from typing import Any, Optional

from msqkd.checkpoints import load_checkpoint
from msqkd.data import DataBundle, Split, check_labels, load_data
from msqkd.distill.losses import DistillLoss
from msqkd.errors import DataError, ModelError
from msqkd.models import build_model, default_input_shape
from msqkd.quant.config import FLOAT, QuantConfig, Rule, WeightQuantizer
from msqkd.recipe import Recipe
from msqkd.recipe.schema import ActivationOverride, ModelSection, TeacherSection, WeightOverride
from msqkd.recipe.schema import Rule as RuleSection

Shape = tuple[int, int, int]


def input_shape(recipe: Recipe) -> Shape:
    """(C, H, W) of the network's input.

    Raises:
        ModelError: neither the recipe nor the model says.
    """
    model = recipe.model
    shape = model.input_shape or default_input_shape(model.source, model.name, model.args)
    if shape is None:
        raise ModelError(
            f"model '{model.name or model.target}' does not say its input shape; set model.input_shape: [C, H, W]"
        )
    return shape[0], shape[1], shape[2]


def build_network(section: ModelSection | TeacherSection, where: str) -> Any:
    """The network of a section, with its checkpoint where it has one."""
    name = section.target if section.source == "python" else section.name
    net = build_model(section.source, name, section.args, where=where)
    if section.checkpoint is not None:
        load_checkpoint(net, section.checkpoint)
    net.set_train(False)
    return net


def load_bundle(recipe: Recipe) -> DataBundle:
    """The recipe's data, fitted to the network's input."""
    data = recipe.data
    return load_data(
        data.name,
        data.root,
        input_shape=input_shape(recipe),
        augment=tuple(data.augment),
        mean=data.mean,
        std=data.std,
        seed=recipe.seed,
    )


def check_classes(bundle: DataBundle, classes: int) -> None:
    """Labels must be among the network's answers.

    Raises:
        DataError: a label is out of range, or a split has none.
    """
    for split in (bundle.train, bundle.test):
        if split.labels is None:
            raise DataError(f"{split.name} has no labels; training and evaluation need them")
        check_labels(split, classes)


def calibration_split(recipe: Recipe, train: Split) -> Split:
    """The first training samples, as many as the recipe says."""
    from msqkd.data import first

    wanted = recipe.calibration.samples
    if recipe.calibration.iterations is not None:
        wanted = min(wanted, recipe.calibration.iterations * recipe.calibration.batch_size)
    return first(train, wanted)


def quant_settings(recipe: Recipe) -> tuple[QuantConfig, list[Rule]]:
    """The recipe's `quantization` section as default settings and rules."""
    weight, activation = recipe.quantization.weight, recipe.quantization.activation
    default = QuantConfig(
        weight_quantizer=WeightQuantizer(weight.bits, weight.per_channel, weight.observer),
        act_quant_dtype=activation.bits,
        act_quant_delay=activation.delay,
        act_symmetric=activation.symmetric,
        act_observer=activation.observer,
        act_percentile=activation.percentile or QuantConfig.act_percentile,
    )
    rules = [_rule(i, section, default) for i, section in enumerate(recipe.quantization.rules)]
    return default, rules


_WEIGHT_KEYS = {"bits": "weight.quant_dtype", "per_channel": "weight.per_channel", "observer": "weight.observer"}
_ACTIVATION_KEYS = {
    "bits": "act_quant_dtype", "symmetric": "act_symmetric", "observer": "act_observer", "percentile": "act_percentile",
    "delay": "act_quant_delay",
}  # fmt: skip


def _rule(index: int, section: RuleSection, default: QuantConfig) -> Rule:
    kind, pattern = next((k, v) for k, v in section.match.model_dump().items() if v is not None)
    changes: dict[str, Any] = {}
    if section.precision == "float":
        changes.update(FLOAT)
    elif section.precision == "int8":
        changes["act_quant_dtype"] = default.act_quant_dtype
    changes.update(_renamed(section.weight, _WEIGHT_KEYS))
    changes.update(_renamed(section.activation, _ACTIVATION_KEYS))
    return Rule(kind, pattern, changes, f"rules[{index}] ({kind}: {pattern})")


def _renamed(section: WeightOverride | ActivationOverride, names: dict[str, str]) -> dict[str, Any]:
    given = section.model_dump(exclude_none=True)
    return {names[key]: value for key, value in given.items() if key in names}


def distill_loss(recipe: Recipe) -> Optional[DistillLoss]:
    """The recipe's distillation loss, or None without distillation."""
    from msqkd.distill.losses import hard_loss

    section = recipe.distillation
    if section is None:
        return None
    hard = hard_loss(section.hard_loss, section.label_smoothing or 0.0)
    return DistillLoss(hard, section.soft_loss, section.alpha, section.temperature)
