"""The reports of a sweep as a data set of the Hub.

    load_dataset("namespace/name")              one row per report: point, settings, global scores, the report
    load_dataset("namespace/name", "layers")    one row per layer of a report

Each model has two reports: of the trained model, and of the untrained model as the control (`trained` is false).
`LayerReport.from_json(row["report"])` restores a report.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from depthscope.errors import HubError, ReportError
from depthscope.hub.tree import MAIN, Tree
from depthscope.report.measures import GLOBAL_SCORES
from depthscope.report.report import LayerReport
from depthscope.runs.layout import REPORTS, TRAINED_REPORT
from depthscope.wording.markdown import inline
from depthscope.wording.messages import one_line

__all__ = ["Reported", "reports_tree"]

CONFIGS = ("reports", "layers")
NAMED = {"point": "string", "variant": "string", "seed": "int64", "trained": "bool", "model": "string"}
# The settings of `datasets`: page boundaries follow the content, so a small change uploads little.
CHUNKS = {"min_chunk_size": 2**18, "max_chunk_size": 2**20, "norm_level": 0}
ROW_GROUP = 100_000_000  # bytes
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


Columns = dict[str, tuple[str, list[Any]]]  # by name: Arrow's type and the values


@dataclass(frozen=True)
class Reported:
    """A point of a sweep: its folder, its entry in the sweep's index, and the repository of its model."""

    folder: Path
    facts: dict[str, Any]
    repo_id: str


PointReport = tuple[Reported, bool, LayerReport]


def reports_tree(
    points: Sequence[Reported], repo_id: str, work: Path, *, sweep: str, license: str | None = None
) -> Tree:
    """Write the reports of points as a data set into `work`.

    Raises:
        HubError: there is no report.
        ReportError: a report is damaged.
    """
    reports = [
        (point, trained, LayerReport.load(point.folder / name))
        for point in points
        for name, trained in REPORTS.items()
        if (point.folder / name).is_file()
    ]
    if not reports:
        raise HubError(f"No point of the sweep {sweep!r} has a {TRAINED_REPORT}, so there is no report to publish.")
    work.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.parquet": work / f"{name}.parquet" for name in CONFIGS}
    _write_parquet(files["reports.parquet"], _reports(reports))
    rows = _write_parquet(files["layers.parquet"], _layers(reports))
    card = _card(repo_id, sweep, points, license, rows)
    (work / "README.md").write_text(card, encoding="utf-8")
    return Tree(repo_id, "dataset", MAIN, files | {"README.md": work / "README.md"})


def _reports(reports: Iterable[PointReport]) -> Columns:
    """One row per report, with the global scores that any report has."""
    rows = [
        {
            **_named(point, trained),
            "settings": json.dumps(point.facts.get("settings") or {}, sort_keys=True),
            "data": report.data["name"],
            "layers": len(report.layers),
            **report.scores,
            "report": report.to_json(),
        }
        for point, trained, report in reports
    ]
    scores = [name for score in GLOBAL_SCORES for name in (score, f"{score}_se") if any(name in row for row in rows)]
    kinds = {**NAMED, "settings": "string", "data": "string", "layers": "int64"}
    kinds |= {**dict.fromkeys(scores, "float64"), "report": "string"}
    return {name: (kind, [row.get(name) for row in rows]) for name, kind in kinds.items()}


def _layers(reports: Iterable[PointReport]) -> Columns:
    """One row per layer of each report."""
    columns: Columns = {}
    for point, trained, report in reports:
        table, rows = report.table(), len(report.layers)
        named = {name: (NAMED[name], [value] * rows) for name, value in _named(point, trained).items()}
        for name, (kind, values) in {**table, **named}.items():
            columns.setdefault(name, (kind, []))[1].extend(values)
    order = [*NAMED, *(name for name in columns if name not in {*NAMED, "revision"})]
    return {name: columns[name] for name in order}


def _named(point: Reported, trained: bool) -> dict[str, Any]:
    facts = point.facts
    return {
        "point": str(facts.get("point") or point.folder.name),
        "variant": facts.get("variant"),
        "seed": facts.get("seed"),
        "trained": trained,
        "model": point.repo_id,
    }


def _write_parquet(path: Path, columns: Columns) -> int:
    """Write columns in the format of `datasets`, including its types, without importing it: it imports torch.

    Returns the number of rows.

    Raises:
        ReportError: a value does not have the type of its column.
    """
    import pyarrow as pa  # a slow import
    import pyarrow.parquet as pq

    features = {name: {"dtype": kind, "_type": "Value"} for name, (kind, _) in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, (kind, _) in columns.items()], metadata=metadata)
    try:
        table = pa.table({name: _plain(*column) for name, column in columns.items()}, schema)
    except (pa.ArrowException, OverflowError) as error:
        raise ReportError(f"The sweep's index is damaged: {one_line(error)} Run the sweep again.") from error
    with pq.ParquetWriter(path, schema, use_content_defined_chunking=CHUNKS, write_page_index=True) as writer:
        writer.write_table(table, max(1, table.num_rows * ROW_GROUP // max(1, table.nbytes)))
        writer.add_key_value_metadata({"content_defined_chunking": json.dumps(CHUNKS)})
    return int(table.num_rows)


def _plain(kind: str, values: list[Any]) -> list[Any]:
    return [value if value is None else str(value) for value in values] if kind == "string" else values


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
    """A text that goes into the card unescaped: a valid name of the Hub, or YAML."""

    __slots__ = ()

    def __html__(self) -> str:
        return self
