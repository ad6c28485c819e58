"""A recipe as files: the model's configuration, the Trainer's arguments, the sweep, and the reasons."""

import os
from pathlib import Path

from depthscope.errors import ReportError
from depthscope.files.atomic import write_together
from depthscope.recipes.rule import Recipe
from depthscope.recipes.tables import recipe_markdown
from depthscope.runs.layout import SWEEP_FILE
from depthscope.wording.messages import listed

__all__ = ["write_recipe"]

REASONS = "recipe.md"


def write_recipe(recipe: Recipe, folder: Path) -> list[Path]:
    """Write the files of a recipe to a folder, which is created if needed; an earlier recipe there is replaced.

    Returns:
        The files: config.json, training_arguments.json, sweep.yaml and recipe.md.

    Raises:
        ReportError: the folder cannot be created or written to, or has files of these names that are not from a
            recipe; then nothing is written.
    """
    contents = {
        "config.json": recipe.config.to_json_string(),
        "training_arguments.json": recipe.training_json(),
        SWEEP_FILE: recipe.sweep_yaml(),
        REASONS: recipe_markdown(recipe),
    }
    existing = [name for name in contents if os.path.lexists(folder / name)]
    # In a folder with weights, config.json belongs to the model.
    if existing and (REASONS not in existing or any(folder.glob("*.safetensors"))):
        raise ReportError(
            f"{str(folder)!r} holds {listed(existing)} that no recipe wrote and that would be overwritten. Give "
            "another folder."
        )
    return write_together(folder, contents)
