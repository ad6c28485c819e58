"""The checksums of the finished files of a point: `checksums.json` in its folder.

The checksum of a file is written before the file, so that every file can be checked. Folders of older versions have no
`checksums.json`; their files are accepted as they are.
"""

import json
import zlib
from pathlib import Path

from depthscope.errors import ReportError
from depthscope.files.atomic import is_access_error, write_atomically
from depthscope.files.checksums import sealed
from depthscope.report.report import LayerReport
from depthscope.runs.layout import CHECKSUMS
from depthscope.runs.read import read_sealed

__all__ = ["keep_checksums", "known_checksums", "report_checksum"]

MAX_BYTES = 4 * 2**20


def keep_checksums(folder: Path, new: dict[str, str]) -> None:
    """Add checksums, by relative path, to those in the folder of a point.

    Raises:
        ReportError: the existing checksums cannot be read, or the new ones cannot be written.
    """
    try:
        existing = known_checksums(folder) or {}
    except ReportError as error:
        if is_access_error(error):
            raise
        existing = {}
    write_atomically(folder / CHECKSUMS, json.dumps(sealed({"files": existing | new}), indent=1) + "\n")


def known_checksums(folder: Path) -> dict[str, str] | None:
    """The checksums of the files of a point; None if it has none.

    Raises:
        ReportError: `checksums.json` is damaged or cannot be read.
    """
    if not (folder / CHECKSUMS).exists():
        return None
    files = read_sealed(folder / CHECKSUMS, MAX_BYTES).get("files")
    if not isinstance(files, dict):
        raise ReportError(f"{CHECKSUMS} was changed or damaged after it was written.")
    return {str(name): str(value) for name, value in files.items()}


def report_checksum(report: LayerReport) -> str:
    """The checksum of a report without its downstream accuracies and versions, which may be added later."""
    measured = LayerReport.from_json(report.model_copy(update={"downstream": [], "versions": {}}).to_json())
    return f"{zlib.crc32(measured.to_json().encode()):08x}"
