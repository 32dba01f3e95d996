"""The sections of a recipe that say which network: the model, its inputs, the teachers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import (
    Discriminator,
    Field,
    Tag,
)

from msqkd.recipe.fields import Count, Factory, FreeMapping, Outputs, Positive, Section, Shape, Text, only_with
from msqkd.recipe.problems import ONE, SEVERAL, Allowed, Problem, show


class _Network(Section):
    """What the student's and the teacher's section share."""

    source: str
    name: Optional[Text] = Field(
        default=None, description="The network's name in its source; required by msqkd and mindcv."
    )
    target: Optional[Factory] = Field(
        default=None, description="The function that builds the network; source python only."
    )
    file: Optional[Text] = Field(
        default=None, description="The MindIR file that holds the network and its weights; source mindir only."
    )
    args: FreeMapping = Field(default={}, description="Keyword arguments of the network's factory.")
    input_shape: Optional[Shape] = Field(default=None, description="Shape of one input; null takes the network's own.")
    checkpoint: Optional[Text] = Field(
        default=None, description="File of trained weights: .ckpt, .safetensors, .npz, .pth, .pt or .th."
    )
    name_map: Optional[Text] = Field(
        default=None, description="JSON file {name in the checkpoint: name in the network}; with a checkpoint only."
    )

    @property
    def downloads(self) -> bool:
        """Whether the source itself brings trained weights (mindcv with ``args.pretrained: true``)."""
        return self.source == "mindcv" and self.args.get("pretrained") is True

    @property
    def has_weights(self) -> bool:
        """Return True if the source itself can bring trained weights: by a download, in its file, or in its factory."""
        return self.downloads or self.source in ("mindir", "python")

    def _conflicts(self) -> Iterator[Problem]:
        if self.source == "python":
            if self.target is None:
                yield Problem(("target",), "is missing, required by source: python, for instance 'my_nets:resnet'")
            if self.name is not None:
                yield Problem(("name",), f"found {self.name!r}, not allowed with source: python, which uses target")
        elif self.source in ("msqkd", "mindcv"):
            if self.name is None:
                yield Problem(("name",), f"is missing, required by source: {self.source}, for instance 'resnet50'")
            if self.target is not None:
                yield only_with("target", self.target, "source", "python")
        if self.source == "mindir":
            if self.file is None:
                yield Problem(("file",), "is missing, required by source: mindir, for instance 'net.mindir'")
            for key in ("name", "target", "args", "checkpoint"):
                if getattr(self, key):
                    text = f"found {show(getattr(self, key))}, not allowed with source: mindir, whose file has it all"
                    yield Problem((key,), text)
        elif self.file is not None:
            yield only_with("file", self.file, "source", "mindir")
        if self.name_map is not None and self.checkpoint is None:
            yield Problem(("name_map",), f"found {self.name_map!r}, allowed only with a checkpoint")
        if self.checkpoint is not None and self.downloads:
            yield Problem(("checkpoint",), "two origins of the weights, this file and args.pretrained: true; keep one")


InputDtype = Literal["float32", "int32", "int64", "bool"]


class InputSection(Section):
    """One input of the network, in the order of its arguments."""

    name: Optional[Text] = Field(
        default=None, description="The argument's name in the network, which is then checked; null takes it as it is."
    )
    shape: list[Count] = Field(description="Shape of one sample, without the batch; [] for a number.")
    dtype: InputDtype = Field(default="float32", description="Type of its values.")


class ModelSection(_Network):
    """The network to be quantised (the student)."""

    source: Literal["msqkd", "mindcv", "python", "mindir"] = Field(
        default="msqkd", description="Where the network comes from; mindir is a file without Python code."
    )
    inputs: list[InputSection] = Field(
        default=[],
        description="The inputs of a network that has several, or one that is not an image; in place of input_shape.",
    )
    outputs: Optional[Outputs] = Field(
        default=None,
        description="The outputs that are deployed, by their numbers; the others (auxiliary heads) are trained only. "
        "null deploys all.",
    )

    def _conflicts(self) -> Iterator[Problem]:
        yield from super()._conflicts()
        if self.inputs and self.input_shape is not None:
            yield Problem(("inputs",), "two descriptions of the input, this one and input_shape; keep one")
        names = [item.name for item in self.inputs if item.name is not None]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Problem(("inputs",), f"the name '{name}' is given twice")


class TeacherSection(_Network):
    """The float network whose outputs the student imitates, or a list of several; used by `distillation` only."""

    source: Literal["self", "msqkd", "mindcv", "python", "mindir"] = Field(
        default="self", description="Where the teacher comes from; self is the trained float model itself."
    )
    weight: Positive = Field(
        default=1.0, description="What its soft loss counts among those of several teachers; combine weighted only."
    )

    def _conflicts(self) -> Iterator[Problem]:
        yield from super()._conflicts()
        if self.source == "self":
            for key in ("name", "target", "args", "input_shape", "checkpoint"):
                if getattr(self, key):
                    yield Problem((key,), f"found {show(getattr(self, key))}, not allowed with source: self")
        elif self.checkpoint is None and not self.has_weights:
            yield Problem(
                ("checkpoint",),
                "is missing, a teacher must be trained; give the file of its weights here or with "
                "--set teacher.checkpoint=FILE",
            )


def _one_or_several(value: Any) -> str:
    return SEVERAL if isinstance(value, list) else ONE


Teachers = Annotated[
    Union[
        Annotated[TeacherSection, Tag(ONE)],
        Annotated[list[TeacherSection], Field(min_length=1), Tag(SEVERAL)],
    ],
    Discriminator(_one_or_several),
    Allowed("a section, or a list of sections, at least one"),
]
