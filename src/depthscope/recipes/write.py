"""A recipe as files: the model's configuration, the Trainer's arguments, the sweep, and the reasons."""

from pathlib import Path

from depthscope.files.atomic import write_together
from depthscope.recipes.rule import Recipe

__all__ = ["write_recipe"]


def write_recipe(recipe: Recipe, folder: Path) -> list[Path]:
    """Write the files of a recipe to a folder, which is made if need be, over those of an earlier one.

    Returns:
        What was written: config.json, training_arguments.json, sweep.yaml and recipe.md.

    Raises:
        ReportError: the folder cannot be made or written to; then none of them is written.
    """
    contents = {
        "config.json": recipe.config.to_json_string(),
        "training_arguments.json": recipe.training_json(),
        "sweep.yaml": recipe.sweep_yaml(),
        "recipe.md": recipe.to_markdown(),
    }
    return write_together(folder, contents)
