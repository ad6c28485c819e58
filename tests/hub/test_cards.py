"""Model cards: what the Hub reads of them, what people see, and that no text of a stranger changes either."""

import importlib.util
import io
import json
import math
import pickle
import random
import re
import shutil
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from PIL import Image
from transformers import TrainerState

from depthscope import DepthLMConfig, DepthLMForCausalLM, LayerReport
from depthscope.callbacks import VarianceCallback
from depthscope.conversion import to_native
from depthscope.errors import DepthscopeError, ReportError, SettingsError
from depthscope.hub.cards.data import DepthCardData
from depthscope.hub.cards.figures import FOLDER, draw, figure_names, write_figures
from depthscope.hub.cards.front_matter import front_matter
from depthscope.hub.cards.read import read_card_data
from depthscope.hub.cards.render import card_for, render_card
from depthscope.hub.names import model_repository
from depthscope.hub.plan import Options, make_plan
from depthscope.report.accuracy import Accuracy
from depthscope.wording.markdown import code, inline
from forks import new_python
from reports import sample_content, sample_report
from runs import trainer
from sweeps import run
from tiny_tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]
REPOSITORY = "someone/some-model"
LINKS = ("https://huggingface.co/", "https://arxiv.org/abs/2603.15389")
HEADINGS = {
    "How to load it",
    "Intended use",
    "The contribution of its layers",
    "Downstream tasks",
    "All layers",
    "Architecture",
    "Training",
    "Limits",
    "Licence",
    "Citation",
    "Versions",
}
HOSTILE = [
    "plain words",
    "'single' and \"double\" and `back`",
    "two\nlines\n\n# a heading",
    "---\nlicense: evil\n---\n",
    "x\n---\nlicense: evil",
    "\r\n---\r\n",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- no end",
    "</details></td></table>",
    "| a | b |",
    "a \\| b \\",
    "```\ncode\n```",
    "`", "``a`b``", "` `",
    "[a link](javascript:alert(1))",
    "![an image](http://evil.example/x.png)",
    "<http://evil.example> http://evil.example www.evil.example a@evil.example",
    "{{ 7 * 7 }}{% for x in y %}",
    "null", "true", "~", "1e3", "0x10", "12:30", "2026-01-01", "=", "!!python/object:os.system", "&anchor *alias",
    "- item", "* item", "+ item", "1. item", "2) item", "# heading", "> quote", "=====", "----", "***", "    indented",
    "&lt;b&gt; &#x3c;", "$x$ $$y$$", "*a* _b_ **c** ~~d~~ a_b_c", "[^1]: a note", "[x]: http://evil.example",
    "one\u2028two\x85three\x0bfour", "\u202egnirts\u202c \x1b[31m \x00", "\ud800", "\ufeffbom", "😀 ünï 文字",
    "%s {0} ${x}", ": colon", "key: value # comment", "@someone", "\ttab", " ", "x" * 3000, "#|" * 400,
]  # fmt: skip


class Page(HTMLParser):
    """What a card shows, taken from its Markdown as CommonMark with tables renders it."""

    def __init__(self, card: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.images: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = [[]]  # one list a table, of the numbers of cells in its rows
        self._open: list[str] = []
        self.feed(MarkdownIt("commonmark").enable("table").render(body(card)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.links += [str(given["href"])] if tag == "a" else []
        self.images += [str(given["src"])] if tag == "img" else []
        if tag in ("h1", "h2", "h3", "p", "li", "td", "th", "pre"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.rows.append([])
        if tag == "tr":
            self.rows[-1].append(0)
        if tag in ("td", "th"):
            self.rows[-1][-1] += 1

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data


def block(card: str) -> str:
    """The metadata of a card, cut out by hand."""
    assert card.startswith("---\n")
    return card[4:].split("\n---\n", 1)[0]


def body(card: str) -> str:
    return card[4:].split("\n---\n", 1)[1]


def clean(text: str) -> str:
    """A text as a record has it: control characters replaced."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", text)


def shown(text: str) -> str:
    """A text as a card shows it: on one line, not too long."""
    words = " ".join(clean(text).split())
    return words if len(words) <= 500 else words[:499] + "…"


def hostile_record(chance: random.Random) -> dict[str, Any]:
    """A record in which every optional part is missing at times, and every text is one of the hostile ones."""

    def text(most: int = 5000) -> str:
        return chance.choice([each for each in HOSTILE if len(each) <= most and each != "\ud800"])

    def maybe(value: Any) -> Any:
        return value if chance.random() < 0.7 else None

    def report() -> LayerReport:
        scores = ("variance", "usefulness", "causal", "skip", "permutation", "jacobian", "influence")
        layers = chance.choice([1, 2, 5, 30])
        content = sample_content(layers, tuple(chance.sample(scores, chance.randint(0, 7))), chance.randint(0, 99))
        content["model"] |= {"name": text(), "architecture": text(), "num_experts": maybe(4)}
        content["data"] |= {"name": text(), "fingerprint": text()}
        content["versions"] = {"depthscope": text(), "torch": None}
        content["notes"] = [text() for _ in range(chance.randint(0, 3))]
        content["pairs"] = {}
        for name in ("fit_blocks", "eval_blocks", "block_size", "tokens"):
            if chance.random() < 0.2:
                del content["data"][name]
        return LayerReport(**content)

    parts: dict[str, Any] = {
        "name": maybe(text()),
        "license": maybe(chance.choice(["mit", "other"])),
        "license_name": maybe(text()),
        "license_link": maybe("LICENSE.md"),
        "language": maybe(["en", "no"]),
        "datasets": maybe(["some/data-set"]),
        "base_model": "some/base",
        "base_model_relation": maybe("finetune"),
        "native_repo": maybe("someone/native"),
        "revisions": maybe(["step0", "step1"]),
        "reports_dataset": maybe("someone/reports"),
        "collection": maybe("someone/all-0123456789abcdef"),
        "sweep": maybe({"name": text(), "description": text(), "point": text(), "varied": {text(): text(), "b": None}}),
        "training": maybe({"text": text(), "optimizer": text(), "schedule": text(), "learning_rate": 0.1, "tokens": 5}),
        "config": maybe({"model_type": chance.choice(["depthlm", text()]), "architectures": [text()], "x": {"y": [1]}}),
        "adapter": maybe(chance.random() < 0.2),
        "tokenizer": maybe(True),
        "parameters": maybe(chance.choice([0, 1, 10**12])),
        "report": maybe(report()),
        "untrained": maybe(report()),
        "evaluation": maybe({"loss": chance.choice([2.0, 0.0, 1e6]), "text": text(), "split": maybe(text())}),
        "accuracies": maybe([Accuracy(task=text(400), metric=text(400), value=0.5) for _ in range(3)]),
        "losses": maybe({"unit": "steps", "at": [1, 2], "values": [3.0, None]}),
        "versions": maybe({text(): text()}),
    }
    return {"repo_id": REPOSITORY} | {name: value for name, value in parts.items() if value is not None}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two models that are trained and measured here: a dense one, and one with experts and shared heads."""
    folder = tmp_path_factory.mktemp("cards")
    grid = {
        "dense": {"num_hidden_layers": [3]},
        "sparse": {
            "num_hidden_layers": [2],
            "num_experts": [4],
            "num_experts_per_tok": [2],
            "num_key_value_heads": [1],
        },
    }
    scores = {"scores": ["variance", "skip", "usefulness", "causal", "permutation"], "fit_blocks": 4}
    outcome = run(folder, folder / "out", grid=grid, scoring=scores, tracking={"publish_every": 8})
    assert set(outcome.statuses.values()) == {"finished"}, outcome
    return folder / "out"


@pytest.fixture(scope="module")
def points(sweep: Path) -> dict[str, Path]:
    return {path.name.partition("-")[0]: path for path in sorted((sweep / "points").iterdir())}


@pytest.fixture(scope="module")
def dense(points: dict[str, Path]) -> DepthCardData:
    return read_card_data(points["dense"], repo_id=REPOSITORY, license="apache-2.0", language=["en"])


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script that makes the cards of released checkpoints."""
    specification = importlib.util.spec_from_file_location("make_cards", ROOT / "model_cards" / "make_cards.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------ what the Hub reads


def test_the_model_index_has_the_numbers_that_were_measured_and_on_what(points: dict[str, Path]) -> None:
    folder = points["dense"]
    card = card_for(folder, repo_id=REPOSITORY)
    metadata = yaml.safe_load(block(str(card)))
    (entry,) = metadata["model-index"]
    metrics = {metric["type"]: metric for result in entry["results"] for metric in result["metrics"]}
    result, report = json.loads((folder / "result.json").read_text()), LayerReport.load(folder / "layer_report.json")
    assert metrics["loss"]["value"] == pytest.approx(result["loss"], rel=1e-5)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(result["loss"]), rel=1e-4)
    assert metrics["loss"]["args"]["tokens"] == 64
    for name in ("usefulness", "causal", "permutation", "skip_ratio", "variance"):
        assert metrics[name]["value"] == pytest.approx(report.scores[name], rel=1e-5)
        assert metrics[name]["args"]["tokens"] == report.data["tokens"]
        assert metrics[name]["args"]["fingerprint"] == report.data["fingerprint"]
    assert metrics["usefulness"]["args"]["threshold"] == 1.1
    assert {result["task"]["type"] for result in entry["results"]} == {"text-generation"}
    assert [result["dataset"]["name"] for result in entry["results"]] == [report.data["name"]]
    assert entry["results"][0]["dataset"]["split"] == "held-out"


def test_the_tags_say_what_the_model_is(points: dict[str, Path]) -> None:
    tags = {name: card_for(folder, repo_id=REPOSITORY).data.tags for name, folder in points.items()}
    assert tags == {
        "dense": ["depthscope", "curse-of-depth"],
        "sparse": ["depthscope", "curse-of-depth", "moe", "gqa"],
    }
    scaled = DepthCardData(repo_id=REPOSITORY, config={"norm_scaling": "depth"})
    assert front_matter(scaled).tags == ["depthscope", "curse-of-depth", "layernorm-scaling"]


def test_the_metadata_that_its_owner_gives_is_in_the_card(points: dict[str, Path]) -> None:
    card = card_for(
        points["dense"],
        repo_id=REPOSITORY,
        license="mit",
        language=["en", "code"],
        datasets=["some/text"],
        base_model="some/base",
        base_model_relation="finetune",
        accuracies=[Accuracy(task="arc_easy", metric="acc", value=0.25, stderr=0.01, chance=0.26, shots=5, n=400)],
    )
    metadata = yaml.safe_load(block(str(card)))
    expected = {
        "license": "mit",
        "language": ["en", "code"],
        "datasets": ["some/text"],
        "base_model": "some/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert {name: metadata[name] for name in expected} == expected
    (task,) = [each for each in metadata["model-index"][0]["results"] if each["dataset"]["type"] == "arc_easy"]
    assert task["metrics"] == [
        {
            "type": "acc",
            "value": 0.25,
            "name": "acc",
            "args": {"num_few_shot": 5},
        }
    ]
    assert "| arc\\_easy | acc | 0.250\u00a0±\u00a00.010 | 0.260 | 5 | 400 |" in str(card)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repo_id", "too/many/parts"),
        ("repo_id", "a b"),
        ("license", "Apache 2.0\nevil: true"),
        ("language", ["English"]),
        ("datasets", ["../folder"]),
        ("base_model", "./my-model"),
        ("base_model_relation", "cousin"),
        ("native_repo", "x" * 200),
        ("revisions", ["step 1"]),
        ("collection", "no-namespace"),
    ],
)
def test_a_value_that_the_hub_would_refuse_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    options = {"repo_id": REPOSITORY, "base_model": "some/base"} | {name: value}
    with pytest.raises(SettingsError, match=name):
        read_card_data(tmp_path, **options)


def test_a_relation_without_a_base_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="base_model"):
        read_card_data(tmp_path, repo_id=REPOSITORY, base_model_relation="merge")


def test_the_hub_takes_the_cards_and_refuses_a_broken_one(hub: Any, points: dict[str, Path]) -> None:
    chance = random.Random(7)
    cards = [render_card(DepthCardData(**hostile_record(chance))) for _ in range(20)]
    for card in [*cards, *(card_for(folder, repo_id=REPOSITORY, license="mit") for folder in points.values())]:
        card.validate()
    assert len(hub.sent("validate-yaml")) == len(cards) + len(points)
    card.data.license = "no-such-licence"
    with pytest.raises(ValueError, match="license"):
        card.validate()


# ------------------------------------------------------------------------------------------------- hostile texts


def test_every_combination_of_parts_and_hostile_texts_gives_a_card_that_says_the_same() -> None:
    chance = random.Random(20261125)
    for _ in range(150):
        data = DepthCardData(**hostile_record(chance))
        card = str(render_card(data))
        _assert_the_metadata_is_that_of(data, card)
        _assert_the_body_is_unbroken(data, card)


def _assert_the_metadata_is_that_of(data: DepthCardData, card: str) -> None:
    expected = front_matter(data)
    assert yaml.safe_load(block(card)) == expected.to_dict()
    again = ModelCard(card)
    assert str(again) == card
    assert again.data.to_dict() == expected.to_dict()
    results = expected.eval_results or []
    if results:
        name, found = model_index_to_eval_results(expected.to_dict()["model-index"])
        assert name == data.title
        assert sorted(map(repr, found)) == sorted(map(repr, results))
        names = {each.dataset_name for each in results}
        assert names >= {row.task or "unnamed" for row in data.accuracies}
        assert all(math.isfinite(each.metric_value) for each in results)


def _assert_the_body_is_unbroken(data: DepthCardData, card: str) -> None:
    page = Page(card)
    assert page.tags <= {
        *("h1", "h2", "h3", "p", "ul", "li", "a", "img", "em", "code", "pre", "details", "summary"),
        *("table", "thead", "tbody", "tr", "td", "th"),
    }
    assert page.texts["h1"] == [shown(data.title)]
    assert {*page.texts["h2"], *page.texts.get("h3", [])} <= HEADINGS
    assert page.texts["h2"][-3 if data.versions or data.report else -2 :][:2] == ["Licence", "Citation"]
    assert all(link.startswith(LINKS) or link == "LICENSE.md" for link in page.links)
    assert page.images == [f"{FOLDER}/{name}.png" for name in figure_names(data)]
    assert all(len(set(cells)) <= 1 for cells in page.rows), "every row of a table has as many cells"
    everything = "\n".join(text for texts in page.texts.values() for text in texts)
    said = [note for note in (data.report.notes if data.report else []) if note.strip()]
    said += [data.sweep.description] if data.sweep and data.sweep.description.strip() else []
    said += [data.training.text] if data.training.text and data.training.text.strip() else []
    for text in said:
        assert shown(text) in everything


PLACES = {
    inline: ["{}", "# {}", "- {}", "1. {}", "> {}", "| a |\n| --- |\n| {} |\n", "words {} words"],
    code: ["{}", "# {}", "- {}", "> {}", "words {} words"],
}


@pytest.mark.parametrize(("escape", "place"), [(escape, place) for escape in PLACES for place in PLACES[escape]])
def test_a_text_is_shown_as_it_is_wherever_it_stands(escape: Any, place: str) -> None:
    renderer = MarkdownIt("commonmark").enable("table")
    plain = _parts(renderer.render(place.replace("{}", "TEXT")))
    for text in filter(str.strip, map(clean, HOSTILE)):
        elements, words = _parts(renderer.render(place.replace("{}", escape(text))))
        assert [each for each in elements if "code>" not in each] == plain[0], text
        assert words == plain[1].replace("TEXT", shown(text)), text


def test_an_address_in_a_text_does_not_become_a_link() -> None:
    for address in (
        "http://evil.example",
        "https://evil.example",
        "www.evil.example",
        "WWW.evil.example",
        "mailto:a@b",
    ):
        escaped = inline(f"see {address} and x{address}")
        assert not re.search(r"(?i)(https?|mailto):|www\.", escaped)
        assert _parts(MarkdownIt("commonmark").render(escaped))[1] == f"see {address} and x{address}"


def _parts(page: str) -> tuple[list[str], str]:
    """The elements of a page, and its words."""
    return re.findall(r"<[^>]*>", page), " ".join(unescape(re.sub(r"<[^>]*>", "", page)).split())


def test_an_unclosed_text_in_a_file_is_no_part_of_the_metadata(tmp_path: Path, points: dict[str, Path]) -> None:
    report = json.loads((points["dense"] / "layer_report.json").read_text())
    report["data"]["name"] = "evil\n---\nlicense: mit\n---\n# evil"
    (tmp_path / "layer_report.json").write_text(json.dumps(report))
    card = str(card_for(tmp_path, repo_id=REPOSITORY))
    metadata = yaml.safe_load(block(card))
    assert "license" not in metadata
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == report["data"]["name"]
    assert Page(card).texts["h1"] == ["some-model"]


# ---------------------------------------------------------------------------------------------------- what people see


@pytest.mark.quick
def test_a_card_shows_architecture_training_and_every_layer(points: dict[str, Path]) -> None:
    folder = points["sparse"]
    card = str(card_for(folder, repo_id=REPOSITORY, revisions=["step0", "step8"]))
    page = Page(card)
    cells = page.texts["td"]
    facts = dict(pairwise(cells))
    assert facts["Layers"] == "2"
    assert facts["Attention"] == "multi-query, 2 query heads, 1 key and value head of 8"
    assert facts["Experts"].startswith("4 in each layer with experts, 2 per token")
    assert facts["Learning rate"].startswith("0.01, cosine to 0.1 of it, 2 steps of warm-up")
    assert facts["Tokens"] == "768"
    assert facts["Steps"] == "12"
    result = json.loads((folder / "result.json").read_text())
    assert (
        f"{result['parameters']:,}, of which {result['active_parameters']:,} process one token" == facts["Parameters"]
    )
    report = LayerReport.load(folder / "layer_report.json")
    for layer in report.layers:
        assert f"| {layer['layer']} | " in card
        assert f" {layer['skip_ratio']:.4f} |" in card
    assert "before training" in page.texts["th"]
    assert "`step0`, `step8`" in card
    assert "transformers" in card.partition("Trained with")[2]


def test_the_code_that_a_card_shows_loads_the_model(points: dict[str, Path], tmp_path: Path) -> None:
    folder = points["dense"] / "model"
    model = DepthLMForCausalLM.from_pretrained(folder)
    to_native(model).save_pretrained(tmp_path / "native")
    card = str(card_for(points["dense"], repo_id="someone/depth", native_repo="someone/export"))
    snippets = [part for part in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "from_pretrained" in part]
    assert len(snippets) == 3
    ids = torch.tensor([[1, 5, 9, 3]])
    expected = model(ids).logits
    places = [
        snippet.replace("someone/depth", str(folder)).replace("someone/export", str(tmp_path / "native"))
        for snippet in snippets
    ]
    names: dict[str, Any] = {}
    exec(places[0], names)
    assert type(names["model"]) is DepthLMForCausalLM
    assert torch.equal(names["model"](ids).logits, expected)
    # The other two, where there is no depthscope.
    lines = ["import sys", "sys.modules['depthscope'] = None", "import torch"]
    for index, snippet in enumerate(places[1:]):
        lines += [snippet, f"torch.save(model(torch.tensor({ids.tolist()})).logits, '{tmp_path}/{index}.pt')"]
        lines += ["print(type(model).__name__)"]
    ran = new_python("-c", "\n".join(lines))
    assert ran.stdout.split() == ["DepthLMForCausalLM", "LlamaForCausalLM"], ran.stderr
    assert torch.equal(torch.load(tmp_path / "0.pt"), expected)
    torch.testing.assert_close(torch.load(tmp_path / "1.pt"), expected, rtol=1e-5, atol=1e-5)


def test_a_card_of_nothing_but_a_name_says_what_is_missing() -> None:
    card = render_card(DepthCardData(repo_id=REPOSITORY))
    assert "No licence was chosen" in str(card)
    assert "Its layers were not measured" in str(card)
    assert "![" not in str(card)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}


def test_a_long_table_of_layers_is_folded_and_still_a_table() -> None:
    for layers, folded in ((24, False), (40, True)):
        page = Page(str(render_card(DepthCardData(repo_id=REPOSITORY, report=sample_report(layers)))))
        assert ("details" in page.tags) is folded
        assert layers + 1 in [len(rows) for rows in page.rows]


def test_the_same_record_gives_the_same_card_whenever_it_was_measured(dense: DepthCardData, tmp_path: Path) -> None:
    later = dense.model_copy(update={"report": dense.report.model_copy(update={"created": "2031-01-01T00:00:00Z"})})
    assert str(render_card(dense)) == str(render_card(later))
    again = DepthCardData.load(dense.save(tmp_path / "record.json"))
    assert again == dense
    assert again.to_json() == dense.to_json()
    assert str(render_card(again)) == str(render_card(dense))


def test_a_damaged_file_is_named(points: dict[str, Path], tmp_path: Path) -> None:
    for name in ("result.json", "layer_report.json", "config.json"):
        (tmp_path / name).write_text('{"a": NaN')
        with pytest.raises(ReportError, match=re.escape(name)):
            read_card_data(tmp_path, repo_id=REPOSITORY)
        (tmp_path / name).unlink()
    (tmp_path / "record.json").write_text('{"repo_id": "a b"}')
    with pytest.raises(ReportError, match="repo_id"):
        DepthCardData.load(tmp_path / "record.json")
    with pytest.raises(SettingsError, match="no folder"):
        read_card_data(tmp_path / "nowhere", repo_id=REPOSITORY)


# ------------------------------------------------------------------------------------------------- a Trainer's folder


class _Alarm:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_the_folder_of_a_trainer_gives_a_card_and_no_pickle_is_opened(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 300}
    model = DepthLMForCausalLM(DepthLMConfig(num_hidden_layers=2, max_position_embeddings=32, **shape))
    out, alarm = tmp_path / "run", tmp_path / "alarm"
    changes = {"save_strategy": "steps", "save_steps": 8, "eval_strategy": "no"}
    made = trainer(model, out, [VarianceCallback()], **changes)
    made.train()
    made.save_model()
    save_tokenizer(out)
    (out / "training_args.bin").write_bytes(pickle.dumps(_Alarm(alarm)))
    (out / "checkpoint-8" / "training_args.bin").write_bytes(pickle.dumps(_Alarm(alarm)))
    data = read_card_data(out, repo_id=REPOSITORY, training_args=made.args)
    assert not alarm.exists()
    assert data.training.steps == 8
    assert data.training.learning_rate == 0.01
    assert data.training.batch_sequences == 4
    assert data.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert data.losses is not None
    assert (data.losses.unit, data.losses.at) == ("steps", [4, 8])
    assert data.variances is not None
    assert [len(values) for values in data.variances.values] == [2, 2]
    assert figure_names(data) == ["learning_curve"]
    given = read_card_data(out, repo_id=REPOSITORY, training_args=made.args.to_dict())
    assert given.training.learning_rate == 0.01
    card = str(card_for(out, repo_id=REPOSITORY))
    assert "model-index" not in card
    assert 'AutoTokenizer.from_pretrained("someone/some-model")' in card


def saved_state(folder: Path, rows: list[dict[str, Any]]) -> None:
    """trainer_state.json as transformers writes it."""
    steps = [{"step": step, "epoch": step / 10, **row} for step, row in enumerate(rows, 1)]
    TrainerState(log_history=steps, global_step=len(rows)).save_to_json(str(folder / "trainer_state.json"))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e300])
def test_a_run_with_a_number_that_is_not_finite_has_a_card(tmp_path: Path, number: float) -> None:
    saved_state(tmp_path, [{"loss": 3.5, "grad_norm": number}, {"loss": number}, {"loss": 2.5}, {"eval_loss": 2.25}])
    data = read_card_data(tmp_path, repo_id=REPOSITORY)
    assert data.losses is not None
    assert (data.losses.at, data.losses.values) == ([1, 2, 3], [3.5, None, 2.5])
    assert data.evaluation is not None
    assert data.evaluation.loss == 2.25
    assert "nan" not in str(render_card(data)).lower().split()


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300])
def test_the_loss_of_an_earlier_evaluation_does_not_stand_for_a_last_one_that_is_no_number(
    tmp_path: Path, number: float
) -> None:
    saved_state(tmp_path, [{"eval_loss": 2.25}, {"eval_loss": number}])
    assert read_card_data(tmp_path, repo_id=REPOSITORY).evaluation is None


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_setting_that_is_infinite_is_left_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"time_step_limit": [0.5, Infinity], "other": NaN, "vocab_size": 7}')
    config = read_card_data(tmp_path, repo_id=REPOSITORY).config
    assert not config or config == {"time_step_limit": [0.5, None], "other": None, "vocab_size": 7}


@pytest.mark.parametrize(("inside", "given"), [("..", "p1"), (".", "."), ("x", "..")])
def test_a_point_is_the_same_from_wherever_it_is_named(
    points: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, given: str
) -> None:
    sweep = tmp_path / "depths"
    shutil.copytree(points["dense"].parents[1], sweep, ignore=shutil.ignore_patterns("steps", "*.bin"))
    point = (sweep / "points" / points["dense"].name).rename(sweep / "points" / "p1")
    (point / "x").mkdir()
    whole = read_card_data(point, repo_id=REPOSITORY)
    assert whole.sweep is not None
    plans = []
    for place, name in ((tmp_path, str(point)), (point / inside, given)):
        monkeypatch.chdir(place)
        assert read_card_data(name, repo_id=REPOSITORY) == whole
        plan = make_plan(Path(name), "ada", tmp_path / f"work-{len(plans)}", Options())
        plans.append([(tree.repo_id, tree.revision, sorted(tree.files)) for tree in plan.trees])
    assert plans[0] == plans[1]
    assert plans[0][-1][0].startswith("ada/tiny-")


def test_a_sweep_without_a_name_is_called_as_its_folder_also_from_within(
    points: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "depths"
    shutil.copytree(points["dense"].parents[1], sweep, ignore=shutil.ignore_patterns("steps", "*.bin"))
    index = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps(index | {"name": None}))
    monkeypatch.chdir(sweep)
    plan = make_plan(Path("."), "ada", tmp_path / "work", Options())
    assert {tree.repo_id.partition("-")[0] for tree in plan.trees} == {"ada/depths"}


def test_a_point_without_its_sweep_has_a_card(points: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(points["dense"], tmp_path / "p1", ignore=shutil.ignore_patterns("steps"))
    assert read_card_data(tmp_path / "p1", repo_id=REPOSITORY).losses is not None


def test_numbers_of_numpy_and_pytorch_are_numbers_of_a_record() -> None:
    kinds = [np.float32, np.float64, np.float16, torch.tensor, np.array, float]
    for kind in kinds:
        data = DepthCardData.checked(
            repo_id=REPOSITORY,
            parameters=np.int64(4),
            config={"hidden_size": np.int32(8), "rope": {"theta": kind(0.5)}, "tied": np.bool_(True)},
            evaluation={"loss": kind(1.5), "text": np.str_("a text")},
            accuracies=[Accuracy(task="copa", metric="acc", value=kind(0.5), n=np.int64(3))],
        )
        assert data.config == {"hidden_size": 8, "rope": {"theta": 0.5}, "tied": True}
        assert DepthCardData.model_validate_json(data.to_json()) == data
        assert "!!python" not in str(render_card(data))


def test_an_adapter_is_tied_to_its_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "peft_type": "LORA"}')
    metadata = card_for(tmp_path, repo_id=REPOSITORY).data.to_dict()
    assert (metadata["library_name"], metadata["base_model"], metadata["base_model_relation"]) == (
        "peft",
        "some/base",
        "adapter",
    )


# ------------------------------------------------------------------------------------------------------------- figures


def test_the_figures_are_those_that_the_card_links_to(dense: DepthCardData, tmp_path: Path) -> None:
    written = write_figures(tmp_path, dense)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == Page(str(render_card(dense))).images
    assert [path.stem for path in written] == ["variance_by_layer", "effectiveness_by_layer", "learning_curve"]
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.width >= 800
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10, "something is drawn"
    assert "![" not in str(render_card(dense, figures=None))


def test_a_figure_shows_the_values_of_the_layers(dense: DepthCardData) -> None:
    report = dense.report
    assert report is not None
    rows = [{**row, "variance": row["variance"] * (100 if row["layer"] == 1 else 1)} for row in report.layers]
    changed = dense.model_copy(update={"report": report.model_copy(update={"layers": rows})})
    same = {name: draw(name, dense) == draw(name, changed) for name in ("variance_by_layer", "learning_curve")}
    assert same == {"variance_by_layer": False, "learning_curve": True}


def test_drawing_leaves_the_users_matplotlib_as_it_is(dense: DepthCardData) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        styled = draw("variance_by_layer", dense)
        assert matplotlib.rcParams["font.size"] == 30
    assert dict(matplotlib.rcParams) == before
    assert draw("variance_by_layer", dense) == styled


@pytest.mark.parametrize(
    ("layers", "scores"),
    [(1, ("variance", "skip")), (2, ("skip",)), (70, ("causal", "influence", "jacobian")), (2, ())],
)
def test_figures_are_drawn_of_any_scores_and_depth(layers: int, scores: tuple[str, ...], tmp_path: Path) -> None:
    data = DepthCardData(repo_id=REPOSITORY, report=sample_report(layers, scores), untrained=sample_report(layers, ()))
    assert [path.stem for path in write_figures(tmp_path, data)] == figure_names(data)


def test_values_that_are_not_finite_zero_or_missing_are_drawn_around(tmp_path: Path) -> None:
    content = sample_content(3, ("variance", "skip", "causal"))
    content["layers"][0] |= {"variance": 0.0, "skip_ratio": 0.5, "causal": None}
    content["layers"][1] |= {"variance": None, "skip_ratio": None, "causal": None}
    content["layers"][2] |= {"causal": None}
    curve = {"unit": "tokens", "at": [0, 5], "values": [None, None]}
    layers = {"unit": "tokens", "at": [0, 5], "values": [[0.0, None, 1.0], [None, None, None]]}
    data = DepthCardData(repo_id=REPOSITORY, report=LayerReport(**content), losses=curve, variances=layers)
    assert len(write_figures(tmp_path, data)) == 3


def test_without_matplotlib_the_extra_is_named_and_the_card_is_made(
    dense: DepthCardData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DepthscopeError, match=r"pip install depthscope\[hub\]"):
        write_figures(tmp_path, dense)
    assert str(render_card(dense))


# ---------------------------------------------------------------------------------------------------- released models


def test_the_cards_of_released_checkpoints_are_current(script: ModuleType) -> None:
    place = ROOT / "model_cards"
    expected = script.rendered(place)
    assert {path.name for path in place.glob("*.md")} == set(expected)
    for name, text in expected.items():
        assert (place / name).read_text() == text, f"{name} is not current: make cards"
    for name, data in script.read_records(place).items():
        drawn = {path.stem for path in (place / "figures" / name).glob("*.png")}
        assert drawn == set(figure_names(data)), f"the figures of {name} are not current: make cards"
        ModelCard(expected[f"{name}.md"])


def test_records_of_a_sweep_give_the_cards_of_its_points(script: ModuleType, sweep: Path, tmp_path: Path) -> None:
    script.record(sweep, tmp_path, namespace="someone", language=["en"], native=True)
    script.render(tmp_path)
    names = sorted(f"tiny-{path.name}" for path in (sweep / "points").iterdir())
    assert sorted(path.stem for path in (tmp_path / "records").glob("*.json")) == names
    assert sorted(path.name for path in tmp_path.glob("*.md")) == sorted(
        [*(f"{name}.md" for name in names), "README.md"]
    )
    for point in (sweep / "points").iterdir():
        repository = model_repository("someone", "tiny", point.name)
        card = ModelCard((tmp_path / f"tiny-{point.name}.md").read_text())
        direct = card_for(
            point,
            repo_id=repository,
            license="apache-2.0",
            language=["en"],
            native_repo=f"{repository}-native",
            revisions=[f"step{step}" for step in (0, 1, 2, 4, 8)],
            figures=f"figures/tiny-{point.name}",
        )
        assert str(card) == str(direct)
        for image in Page(str(card)).images:
            assert Image.open(io.BytesIO((tmp_path / image).read_bytes())).format == "PNG"
    (tmp_path / "records" / f"{names[0]}.json").unlink()
    script.render(tmp_path)
    assert not (tmp_path / f"{names[0]}.md").exists()
    assert not list((tmp_path / "figures" / names[0]).glob("*"))
    assert names[0] not in (tmp_path / "README.md").read_text()


def test_a_repository_is_named_in_characters_that_the_hub_takes() -> None:
    assert model_repository("someone", "laptop", "depth-L16-seed0") == "someone/laptop-depth-L16-seed0"
    chance = random.Random(1)
    for _ in range(200):
        parts = ["".join(chance.choices("aZ0._-", k=chance.randint(1, 120))) for _ in range(2)]
        name = model_repository("someone", *parts)
        assert DepthCardData(repo_id=name).repo_id == name
        assert DepthCardData(repo_id=f"{name}-native")
    long = {model_repository("someone", "s" * 100, f"point{index}") for index in range(3)}
    assert len(long) == 3
