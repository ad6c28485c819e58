"""Front matter as the Hub reads it: what it refuses in a README.md, and what it shows of it."""

import re
from pathlib import Path
from typing import Any

import yaml

from hub.objects import Files
from hub.refusal import Refusal

FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n?^---[ \t]*$", re.DOTALL | re.MULTILINE)
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})", re.IGNORECASE)
# What the Hub takes for a license, one per line.
LICENSES = frozenset(Path(__file__).with_name("licenses.txt").read_text().split())
LISTS = ("tags", "datasets", "metrics")


def front_matter(files: Files) -> tuple[dict[str, Any], str]:
    """The data of a repository's README.md, empty where there is none, and its text."""
    text = files["README.md"].content.decode(errors="replace") if "README.md" in files else ""
    found = FRONT_MATTER.match(text)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        data = {}
    return (data if isinstance(data, dict) else {}), text


def validate(text: str, kind: str) -> dict[str, list[dict[str, str]]]:
    """Errors and warnings of a card's front matter, as /api/validate-yaml states them."""
    found = FRONT_MATTER.match(text)
    if not found or not found[1].strip():
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return {"errors": [{"message": f"Invalid YAML: {error}"}], "warnings": []}
    if not isinstance(data, dict):
        return {"errors": [{"message": "The front matter must be a mapping"}], "warnings": []}
    return {"errors": [{"message": message} for message in _errors(data, kind)], "warnings": []}


def require_valid(text: str, kind: str) -> None:
    """Refuse a commit whose card does not validate, as the Hub does."""
    if errors := validate(text, kind)["errors"]:
        raise Refusal(400, "Invalid metadata in README.md. " + "; ".join(error["message"] for error in errors))


def _errors(data: dict[str, Any], kind: str) -> list[str]:
    errors = [
        f'"{name}" must be an array of strings'
        for name in LISTS
        if name in data and not _strings(data[name] if isinstance(data[name], list) else [None])
    ]
    licenses, languages, bases = (_as_list(data.get(name)) for name in ("license", "language", "base_model"))
    errors += [f'"license" must be one of the known licenses, not {one!r}' for one in licenses if one not in LICENSES]
    errors += [
        f'"language" must be an ISO 639-1, 639-2 or 639-3 code, not {one!r}'
        for one in languages
        if not (isinstance(one, str) and LANGUAGE.fullmatch(one))
    ]
    errors += [
        f'"base_model" must be a repository id, not {one!r}'
        for one in bases
        if not (isinstance(one, str) and REPO_ID.fullmatch(one))
    ]
    if data.get("base_model_relation", "adapter") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    if kind == "space" and data.get("sdk") not in ("gradio", "docker", "static"):
        errors.append('"sdk" must be one of gradio, docker, static')
    return errors + _model_index_errors(data.get("model-index", []))


def _model_index_errors(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for number, model in enumerate(index):
        where = f'"model-index[{number}]"'
        if not (isinstance(model, dict) and isinstance(model.get("name"), str) and "results" in model):
            errors.append(f"{where} needs a name and results")
            continue
        for position, result in enumerate(model["results"]):
            at = f'"model-index[{number}].results[{position}]'
            missing = [
                f'{at}.{part}.{name}" is required'
                for part, names in (("task", ("type",)), ("dataset", ("type", "name")))
                for name in names
                if not isinstance(result.get(part), dict) or not result[part].get(name)
            ]
            metrics = result.get("metrics") or [{}]
            errors += missing + [
                f'{at}.metrics" need a type and a value' for m in metrics if not {"type", "value"} <= {*m}
            ]
    return errors


def _strings(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def tags(data: dict[str, Any], text: str) -> list[str]:
    """What the Hub lists a repository under."""
    found = [data["library_name"]] if "library_name" in data else []
    found += [tag for tag in _as_list(data.get("tags")) if isinstance(tag, str)]
    found += [f"dataset:{name}" for name in _as_list(data.get("datasets"))]
    found += [str(language) for language in _as_list(data.get("language"))]
    found += [f"arxiv:{number}" for number in dict.fromkeys(ARXIV.findall(text))]
    relation = data.get("base_model_relation")
    for base in _as_list(data.get("base_model")):
        found += [f"base_model:{base}"] + ([f"base_model:{relation}:{base}"] if relation else [])
    found += [f"license:{name}" for name in _as_list(data.get("license"))]
    return list(dict.fromkeys([*found, "region:us"]))
