"""`layer_stats.parquet`: the history of a training as a table with one row per number.

step, epoch, kind, metric, layer, value        layer is null for a number of the whole model
"""

from pathlib import Path
from typing import Any

from depthscope.runs.history import read_history

__all__ = ["PARQUET", "write_layer_stats"]

PARQUET = "layer_stats.parquet"


def write_layer_stats(history: Path, out: Path) -> None:
    """Convert a `layer_stats.jsonl` to parquet; the same history gives the same bytes.

    Raises:
        ReportError: the history cannot be read.
    """
    import pyarrow as pa  # a slow import
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "step": pa.int64(),
            "epoch": pa.float64(),
            "kind": pa.string(),
            "metric": pa.string(),
            "layer": pa.int32(),
            "value": pa.float64(),
        }
    )
    rows = [row for line in read_history(history) for row in _rows(line)]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out)


def _rows(line: dict[str, Any]) -> list[dict[str, Any]]:
    shared = {name: line.get(name) for name in ("step", "epoch", "kind")}
    single = [(metric, None, value) for metric, value in (line.get("values") or {}).items()]
    by_layer = [
        (metric, layer, value)
        for metric, column in (line.get("layers") or {}).items()
        for layer, value in enumerate(column or [])
    ]
    return [shared | {"metric": metric, "layer": layer, "value": value} for metric, layer, value in single + by_layer]
