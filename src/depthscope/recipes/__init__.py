"""The paper's rule of thumb for deep models: a shape and a budget give a configuration, a training and a sweep.

request.py     the request: depth, width, budget, constraints
shape.py       heads, groups, experts, norms and initialisation
schedule.py    sequence length, batch, learning rate and weight decay
draft.py       all choices for one number of experts, fitted to the memory of a GPU
evidence.py    what the paper and our own small models found about each choice
ablation.py    the sweep from the plain model to the recipe, step by step
rule.py        `recipe` and `Recipe`
tables.py      the evidence as a table
write.py       the files
"""

from depthscope.recipes.rule import Recipe, recipe
from depthscope.recipes.tables import recipe_markdown

__all__ = ["Recipe", "recipe", "recipe_markdown"]
