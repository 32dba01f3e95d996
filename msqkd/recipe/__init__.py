"""Recipes: YAML to typed, validated settings and back."""

from __future__ import annotations

from msqkd.recipe.builtin import BuiltinRecipe, list_builtin, recipe_folders
from msqkd.recipe.distillation import DistillationSection
from msqkd.recipe.fields import path_pattern
from msqkd.recipe.loader import dump_recipe, load_recipe, make_recipe
from msqkd.recipe.network import ModelSection, TeacherSection
from msqkd.recipe.quantization import (
    ActivationOverride,
    ActivationSection,
    Match,
    QuantizationSection,
    Rule,
    WeightOverride,
    WeightSection,
)
from msqkd.recipe.schema import COMPARISONS, TARGETS, CalibrationSection, ExportSection, Recipe
from msqkd.recipe.training import DataSection, TrainSection

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
