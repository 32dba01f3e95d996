"""The objects a recipe describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from msqkd.checkpoints import LoadReport, load_checkpoint
from msqkd.data import DataBundle, InputSpec, Split, as_tuple, fair_order, load_data, subset
from msqkd.distill.losses import hard_loss
from msqkd.errors import DataError, ModelError, did_you_mean
from msqkd.graph.capture import capture
from msqkd.graph.cell import read_parameters, to_cell
from msqkd.graph.gradients import gradient_error
from msqkd.graph.ir import Graph
from msqkd.graph.load import load_mindir, mindir_inputs
from msqkd.models import build_model, default_input_shape
from msqkd.quant.algorithms.base import Method
from msqkd.quant.algorithms.methods import METHODS
from msqkd.quant.config import QuantConfig, Rule, WeightQuantizer
from msqkd.quant.placement import make_plan
from msqkd.quant.plan import QuantPlan
from msqkd.quant.presets import preset
from msqkd.quant.qat import deployment_graph
from msqkd.quant.qparams import MIN_BITS
from msqkd.quant.schedule import FRONT, BitStage, QatSchedule
from msqkd.recipe import ActivationOverride, ModelSection, Recipe, TeacherSection, TrainSection, WeightOverride
from msqkd.recipe import Rule as RuleSection
from msqkd.train.metric import ACCURACY, Metric
from msqkd.train.step import OnFirst
from msqkd.user_code import find_python, make, place_of, reason_of

_TRIED = 2  # samples a loss is tried with


def input_specs(recipe: Recipe) -> tuple[InputSpec, ...]:
    """What the network takes, in the order of its arguments.

    Raises:
        ModelError: neither the recipe nor the model says.
    """
    model = recipe.model
    if model.source == "mindir":
        return _file_specs(model)
    if model.inputs:
        named = [item.name or f"input {number}" for number, item in enumerate(model.inputs)]
        return tuple(InputSpec(name, tuple(item.shape), item.dtype) for name, item in zip(named, model.inputs))
    shape = model.input_shape or default_input_shape(model.source, model.name, model.args)
    if shape is None:
        raise ModelError(
            f"model '{model.name or model.target}' does not say its input shape; set model.input_shape: [C, H, W], or "
            "model.inputs"
        )
    return (InputSpec("image", tuple(shape)),)


def _file_specs(model: ModelSection) -> tuple[InputSpec, ...]:
    """The inputs of a MindIR file; what the recipe says of them must agree."""
    assert model.file is not None
    types = mindir_inputs(model.file)
    named = [item.name for item in model.inputs] or ["image"] * (len(types) == 1)
    if len(types) > 1 and not model.inputs:
        shapes = ", ".join(str(list(kind.shape[1:])) for kind in types)
        raise ModelError(f"model.inputs is missing: {model.file} has {len(types)} inputs, of the shapes {shapes}")
    found = [(list(kind.shape[1:]), kind.dtype) for kind in types]
    if model.inputs and found != [(item.shape, item.dtype) for item in model.inputs]:
        told = ", ".join(f"{item.shape} of {item.dtype}" for item in model.inputs)
        held = ", ".join(f"{shape} of {dtype}" for shape, dtype in found)
        raise ModelError(f"model.inputs: found {told}, but {model.file} takes {held}")
    if model.input_shape is not None and model.input_shape != found[0][0]:
        raise ModelError(f"model.input_shape: found {model.input_shape}, but {model.file} takes {found[0][0]}")
    return tuple(
        InputSpec(name or f"input {number}", tuple(shape), dtype)
        for number, (name, (shape, dtype)) in enumerate(zip(named, found))
    )


def example_input(recipe: Recipe) -> Any:
    """An input of the network for `msqkd.graph.capture.capture`: Tensors of one sample, all 0.

    Raises:
        ModelError: as `input_specs`.
    """
    return tuple(ms.Tensor(np.zeros((1, *spec.shape), spec.dtype)) for spec in input_specs(recipe))


def capture_network(recipe: Recipe, net: Any) -> Graph:
    """The graph of the recipe's network, which knows what of it is deployed.

    Raises:
        CaptureError: the network cannot be captured.
        ModelError: the recipe describes other inputs or outputs than the network has.
    """
    if recipe.model.source == "mindir":
        input_specs(recipe)  # what the recipe says of the inputs is checked
        graph = net.graph.copy()
        read_parameters(net, graph)
    else:
        graph = capture(net, example_input(recipe))
    _check_names(recipe, graph)
    outputs = recipe.model.outputs
    check_numbers(outputs or (), graph, "model.outputs")
    if outputs is not None and outputs != list(range(len(graph.outputs))):
        graph.deployed = tuple(outputs)
    return graph


def _check_names(recipe: Recipe, graph: Graph) -> None:
    """The names given are those of the arguments, in their order: exchanged inputs would go unnoticed."""
    for index, (item, found) in enumerate(zip(recipe.model.inputs, graph.inputs)):
        if item.name is not None and item.name != found:
            hint = did_you_mean(item.name, graph.inputs)
            raise ModelError(
                f"model.inputs[{index}].name: found '{item.name}', allowed: '{found}', since {graph.name} takes "
                f"{', '.join(graph.inputs)}{hint}"
            )


def check_numbers(numbers: Sequence[int], graph: Graph, where: str) -> None:
    """Raise ModelError where one of `numbers` is not that of an output of `graph`; `where` is the recipe's key."""
    for number in numbers:
        if number >= len(graph.outputs):
            raise ModelError(
                f"{where}: found {number}, allowed: 0 to {len(graph.outputs) - 1}, the outputs of {graph.name}"
            )


def build_network(section: ModelSection | TeacherSection, where: str) -> Any:
    """The network of a section, with its checkpoint where it has one; that of a MindIR file carries its `graph`."""
    return load_network(section, where)[0]


def load_network(section: ModelSection | TeacherSection, where: str) -> tuple[Any, Optional[LoadReport]]:
    """As `build_network`, with what was loaded from the checkpoint, where there is one."""
    report = None
    if section.source == "mindir":
        assert section.file is not None
        net = to_cell(load_mindir(section.file, fixed_batch=False))
    else:
        name = section.target if section.source == "python" else section.name
        net = build_model(section.source, name, section.args, where=where)
        if section.checkpoint is not None:
            report = load_checkpoint(net, section.checkpoint, name_map=section.name_map)
    net.set_train(False)
    return net, report


def random_weights(
    section: ModelSection | TeacherSection, weights: Mapping[str, np.ndarray], where: str
) -> Optional[str]:
    """Find weights that a factory without a checkpoint leaves random: they differ from one call to the next.

    Args:
        section: the network's section.
        weights: what the first call gave, by parameter name.
        where: the section's key, for messages.

    Returns:
        None, or a warning if some of the weights are random.

    Raises:
        ModelError: all are.
    """
    if section.source != "python" or section.checkpoint is not None:
        return None
    again = {item.name: item.asnumpy() for item in build_network(section, where).get_parameters()}
    compared = [name for name, array in weights.items() if array.ndim > 1 and name in again]
    random = [name for name in compared if not np.array_equal(weights[name], again[name])]
    if not random:
        return None
    found = f"'{section.target}' gives random weights: '{random[0]}' differs between two calls"
    cure = f"give the file of its weights here or with --set {where}.checkpoint=FILE, or load them in the factory"
    if len(random) == len(compared):
        raise ModelError(
            f"{where}.checkpoint: is missing, and {found}; {cure}"
            + (", or train them in a pretrain section" if where == "model" else "")
        )
    return f"{where}: {found} ({len(random)} of {len(compared)} weights do); {cure}"


def load_bundle(recipe: Recipe) -> DataBundle:
    """The recipe's data, fitted to the network's inputs."""
    data, specs = recipe.data, input_specs(recipe)
    plain = data.name == "python" or bool(recipe.model.inputs)
    return load_data(
        data.name,
        data.root,
        input_shape=None if plain else specs[0].shape,
        inputs=specs if plain else (),
        target=data.target,
        args=data.args,
        augment=tuple(data.augment),
        mean=data.mean,
        std=data.std,
        seed=recipe.seed,
    )


def check_classes(bundle: DataBundle, classes: int, training: bool = True) -> None:
    """Labels must be among the network's answers; those of the training set only where `training` needs them.

    Raises:
        DataError: a label is out of range, or a split has none.
    """
    for split in (bundle.train, bundle.test) if training else (bundle.test,):
        if split.labels_of(np.arange(1)) is None:
            raise DataError(f"{split.name} has no labels; training and evaluation need them")
        split.check_labels(classes)


def metric_of(recipe: Recipe) -> Metric:
    """What the recipe's networks are judged by.

    Raises:
        ModelError: its function cannot be found.
    """
    section = recipe.evaluation
    if section.metric is None:
        return ACCURACY
    function = find_python(section.metric, "evaluation.metric")
    return Metric(section.name or section.metric, function, section.higher_is_better)


def training_loss(settings: TrainSection, graph: Graph, where: str) -> nn.Cell:
    """The loss against the labels, called with all outputs of `graph`, then the labels.

    Args:
        settings: whose loss it is.
        graph: the captured network.
        where: the section's key, for messages.

    Raises:
        ModelError: the user's loss cannot be made, or is no cell.
    """
    if settings.loss is None:
        loss = hard_loss("label_smoothing" if settings.label_smoothing else "cross_entropy", settings.label_smoothing)
        assert loss is not None
        return OnFirst(loss) if len(graph.outputs) > 1 else loss
    place = f"{where}.loss"
    loss = make(find_python(settings.loss, place), settings.loss, settings.loss_args, place)
    if not isinstance(loss, nn.Cell):
        raise ModelError(f"{place}: '{settings.loss}' gave a {type(loss).__name__}; a mindspore.nn.Cell is needed")
    return loss


def try_loss(make_loss: Callable[[], nn.Cell], graph: Graph, train: Split, place: str) -> None:
    """Compute a loss against the labels and its gradient once, so that a wrong one is refused before any training.

    Args:
        make_loss: Makes the loss, called with all outputs of `graph`, then the labels.
        graph: The captured network.
        train: Split of which the first samples are used.
        place: Key and name of the loss, for messages.

    Raises:
        ModelError: The loss fails, gives anything but a scalar, or has no gradient.
    """
    inputs, labels = train.batch(np.arange(min(_TRIED, len(train))))
    found = to_cell(graph)(*map(ms.Tensor, as_tuple(inputs)))
    outputs = found if isinstance(found, tuple) else (found,)
    given = [*outputs, *map(ms.Tensor, as_tuple(labels))]
    try:
        value = make_loss()(*given)
    except ModelError:
        raise
    except Exception as error:  # MindSpore raises whatever its compiler met
        shapes = ", ".join(str(tuple(item.shape)) for item in given)
        raise ModelError(
            f"{place} fails on {len(outputs)} outputs and {len(given) - len(outputs)} labels of shapes {shapes}: "
            f"{reason_of(error)}{place_of(error)}"
        ) from error
    if not isinstance(value, ms.Tensor) or value.ndim or not value.is_floating_point():
        what = (
            f"a {value.dtype} Tensor of shape {tuple(value.shape)}"
            if isinstance(value, ms.Tensor)
            else f"a {type(value).__name__}"
        )
        raise ModelError(f"{place} gives {what}; a scalar of type float32 is needed")
    trained = [index for index, output in enumerate(outputs) if output.is_floating_point()]
    failure = gradient_error(make_loss(), given, trained) if trained else None
    if failure is not None:
        raise ModelError(f"{place} has no gradient: {reason_of(failure)}{place_of(failure)}")


def calibration_split(recipe: Recipe, train: Split, beside: Optional[int] = None) -> Split:
    """Draw calibration samples from the training set, as many as the recipe says.

    The recipe's seed decides the draw, balanced over the classes (see `msqkd.data.fair_order`).

    Args:
        recipe: says how many.
        train: the training set.
        beside: if given, draw so many samples beside those of the calibration, or as many as are left.

    Raises:
        DataError: no sample is left.
    """
    wanted = recipe.calibration.samples
    if recipe.calibration.iterations is not None:
        wanted = min(wanted, recipe.calibration.iterations * recipe.calibration.batch_size)
    order = fair_order(train, recipe.seed)
    return subset(train, order[:wanted] if beside is None else order[wanted : wanted + beside])


def plan_graph(recipe: Recipe, graph: Graph) -> QuantPlan:
    """The plan of a deployment graph by the recipe's `quantization` section.

    Raises:
        PlanError: a rule does not fit.
    """
    default, rules = quant_settings(recipe)
    family = recipe.quantization.preset
    if family is not None:
        rules = [*preset(family).rules_for(graph), *rules]
    return make_plan(graph, default, rules, recipe.target)


def quant_settings(recipe: Recipe) -> tuple[QuantConfig, list[Rule]]:
    """The recipe's `quantization` section as default settings and rules, without those of a preset."""
    weight, activation = recipe.quantization.weight, recipe.quantization.activation
    default = QuantConfig(
        weight_quantizer=WeightQuantizer(weight.bits, weight.per_channel, weight.observer, weight.learned),
        act_quant_dtype=activation.bits,
        act_quant_delay=activation.delay or 0,
        act_quant_delay_epochs=activation.delay_epochs or 0,
        act_symmetric=activation.symmetric,
        act_observer=activation.observer,
        act_percentile=activation.percentile or QuantConfig.act_percentile,
        act_learned=activation.learned,
        precision=recipe.quantization.precision,
    )
    rules = [_rule(i, section) for i, section in enumerate(recipe.quantization.rules)]
    return default, rules


def qat_schedule(recipe: Recipe, steps_per_epoch: int) -> QatSchedule:
    """What of the plan is in force at which step of the recipe's training."""
    section = recipe.quantization
    given, parts = section.schedule, section.schedule.progressive
    epochs = (given.freeze_ranges_epoch, given.freeze_batchnorm_epoch)
    bits = [BitStage(item.from_epoch * steps_per_epoch, item.weight, item.activation) for item in given.bits]
    # The last stage is the plan: a rule may have given a layer fewer bits than the others.
    bits[-1:] = [BitStage(stage.from_step, MIN_BITS, MIN_BITS) for stage in bits[-1:]]
    freeze_ranges, freeze_batchnorm = (None if epoch is None else epoch * steps_per_epoch for epoch in epochs)
    return QatSchedule(
        stages=1 if parts is None else parts.stages,
        interval=0 if parts is None else parts.interval or (parts.interval_epochs or 0) * steps_per_epoch,
        order=FRONT if parts is None else parts.order,
        bits=tuple(bits),
        freeze_ranges=freeze_ranges,
        freeze_batchnorm=freeze_batchnorm,
        noise=section.noise,
        pact_decay=section.activation.pact_decay or 0.0,
    )


_WEIGHT_KEYS = {
    "bits": "weight.quant_dtype", "per_channel": "weight.per_channel", "observer": "weight.observer",
    "learned": "weight.learned",
}  # fmt: skip
_ACTIVATION_KEYS = {
    "bits": "act_quant_dtype", "symmetric": "act_symmetric", "observer": "act_observer", "percentile": "act_percentile",
    "delay": "act_quant_delay", "delay_epochs": "act_quant_delay_epochs", "learned": "act_learned",
}  # fmt: skip


def _rule(index: int, section: RuleSection) -> Rule:
    kind, pattern = next((k, v) for k, v in section.match.model_dump().items() if v is not None)
    changes: dict[str, Any] = {}
    if section.precision is not None:
        changes["precision"] = section.precision
    changes.update(_renamed(section.weight, _WEIGHT_KEYS))
    changes.update(_renamed(section.activation, _ACTIVATION_KEYS))
    return Rule(kind, pattern, changes, f"rules[{index}] ({kind}: {pattern})")


def _renamed(section: WeightOverride | ActivationOverride, names: dict[str, str]) -> dict[str, Any]:
    given = section.model_dump(exclude_none=True)
    return {names[key]: value for key, value in given.items() if key in names}


def plan_recipe(recipe: Recipe) -> tuple[Graph, QuantPlan]:
    """Capture the recipe's network and plan it; needs neither data nor weights.

    Raises:
        MsqkdError: the network cannot be built or captured, or a rule does not fit.
    """
    args = {key: value for key, value in recipe.model.args.items() if key != "pretrained"}
    section = recipe.model.model_copy(update={"checkpoint": None, "args": args})
    net = build_network(section, "model")
    graph = capture_network(recipe, net)
    return graph, plan_graph(recipe, deployment_graph(graph))


def ptq_methods(recipe: Recipe) -> list[Method]:
    """What the recipe does to a network that is quantised without training, in order."""
    return [METHODS[name](**getattr(recipe.ptq, name).model_dump()) for name in recipe.ptq.methods]
