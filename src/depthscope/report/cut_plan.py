"""`CutPlan`: in which order to remove layers, and what the loss becomes, as JSON.

    schema_version, created     the schema (1) and when the plan was made (ISO 8601)
    model, data                 the model, and the text that layers were chosen and losses measured on
    settings, versions, notes   how it was made
    loss, loss_se               of the whole model, nats per token
    steps                       after removing k = 1, 2, ... layers: which, the loss with nothing in the gaps, with maps
                                over them, and with other weights before them, the standard errors of their differences
                                to the whole model, parameters

Losses are measured on blocks that were not used to choose layers or to fit maps. Layers count from 0.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from depthscope.errors import PlanError
from depthscope.files.atomic import read_text, write_atomically
from depthscope.files.strict_json import encode, parse
from depthscope.files.validation import cleaned, first_value
from depthscope.report.report import DataFacts, ModelFacts

__all__ = ["CutPlan", "CutStep"]

SCHEMA_VERSION: Final = 1
MAX_BYTES = 16 * 2**20
MAX_DEPTH = 8

Loss = Annotated[float, Field(ge=0)]
Layer = Annotated[int, Field(ge=0, lt=10_000)]


class CutStep(BaseModel):
    """A model with some layers removed.

    Attributes:
        removed: the layers, in rising order.
        loss: with nothing in the gaps, nats per token.
        loss_se: standard error of its difference to the whole model's loss, over blocks; None from one block.
        map_loss: with an affine map over each gap; None where that is not finite.
        map_loss_se: as `loss_se`.
        weights_loss: with other weights in the layer before each gap, which leaves a model of the same class.
        weights_loss_se: as `loss_se`.
        parameters: of the model without the layers, without maps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    removed: list[Layer]
    loss: Loss | None
    loss_se: Loss | None = None
    map_loss: Loss | None = None
    map_loss_se: Loss | None = None
    weights_loss: Loss | None = None
    weights_loss_se: Loss | None = None
    parameters: Annotated[int, Field(ge=0)]

    @property
    def best_loss(self) -> float | None:
        """The lowest of the losses."""
        losses = (self.loss, self.map_loss, self.weights_loss)
        return min((loss for loss in losses if loss is not None), default=None)


class CutPlan(BaseModel):
    """The order in which layers are removed, with the whole curve of losses; see the module's docstring.

    Raises:
        pydantic.ValidationError: a field is missing, of the wrong type, not finite, or contradicts another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["cut plan"] = "cut plan"
    created: str
    model: ModelFacts
    data: DataFacts
    settings: dict[str, JsonValue]
    versions: dict[str, str | None]
    notes: list[str] = Field(default_factory=list)
    loss: Loss
    loss_se: Loss | None = None
    parameters: Annotated[int, Field(ge=0)]
    steps: list[CutStep]

    @model_validator(mode="before")
    @classmethod
    def _bound_and_clean(cls, values: Any) -> Any:
        return cleaned(values, "plan", max_depth=MAX_DEPTH) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _steps_are_cuts(self) -> "CutPlan":
        layers = self.model["num_layers"]
        for count, step in enumerate(self.steps, 1):
            if step.removed != sorted(set(step.removed)) or len(step.removed) != count:
                raise ValueError(f"steps[{count - 1}].removed is {step.removed}, expected {count} in rising order")
            if step.removed[-1] >= layers or count >= layers:
                raise ValueError(f"steps[{count - 1}] removes layers that a model of {layers} does not have to spare")
        return self

    def removed(self, count: int) -> list[int]:
        """The layers that are gone after removing `count`.

        Raises:
            PlanError: the plan does not go so far.
        """
        if not 0 <= count <= len(self.steps):
            raise PlanError(f"{count} layers were asked for, but the plan removes 0 to {len(self.steps)}.")
        return list(self.steps[count - 1].removed) if count else []

    def kept(self, count: int) -> list[int]:
        """The layers that are left after removing `count`; see `removed`."""
        gone = set(self.removed(count))
        return [layer for layer in range(self.model["num_layers"]) if layer not in gone]

    def most_within(self, loss: float, *, repaired: bool = True) -> int:
        """How many layers can be removed while the loss stays at most `loss`, nats per token."""
        found = 0
        for count, step in enumerate(self.steps, 1):
            reached = step.best_loss if repaired else step.loss
            found = count if reached is not None and reached <= loss else found
        return found

    def to_json(self) -> str:
        """Write the plan as JSON; equal content gives equal bytes."""
        return encode(self.model_dump()) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan to a JSON file, completely or not at all."""
        return write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CutPlan":
        """Read a plan from a JSON file, and check all its content.

        Raises:
            PlanError: the file is no valid plan; the message names the field.
            ReportError: the file is missing, too large, or no JSON.
        """
        source = repr(os.fspath(path))
        content = parse(read_text(path, MAX_BYTES), source)
        if not isinstance(content, dict) or content.get("kind") != "cut plan":
            raise PlanError(f"{source} is JSON but not a plan of a cut; give a file that `depthscope prune` wrote.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise PlanError(f"{source} is not a valid plan: {first_value(error)}.") from error
