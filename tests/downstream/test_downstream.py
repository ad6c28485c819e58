"""Downstream accuracy: what lm-eval measures is what log-likelihoods computed by hand say."""

import importlib.metadata
import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from depthlm import tiny_depthlm
from depthscope.cli import app
from depthscope.downstream.tasks import GROUPS, KNOWN, load_tasks, select
from depthscope.errors import CorpusError, ModelLoadError, OutOfMemoryError, ReportError, SettingsError
from depthscope.loading.loaded import LoadedModel
from depthscope.report.accuracy import Accuracy, Downstream
from depthscope.report.report import LayerReport
from models import tiny_llama
from reports import sample_content
from tiny_tokenizer import save_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance

from depthscope.downstream import harness
from depthscope.downstream.evaluation import evaluate

QUESTIONS = [
    {
        "id": str(index),
        "question": f"What do the layers of a model {word}",
        "choices": {"text": ["a stream", "nothing", "a little of it", "on"][:size], "label": list("ABCD")[:size]},
        "answerKey": answer,
    }
    for index, (word, size, answer) in enumerate(
        [("pass", 4, "A"), ("add", 3, "B"), ("stream", 4, "D"), ("on", 2, "A"), ("it", 4, "C"), ("nothing", 3, "C")]
    )
]
CHOICES = sum(len(row["choices"]["text"]) for row in QUESTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of ARC-Easy's shape."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(vocab_size=300, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny DepthLM with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-depthlm"
    tiny_depthlm("moe_shared", vocab_size=300, max_position_embeddings=512).save_pretrained(path)
    save_tokenizer(path)
    return path


# ------------------------------------------------------------------------------------------------ by hand


def log_likelihood(model: PreTrainedModel, tokenizer: Any, question: str, answer: str) -> float:
    """The log-probability of the tokens of an answer after a question, one forward pass an answer, in nats."""
    context, whole = tokenizer(question).input_ids, tokenizer(question + answer).input_ids
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)  # [T, vocabulary]
    return sum(float(scores[place - 1, whole[place]]) for place in range(len(context), len(whole)))


def by_hand(
    model: PreTrainedModel, tokenizer: Any, asked: list[tuple[list[tuple[str, str]], int, list[str]]]
) -> tuple[list[float], list[float]]:
    """Whether the likeliest answer to each question is right; the same with likelihoods over lengths in characters."""
    plain, normed = [], []
    for pairs, right, answers in asked:
        likely = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        over = [value / len(answer) for value, answer in zip(likely, answers, strict=True)]
        plain.append(float(likely.index(max(likely)) == right))
        normed.append(float(over.index(max(over)) == right))
    return plain, normed


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def arc(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int, list[str]]:
    answers = row["choices"]["text"]
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {answer}") for answer in answers]
    return pairs, row["choices"]["label"].index(row["answerKey"]), answers


def boolq(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int, list[str]]:
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return [(prompt, " no"), (prompt, " yes")], int(row["answer"]), ["no", "yes"]


def piqa(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int, list[str]]:
    answers = [row["sol1"], row["sol2"]]
    return [(f"Question: {row['goal']}\nAnswer:", f" {answer}") for answer in answers], row["label"], answers


def winogrande(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int, list[str]]:
    before, after = row["sentence"].split("_", 1)
    pairs = [(before + row[option], f" {after.strip()}") for option in ("option1", "option2")]
    return pairs, int(row["answer"]) - 1, [after.strip()] * 2


def copa(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int, list[str]]:
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    answers = [f" {row[name][0].lower()}{row[name][1:]}" for name in ("choice1", "choice2")]
    return [(f"{row['premise'].strip()[:-1]} {word}", f" {answer}") for answer in answers], row["label"], answers


def commonsense_qa(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int, list[str]]:
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDE", row["choices"]["text"], strict=True))
    prompt = f"Question: {row['question'].strip()}\n{listed}\nAnswer:"
    return [(prompt, f" {letter}") for letter in "ABCDE"], "ABCDE".index(row["answerKey"]), list("ABCDE")


def test_accuracies_are_those_of_log_likelihoods_computed_by_hand(
    model: PreTrainedModel, tokenizer: Any, folder: Path
) -> None:
    found = evaluate(model, tokenizer, tasks="arc_easy", data=folder, batch_size=3)
    plain, normed = by_hand(model, tokenizer, list(map(arc, QUESTIONS)))
    assert plain != normed, "the two metrics are told apart"
    assert [(row.metric, row.value, row.stderr) for row in found.accuracies] == [
        ("acc", *map(pytest.approx, mean_and_error(plain))),
        ("acc_norm", *map(pytest.approx, mean_and_error(normed))),
    ]
    first = found.accuracies[0]
    assert (first.n, first.shots, first.documents) == (6, 0, "arc_easy.jsonl")
    assert first.chance == pytest.approx((1 / 4 + 1 / 3 + 1 / 4 + 1 / 2 + 1 / 4 + 1 / 3) / 6)


@pytest.mark.parametrize(
    ("task", "asked"),
    [
        ("arc_easy", arc),
        ("arc_challenge", arc),
        ("boolq", boolq),
        ("piqa", piqa),
        ("winogrande", winogrande),
        ("copa", copa),
        ("commonsense_qa", commonsense_qa),
    ],
)
def test_a_benchmark_out_of_a_file_asks_and_scores_as_its_definition_says(
    task: str, asked: Callable[..., Any], model: PreTrainedModel, tokenizer: Any, shared_data: Path
) -> None:
    count = 6
    file = shared_data / "eval" / f"{task}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    loaded = load_tasks(select(task, file.parent))[task]
    assert len(loaded.eval_docs) == len(rows), "all rows, and of this file only"
    loaded.config.num_fewshot = 0
    loaded.build_all_requests(limit=count)
    pairs = [pair for row in rows[:count] for pair in asked(row)[0]]
    assert [instance.args for instance in loaded.instances] == pairs

    found = evaluate(model, tokenizer, tasks=task, data=file.parent, limit=count)
    values = {row.metric: row.value for row in found.accuracies}
    plain, normed = by_hand(model, tokenizer, [asked(row) for row in rows[:count]])
    assert values["acc"] == pytest.approx(sum(plain) / count)
    assert "acc_norm" not in values or values["acc_norm"] == pytest.approx(sum(normed) / count)


# ------------------------------------------------------------------------------------------------ definitions


def test_documents_out_of_a_file_change_nothing_else_of_a_task(folder: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager, _yaml_loader

    rows = {
        "boolq": {"passage": "p", "question": "q", "answer": True},
        "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d"] * 4, "label": "3"},
        "sciq": {name: name for name in KNOWN["sciq"]["columns"]},
        "openbookqa": {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    (tmp_path / "arc_easy.jsonl").write_text((folder / "arc_easy.jsonl").read_text())
    tasks = load_tasks(select("paper", tmp_path))
    assert tasks.keys() == {*rows, "arc_easy"}
    for name, task in tasks.items():
        definitions = Path(_yaml_loader.__file__).parent / KNOWN[name]["folder"]
        entry = TaskManager(include_path=str(definitions), include_defaults=False).task_index[name]
        theirs = _yaml_loader.load_yaml(entry.yaml_path, resolve_func=True)
        for key in ("doc_to_text", "doc_to_choice", "metric_list", "output_type", "process_docs", "num_fewshot"):
            ours = getattr(task.config, key)
            # Functions out of a file are loaded anew each time.
            shown = [getattr(value, "__qualname__", value) for value in (ours, theirs.get(key))]
            assert shown[0] == shown[1], (name, key)
        assert (task.config.target_delimiter, task.config.description) == (theirs.get("target_delimiter", " "), "")
        assert task.config.doc_to_target == theirs["doc_to_target"] or name == "boolq"
    assert tasks["boolq"].doc_to_target(rows["boolq"]) == 1
    assert tasks["boolq"].doc_to_target({**rows["boolq"], "answer": False}) == 0
    assert tasks["boolq"].doc_to_target({"passage": "p", "question": "q", "label": 1}) == 1
    assert tasks["hellaswag"].doc_to_choice(tasks["hellaswag"].eval_docs[0]) == ["d"] * 4


def test_every_task_of_a_group_is_known_to_lm_eval() -> None:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    for name in GROUPS["paper"]:
        manager = lm_eval.tasks.TaskManager(include_path=str(root / KNOWN[name]["folder"]), include_defaults=False)
        assert name in manager.task_index


def test_a_group_is_narrowed_to_the_files_there_are_and_says_so(folder: Path) -> None:
    selection = select("paper", folder)
    assert list(selection.files) == ["arc_easy"]
    assert selection.notes[0].startswith("9 tasks have no file")
    assert not select("arc_easy", folder).notes


# ------------------------------------------------------------------------------------------------ what surrounds it


def test_evaluating_leaves_the_model_its_tokenizer_and_all_random_numbers_alone(
    model: PreTrainedModel, tokenizer: Any, folder: Path
) -> None:
    model.train()
    assert tokenizer.pad_token is None
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(1, generator=torch.Generator().manual_seed(3)), random.Random(3).random()
    evaluate(model, tokenizer, tasks="arc_easy", data=folder, limit=1)
    assert (torch.rand(1), random.random()) == expected
    assert model.training
    assert tokenizer.pad_token is None
    model.eval()


def test_the_bar_counts_every_answer_once(
    model: PreTrainedModel, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    @contextmanager
    def watched(total: float, *, visible: bool) -> Iterator[Any]:
        with real(total, visible=False) as shown:
            bars.append(shown)
            yield shown

    real = harness.showing_progress
    monkeypatch.setattr(harness, "showing_progress", watched)
    evaluate(model, tokenizer, tasks="arc_easy", data=folder, batch_size=4)
    assert [(bar.done, bar.total) for bar in bars] == [(CHOICES, CHOICES)]


@pytest.mark.parametrize("take", [lambda: torch.empty(2**60), lambda: np.empty(2**50)])
def test_running_out_of_a_processors_memory_says_what_to_lower(
    model: PreTrainedModel, tokenizer: Any, folder: Path, take: Callable[[], object]
) -> None:
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: take() and None)
    try:
        with pytest.raises(OutOfMemoryError, match=r"Lower the batch size \(now 3\)"):
            evaluate(model, tokenizer, tasks="arc_easy", data=folder, batch_size=3, limit=1)
    finally:
        hook.remove()


def test_another_error_of_the_model_is_not_called_one_of_memory(
    model: PreTrainedModel, tokenizer: Any, folder: Path
) -> None:
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    try:
        with pytest.raises(RuntimeError, match="inconsistent tensor size"):
            evaluate(model, tokenizer, tasks="arc_easy", data=folder, limit=1)
    finally:
        hook.remove()


def test_solved_examples_stand_before_the_question_and_are_counted(
    model: PreTrainedModel, tokenizer: Any, folder: Path
) -> None:
    found = evaluate(model, tokenizer, tasks=["arc_easy"], data=folder, shots=2)
    assert {row.shots for row in found.accuracies} == {2}


def test_questions_that_do_not_fit_are_noted_and_answers_that_do_not_are_refused(tokenizer: Any, folder: Path) -> None:
    short = tiny_llama(vocab_size=300, max_position_embeddings=24)
    found = evaluate(short, tokenizer, tasks="arc_easy", data=folder)
    assert any(
        note.startswith(f"{CHOICES} of {CHOICES} questions with an answer have more tokens") for note in found.notes
    )
    with pytest.raises(SettingsError, match="the model has 4 positions"):
        evaluate(tiny_llama(vocab_size=300, max_position_embeddings=4), tokenizer, tasks="arc_easy", data=folder)


@pytest.mark.parametrize("end_of_answers", [None, 2])
def test_a_tokenizer_without_bos_and_eos_is_no_hindrance_where_none_is_needed(
    end_of_answers: int | None, tokenizer: Any, folder: Path
) -> None:
    model = tiny_llama(vocab_size=300, max_position_embeddings=2048)
    model.generation_config.eos_token_id = end_of_answers
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert (bare.bos_token, bare.eos_token, bare.pad_token, bare.unk_token) == (None,) * 4
    plain, _ = by_hand(model, bare, [arc(row) for row in QUESTIONS])
    found = evaluate(model, bare, tasks="arc_easy", data=folder)
    assert next(row.value for row in found.accuracies if row.metric == "acc") == pytest.approx(sum(plain) / len(plain))
    assert bare.pad_token is None

    asked = harness.HarnessModel(LoadedModel(model, bare, {}), batch_size=4, progress=False, terminal=sys.stderr)
    until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    questions = ["it", "The layers of a model", "Each adds a little to it, and"]
    answers = asked.generate_until([Instance("generate_until", {}, (text, dict(until)), 0) for text in questions])
    for text, answer in zip(questions, answers, strict=True):
        ids = torch.tensor([bare(text).input_ids])
        alone = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        ended = [int(index) for index in alone if int(index) != end_of_answers]
        assert answer == bare.decode(ended, skip_special_tokens=True).split("\n")[0]
    for kind, arguments in (("loglikelihood", ("", " it")), ("loglikelihood_rolling", ("it",))):
        with pytest.raises(SettingsError, match=r"the tokenizer has neither\. Set its"):
            getattr(asked, kind)([Instance(kind, {}, arguments, 0)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ""}, SettingsError, "No task was given"),
        ({"tasks": "copa"}, CorpusError, "has no documents for copa. It holds arc_easy"),
        ({"data": "/no/such/folder"}, CorpusError, "There is no folder"),
        ({"limit": 0}, SettingsError, "limit is 0"),
        ({"tasks": "hellaswag", "data": None}, CorpusError, "the Hugging Face Hub cannot be reached"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_reason(
    options: dict[str, Any], error: type[Exception], message: str, model: PreTrainedModel, tokenizer: Any, folder: Path
) -> None:
    with pytest.raises(error, match=message):
        evaluate(model, tokenizer, **{"tasks": "arc_easy", "data": folder, **options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "q", "choices": {"text": [], "label": []}}', "have no answerKey, which arc_easy needs"),
        ("[1]", "have no question, choices, answerKey"),
        ("", "is not a file of JSON lines"),
        ("{broken", "is not a file of JSON lines"),
        (json.dumps(QUESTIONS[0]) + "\n{broken", "cannot be read"),
    ],
)
def test_a_damaged_file_of_documents_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "arc_easy.jsonl").write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_tasks(select("arc_easy", tmp_path))


def test_a_model_without_a_tokenizer_is_refused(model: PreTrainedModel, folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="has no tokenizer"):
        evaluate(model, tasks="arc_easy", data=folder)


def test_without_lm_eval_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # Python's own way to make an import fail
    run = CliRunner().invoke(app, ["evaluate", "model", "--data", str(folder)])
    assert run.exit_code == 2
    assert 'pip install "depthscope[eval]"' in run.output


# ------------------------------------------------------------------------------------------------ the record


def row(task: str, metric: str, value: float, stderr: float | None = 0.1) -> Accuracy:
    return Accuracy(task=task, metric=metric, value=value, stderr=stderr, n=10, shots=0)


def record(*rows: Accuracy, **changes: Any) -> Downstream:
    return Downstream(
        **{"created": "2026-11-24T10:00:00+00:00", "model": {"name": "m"}, "accuracies": list(rows), **changes}
    )


def test_means_are_over_tasks_and_a_task_without_acc_norm_counts_with_its_acc() -> None:
    found = record(row("a", "acc", 0.2), row("a", "acc_norm", 0.4), row("b", "acc", 0.6), row("c", "f1", 0.9))
    assert found.mean("acc") == (pytest.approx(0.4), pytest.approx(math.sqrt(0.02) / 2))
    assert found.mean("acc_norm") == (pytest.approx(0.5), pytest.approx(math.sqrt(0.02) / 2))
    assert record(row("c", "f1", 0.9)).mean() is None
    assert record(row("a", "acc", 0.2, None)).mean() == (0.2, None)


def test_a_record_is_read_back_as_it_was_written_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    found = record(row("a", "acc", 0.25), notes=["n"], versions={"lm-eval": "0.4.13"}, settings={"limit": None})
    path = found.save(tmp_path / "d.json")
    assert Downstream.load(path) == found
    for broken in ("[]", "{}", path.read_text().replace("0.25", "NaN"), path.read_text().replace("0.25", '"x"')):
        path.write_text(broken)
        with pytest.raises(ReportError):
            Downstream.load(path)


def test_a_report_carries_accuracies_and_one_without_them_is_what_it_was(tmp_path: Path) -> None:
    content = sample_content(4)
    report = LayerReport.model_validate(content)
    assert report.downstream == []
    assert '"downstream"' not in report.to_json()
    facts = {name: report.model[name] for name in ("name", "num_layers", "hidden_size")}
    both = record(row("a", "acc", 0.2), model=facts).added_to(report)
    both = record(row("a", "acc", 0.3), row("b", "acc", 0.4), model=facts).added_to(both)
    assert [(one.task, one.value) for one in both.downstream] == [("a", 0.3), ("b", 0.4)]
    path = both.save(tmp_path / "r.json")
    assert LayerReport.load(path).downstream == both.downstream
    assert LayerReport.load(path).to_json() == path.read_text()
    path.write_text(path.read_text().replace('"value": 0.3', '"value": "much"'))
    with pytest.raises(ReportError, match=r"downstream\[0\].value"):
        LayerReport.load(path)


def test_accuracies_are_not_added_to_the_report_of_another_model() -> None:
    report = LayerReport.model_validate(sample_content(4))
    with pytest.raises(SettingsError, match="with num_layers 4, but 'm' with 5 was evaluated"):
        record(row("a", "acc", 0.2), model={"name": "m", "num_layers": 5}).added_to(report)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_a_table_writes_the_accuracies_and_adds_them_to_a_report(
    saved: Path, folder: Path, tmp_path: Path
) -> None:
    from depthscope import analyze

    report, out = tmp_path / "report.json", tmp_path / "out.json"
    made = analyze(saved, fit_blocks=0, eval_blocks=1, block_size=8, scores="variance", progress=False)
    made.save(report)
    options = ["--tasks", "paper", "--data", folder, "--limit", "4", "--out", out, "--report", report]
    run = CliRunner().invoke(app, ["evaluate", str(saved), *map(str, options)])
    assert run.exit_code == 0, run.output
    assert run.stderr == ""
    assert "arc_easy" in run.stdout
    assert "Only the first 4 documents" in run.stdout
    found = Downstream.load(out)
    assert found.versions["lm-eval"] == importlib.metadata.version("lm-eval")
    assert found.model["name"] == "tiny-depthlm"
    assert [one.n for one in found.accuracies] == [4, 4]
    added = LayerReport.load(report)
    assert added.downstream == found.accuracies
    assert (added.layers, added.scores) == (made.layers, made.scores)
    shown = CliRunner().invoke(app, ["show", str(report)])
    assert shown.exit_code == 0, shown.output
    table = [line.split() for line in shown.stdout.splitlines()]
    assert [cells[:2] for cells in table if cells[:1] in (["arc_easy"], ["piqa"])] == [
        [one.task, one.metric] for one in added.downstream
    ]


def test_an_unknown_task_ends_the_command_with_2_and_a_hint(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "arc_eazy.jsonl").write_text("{}")
    run = CliRunner().invoke(app, ["evaluate", str(saved), "--tasks", "arc_eazy", "--data", str(tmp_path)])
    assert run.exit_code == 2
    assert "lm-eval has no task 'arc_eazy'. Did you mean arc_easy" in run.output


def test_codes_of_a_quantisation_are_not_evaluated_as_weights(saved: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "codes")
    state = load_file(saved / "model.safetensors")
    name = next(name for name in state if name.endswith("q_proj.weight"))
    codes = {name: torch.full_like(state[name], 448).to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1) / 448}
    save_file(state | codes, tmp_path / "codes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="codes of a quantisation"):
        evaluate(str(tmp_path / "codes"), tasks="arc_easy", data=folder, progress=False)
