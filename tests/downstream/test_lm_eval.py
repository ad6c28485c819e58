"""A native export scores in lm-eval, loaded by plain transformers, as the DepthLM that it came from does."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from depthlm import tiny_depthlm
from depthscope.conversion import to_native
from tiny_tokenizer import save_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

QUESTIONS = [
    {
        "question": f"The layers of a model pass {word}",
        "choices": ["on a stream", "nothing", "little"],
        "answer": answer,
    }
    for word, answer in (("on", 0), ("all", 1), ("some", 2), ("a", 0), ("to", 1), ("it", 2))
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a local multiple-choice task."""
    folder = tmp_path_factory.mktemp("task")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    settings = {
        "task": "layers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "layers.yaml").write_text(yaml.safe_dump(settings))
    return folder


def evaluate(model: PreTrainedModel, tokenizer: Any, task: Path) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["layers"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("kind", ["scaled_pre", "moe_shared"])
def test_a_native_export_has_equal_scores_in_lm_eval(kind: str, task: Path, tmp_path: Path) -> None:
    model = tiny_depthlm(kind, vocab_size=300)
    to_native(model).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    native, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(native).__module__.startswith("transformers.models.")
    ours, theirs = evaluate(model, tokenizer, task), evaluate(native, tokenizer, task)
    assert ours["results"]["layers"] == theirs["results"]["layers"]
    assert len(ours["samples"]["layers"]) == len(QUESTIONS)
    for one, other in zip(ours["samples"]["layers"], theirs["samples"]["layers"], strict=True):
        scores = [[score for score, _ in sample["filtered_resps"]] for sample in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        assert len(set(scores[0])) == 3
