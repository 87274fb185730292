"""The recipe: what the user asked for.

`load` reads YAML strictly, follows `extends:`, applies `--set`, validates, and reports every
mistake at once, each at the file, line and column where it was written.
"""

from lorafit.recipe.load import load
from lorafit.recipe.schema import (
    DatasetSection,
    LoraSection,
    ModelSection,
    QuantizationSection,
    Recipe,
    Source,
    TrainingSection,
)
from lorafit.recipe.yaml import Mistake, Position, RecipeError

__all__ = [
    "DatasetSection",
    "LoraSection",
    "Mistake",
    "ModelSection",
    "Position",
    "QuantizationSection",
    "Recipe",
    "RecipeError",
    "Source",
    "TrainingSection",
    "load",
]
