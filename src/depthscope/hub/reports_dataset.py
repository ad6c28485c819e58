"""The reports of a sweep as a data set of the Hub.

    load_dataset("namespace/name")              one row a report: point, settings, global scores, and the report itself
    load_dataset("namespace/name", "layers")    one row a layer of a report

Each model has two reports, of the trained model and of the same before training (`trained` is false): the control.
`LayerReport.from_json(row["report"])` gives a report back.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from depthscope.console.quiet import quiet
from depthscope.errors import HubError
from depthscope.hub.tree import MAIN, Tree
from depthscope.report.measures import GLOBAL_SCORES
from depthscope.report.report import LayerReport
from depthscope.wording.markdown import inline

__all__ = ["REPORTS", "Reported", "reports_tree"]

REPORTS = {"layer_report.json": True, "untrained_report.json": False}  # by whether the model is trained
CONFIGS = ("reports", "layers")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Reported:
    """A point of a sweep: its folder, what the sweep says of it, and the repository of its model."""

    folder: Path
    facts: dict[str, Any]
    repo_id: str


def reports_tree(
    points: Sequence[Reported], repo_id: str, work: Path, *, sweep: str, license: str | None = None
) -> Tree:
    """Write the reports of points as a data set into `work`.

    Raises:
        HubError: there is no report.
        ReportError: a report is damaged.
    """
    import datasets

    found = [
        (point, trained, LayerReport.load(point.folder / name))
        for point in points
        for name, trained in REPORTS.items()
        if (point.folder / name).is_file()
    ]
    if not found:
        raise HubError(f"No point of the sweep {sweep!r} has a layer_report.json: there is nothing to make data of.")
    rows = [_row(*one) for one in found]
    scores = [name for name in _score_names() if any(name in row for row in rows)]
    features = {name: datasets.Value("string") for name in ("point", "variant", "model", "settings", "data", "report")}
    features |= {"seed": datasets.Value("int64"), "trained": datasets.Value("bool"), "layers": datasets.Value("int64")}
    order = ("point", "variant", "seed", "trained", "model", "settings", "data", "layers")
    typed = {name: features[name] for name in order} | {name: datasets.Value("float64") for name in scores}
    typed["report"] = features["report"]
    columns = {name: [row.get(name) for row in rows] for name in typed}
    with quiet():
        tables = {
            "reports": datasets.Dataset.from_dict(columns, features=datasets.Features(typed)),
            "layers": datasets.concatenate_datasets([_layers(*one) for one in found]),
        }
        work.mkdir(parents=True, exist_ok=True)
        files = {f"{name}.parquet": work / f"{name}.parquet" for name in CONFIGS}
        for name, table in tables.items():
            table.to_parquet(files[f"{name}.parquet"])
    card = _card(repo_id, sweep, points, license, len(tables["layers"]))
    (work / "README.md").write_text(card, encoding="utf-8")
    return Tree(repo_id, "dataset", MAIN, files | {"README.md": work / "README.md"})


def _score_names() -> list[str]:
    return [name for score in GLOBAL_SCORES for name in (score, f"{score}_se")]


def _row(point: Reported, trained: bool, report: LayerReport) -> dict[str, Any]:
    return {
        **_named(point, trained),
        "settings": json.dumps(point.facts.get("settings") or {}, sort_keys=True),
        "data": report.data["name"],
        "layers": len(report.layers),
        **report.scores,
        "report": report.to_json(),
    }


def _named(point: Reported, trained: bool) -> dict[str, Any]:
    facts = point.facts
    return {
        "point": str(facts.get("point") or point.folder.name),
        "variant": facts.get("variant"),
        "seed": facts.get("seed"),
        "trained": trained,
        "model": point.repo_id,
    }


def _layers(point: Reported, trained: bool, report: LayerReport) -> Any:
    import datasets

    rows = report.to_dataset().remove_columns(["model", "revision"])
    named = {name: [value] * len(rows) for name, value in _named(point, trained).items()}
    types = {"seed": datasets.Value("int64"), "trained": datasets.Value("bool")}
    features = datasets.Features({name: types.get(name, datasets.Value("string")) for name in named})
    return datasets.concatenate_datasets([datasets.Dataset.from_dict(named, features=features), rows], axis=1)


def _card(repo_id: str, sweep: str, points: Sequence[Reported], license: str | None, rows: int) -> str:
    data = DatasetCardData(
        license=license,
        pretty_name=f"Layer reports of the sweep {sweep}",
        size_categories=[next((name for most, name in SIZES if rows < most), "n>1M")],
        tags=["depthscope", "curse-of-depth"],
        configs=[
            {"config_name": name, "data_files": f"{name}.parquet", **({"default": True} if name == "reports" else {})}
            for name in CONFIGS
        ],
    )
    environment = Environment(
        loader=PackageLoader("depthscope"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: inline(str(value)) if not hasattr(value, "__html__") else value,
    )
    template = environment.get_template("reports_card.md.j2")
    models = [point.repo_id for point in points]
    text = template.render(front_matter=_Raw(data.to_yaml()), repo=_Raw(repo_id), sweep=sweep, models=map(_Raw, models))
    return str(DatasetCard(text))


class _Raw(str):
    """A text that goes into the card as it is: checked to be a name of the Hub, or YAML."""

    __slots__ = ()

    def __html__(self) -> str:
        return self
