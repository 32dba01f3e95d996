"""Recipes: YAML to typed, validated settings and back."""

from __future__ import annotations

from msqkd.recipe.builtin import BuiltinRecipe, list_builtin, recipe_folders
from msqkd.recipe.loader import dump_recipe, load_recipe, make_recipe
from msqkd.recipe.schema import (
    COMPARISONS,
    TARGETS,
    ActivationOverride,
    ActivationSection,
    CalibrationSection,
    DataSection,
    DistillationSection,
    ExportSection,
    Match,
    ModelSection,
    QuantizationSection,
    Recipe,
    Rule,
    TeacherSection,
    TrainSection,
    WeightOverride,
    WeightSection,
    path_pattern,
)

__all__ = [
    "COMPARISONS",
    "TARGETS",
    "ActivationOverride",
    "ActivationSection",
    "BuiltinRecipe",
    "CalibrationSection",
    "DataSection",
    "DistillationSection",
    "ExportSection",
    "Match",
    "ModelSection",
    "QuantizationSection",
    "Recipe",
    "Rule",
    "TeacherSection",
    "TrainSection",
    "WeightOverride",
    "WeightSection",
    "dump_recipe",
    "list_builtin",
    "load_recipe",
    "make_recipe",
    "path_pattern",
    "recipe_folders",
]
