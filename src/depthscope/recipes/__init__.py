"""The paper's rule of thumb for deep models: from a shape and a budget to a configuration, training and a sweep.

request.py     what is asked for: depth, width, budget, constraints
shape.py       heads, groups, experts, norms and initialisation
schedule.py    sequence length, batch, learning rate and weight decay
draft.py       everything decided for a number of experts, fitted to the memory of a GPU
evidence.py    what the paper and our own small models found of each choice
ablation.py    the sweep that goes from the plain model to the recipe, step by step
rule.py        all of it together: `recipe` and `Recipe`
shown.py       the evidence as a table
write.py       the files
"""

from depthscope.recipes.rule import Recipe, recipe
from depthscope.recipes.shown import recipe_markdown

__all__ = ["Recipe", "recipe", "recipe_markdown"]
