"""What a point has finished, file by file: `checksums.json` in its folder, beside what it speaks of.

A checksum is written before the file that it is of, so that whatever is there can be compared. Folders of older
versions have no `checksums.json`; their files are taken as they are.
"""

import json
import zlib
from pathlib import Path

from depthscope.errors import ReportError
from depthscope.files.atomic import says_nothing_of_content, write_atomically
from depthscope.files.checksums import sealed
from depthscope.report.report import LayerReport
from depthscope.runs.layout import CHECKSUMS
from depthscope.runs.read import read_sealed

__all__ = ["keep_checksums", "known_checksums", "report_checksum"]

MAX_BYTES = 4 * 2**20


def keep_checksums(folder: Path, found: dict[str, str]) -> None:
    """Keep the checksums of files in the folder of a point, by their paths in there, beside those that are kept.

    Raises:
        ReportError: what is kept cannot be read, or nothing can be written.
    """
    try:
        kept = known_checksums(folder) or {}
    except ReportError as error:
        if says_nothing_of_content(error):
            raise
        kept = {}
    write_atomically(folder / CHECKSUMS, json.dumps(sealed({"files": kept | found}), indent=1) + "\n")


def known_checksums(folder: Path) -> dict[str, str] | None:
    """The checksums of the files of a point; None where none were kept.

    Raises:
        ReportError: the file that keeps them is damaged, or cannot be read.
    """
    if not (folder / CHECKSUMS).exists():
        return None
    files = read_sealed(folder / CHECKSUMS, MAX_BYTES).get("files")
    if not isinstance(files, dict):
        raise ReportError(f"{CHECKSUMS} is not what was written.")
    return {str(name): str(value) for name, value in files.items()}


def report_checksum(report: LayerReport) -> str:
    """The checksum of what was measured; accuracies on tasks, and the version of lm-eval, may be added later."""
    measured = LayerReport.from_json(report.model_copy(update={"downstream": [], "versions": {}}).to_json())
    return f"{zlib.crc32(measured.to_json().encode()):08x}"
