"""The section of a recipe that says what a student learns from its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Optional

from annotated_types import Ge, Le
from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from msqkd.distill.schedule import default_temperature
from msqkd.distill.shapes import BY_CHANNEL, OVER_CLASSES
from msqkd.recipe.fields import (
    Fraction,
    Outputs,
    Positive,
    Section,
    Share,
    Temperature,
    Text,
    filled,
    only_with,
    switch,
    value_of,
)
from msqkd.recipe.problems import Problem, show


class FeatureSection(Section):
    """A loss between what a layer of the student and a layer of the teacher compute."""

    student: Text = Field(description="A layer of the student: the path of a cell, or the name of an operation.")
    teacher: Optional[Text] = Field(
        default=None, description="The layer of the teacher; null takes the one of the same name."
    )
    loss: Literal["mse", "attention", "similarity", "relational"] = Field(
        default="mse",
        description="mse of the values, through a trained 1x1 convolution where channels differ (FitNets); distance "
        "of the attention maps; of the similarities between samples; of the distances and angles between samples.",
    )
    weight: Positive = Field(default=1.0, description="What the loss is multiplied by.")
    of: Annotated[int, Ge(0)] = Field(default=0, description="Which of several teachers, counted from 0.")
    axis: Optional[Annotated[int, Ge(1), Le(2)]] = Field(
        default=None,
        description="Axis of the channels in values of three dimensions: 1 for (N, C, L), 2 for tokens (N, T, C), as "
        "which null takes them; loss mse and attention only.",
    )

    def _conflicts(self) -> Iterator[Problem]:
        if self.axis is not None and self.loss not in BY_CHANNEL:
            yield only_with("axis", self.axis, "loss", " or ".join(BY_CHANNEL))

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return filled(values, "teacher", value_of(values, "student"), value_of(values, "student") is not None)


class DistillationSection(Section):
    """The loss by which the student also imitates the teacher (Hinton et al. 2015, arXiv:1503.02531)."""

    alpha: Share = Field(
        default=0.3,
        description="Weight of the soft loss (teacher); the hard loss (labels) has 1 - alpha. It may change from step "
        "to step over the training. Where not given, 0.3 with 8 bits and 0.1 more for each bit less (of weights or "
        "activations, whichever have fewer), and 1 with hard_loss: none.",
    )
    temperature: Optional[Temperature] = Field(
        default=None,
        description="Divides the logits of both networks in the soft loss; soft_loss kl only. It may change as alpha. "
        "null: 5 with 8 bits, falling evenly to 2 with 4 bits, and 2 below.",
    )
    hard_loss: Literal["cross_entropy", "label_smoothing", "train_loss", "none"] = Field(
        default="cross_entropy",
        description="Loss against the labels, of the first output; train_loss is that of train.loss, of all outputs, "
        "and the default where there is one.",
    )
    label_smoothing: Optional[Fraction] = Field(
        default=None, description="Smoothing; hard_loss label_smoothing only, 0.1 there."
    )
    soft_loss: Literal["kl", "mse", "cosine"] = Field(default="kl", description="Loss against the teacher's outputs.")
    axis: Optional[int] = Field(
        default=None,
        description="Axis of the classes in the outputs, negative ones counted from the end, for soft_loss kl and "
        "cosine and for hard_loss cross_entropy and label_smoothing. null: the last axis of (N, C) and of tokens "
        "(N, T, C), and axis 1 of maps (N, C, H, W).",
    )
    outputs: Outputs = Field(default=[0], description="The outputs, by their numbers, the soft loss is the mean over.")
    combine: Literal["weighted", "best"] = Field(
        default="weighted",
        description="Several teachers: the mean of their soft losses by weight, or for each sample the teacher whose "
        "cross-entropy with the label is least.",
    )
    features: list[FeatureSection] = Field(default=[], description="Losses between layers, added to the others.")
    balance: Literal["none", "running"] = Field(
        default="none",
        description="running brings every term of the loss to the mean size the first has had so far; weights are "
        "shares then.",
    )
    cache: Annotated[Literal["off", "auto", "on"], BeforeValidator(switch)] = Field(
        default="off",
        description="The teacher's answers to the training set are computed once and kept in the run's folder while it "
        "trains, in place of the teacher in every step; without features only. auto does so where that saves time and "
        "changes nothing, and says why not elsewhere.",
    )
    cache_view: Optional[Literal["same", "clean"]] = Field(
        default=None,
        description="What the teacher has seen: same is what the student sees, so nothing may be augmented; clean is "
        "the sample as it is, whose answer then stands for every augmented form. cache on or auto only, same there.",
    )
    cache_top_k: Optional[Annotated[int, Ge(1)]] = Field(
        default=None,
        description="Keep the K largest logits of an answer only, and the probability of all other classes together, "
        "which is spread evenly; for many classes. cache on or auto, and soft_loss kl only.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        values = filled(values, "temperature", default_temperature(8), value_of(values, "soft_loss", "kl") == "kl")
        values = filled(values, "cache_view", "same", switch(value_of(values, "cache", "off")) != "off")
        return filled(values, "label_smoothing", 0.1, value_of(values, "hard_loss") == "label_smoothing")

    @property
    def needs_labels(self) -> bool:
        """Whether the training needs to know what is right."""
        return self.hard_loss != "none" or self.combine == "best"

    def _conflicts(self) -> Iterator[Problem]:
        if self.label_smoothing is not None and self.hard_loss != "label_smoothing":
            yield only_with("label_smoothing", self.label_smoothing, "hard_loss", "label_smoothing")
        if self.temperature is not None and self.soft_loss != "kl":
            yield only_with("temperature", self.temperature, "soft_loss", "kl")
        if self.axis is not None:
            if self.soft_loss not in OVER_CLASSES and self.hard_loss not in ("cross_entropy", "label_smoothing"):
                yield only_with("axis", self.axis, "soft_loss", " or ".join(OVER_CLASSES))
            if self.axis == 0:
                yield Problem(("axis",), "found 0, the batch, allowed: the axis of the classes")
        alone = self.hard_loss == "none" or self.alpha == 1
        if self.balance != "none" and alone and not self.features:
            yield Problem(("balance",), f"found '{self.balance}', not allowed where the soft loss is the only term")
        yield from self._cache_conflicts()

    def _cache_conflicts(self) -> Iterator[Problem]:
        for key, value in (("cache_view", self.cache_view), ("cache_top_k", self.cache_top_k)):
            if value is not None and self.cache == "off":
                yield Problem((key,), f"found {show(value)}, allowed only with cache: on or cache: auto")
        if self.cache_top_k is not None and self.soft_loss != "kl":
            yield only_with("cache_top_k", self.cache_top_k, "soft_loss", "kl")
        if self.cache == "on" and self.features:
            text = "found 'on', not allowed with features, which watch the teacher's layers in every step"
            yield Problem(("cache",), text)
