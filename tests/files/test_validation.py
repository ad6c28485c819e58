"""JSON of strangers: what is refused, and in which words."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from depthscope.errors import ReportError, SettingsError
from depthscope.files.validation import cleaned, first_problem, read_object
from depthscope.hub.cards.data import DepthCardData


class Row(BaseModel):
    steps: list[int]

    @field_validator("steps")
    @classmethod
    def _has_some(cls, steps: list[int]) -> list[int]:
        if not steps:
            raise ValueError("there is no step\x1b[2J.")
        return steps


def problem_of(content: object, whole: str = "") -> str:
    with pytest.raises(ValidationError) as caught:
        Row.model_validate(content)
    return first_problem(caught.value, whole)


def test_what_is_wrong_is_named_by_its_field_and_cannot_drive_a_terminal() -> None:
    assert problem_of({"steps": [1, "x"]}).startswith("steps.1: Input should be a valid integer")
    assert problem_of({"steps": []}) == "steps: there is no step\ufffd[2J"
    assert problem_of(3, "the file").startswith("the file: Input should be a valid dictionary")
    assert problem_of(3).startswith("Input should be")


def test_a_file_of_others_has_null_for_what_is_not_finite_and_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert read_object(path, 100) == {}
    path.write_text('{"loss": NaN, "best": [Infinity, 1]}')
    assert read_object(path, 100) == {"loss": None, "best": [None, 1]}
    for content, words in (
        ("[1]", "JSON but not an object"),
        ('{"a": 1, "a": 2}', "given twice"),
        (" " * 101, "larger"),
    ):
        path.write_text(content)
        with pytest.raises(ReportError, match=words):
            read_object(path, 100)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [[1]]}, r"a\[0\]\[0\] is nested deeper than 2"),
        ({"a": "x" * 20_001}, "a is a text of 20,001 characters"),
        ({"a": [float("inf")]}, r"a\[0\] is inf"),
        ({"a": 2**63}, "a is an integer beyond 64 bits"),
    ],
)
def test_what_is_too_deep_too_long_or_too_large_is_refused_by_name(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cleaned(value, "the record", max_depth=2)


def test_a_card_names_the_text_that_is_too_long() -> None:
    with pytest.raises(SettingsError, match=r"name is a text of 30,000 characters; at most 20,000"):
        DepthCardData.checked(repo_id="ada/model", name="x" * 30_000)
