"""What a point has finished, file by file: `checksums.json` in its folder, beside what it speaks of.

A checksum is written before the file that it is of, so that whatever is there can be compared. Folders of older
versions have no `checksums.json`; their files are taken as they are.
"""

import json
import zlib
from pathlib import Path

from depthscope.errors import ReportError
from depthscope.files.atomic import read_text, says_nothing_of_content, write_atomically
from depthscope.files.checksums import is_whole, sealed
from depthscope.files.strict_json import parse
from depthscope.report.report import LayerReport

__all__ = ["FILE", "keep_checksums", "known_checksums", "report_checksum"]

FILE = "checksums.json"
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
    write_atomically(folder / FILE, json.dumps(sealed({"files": kept | found}), indent=1) + "\n")


def known_checksums(folder: Path) -> dict[str, str] | None:
    """The checksums of the files of a point; None where none were kept.

    Raises:
        ReportError: the file that keeps them is damaged, or cannot be read.
    """
    if not (folder / FILE).exists():
        return None
    content = parse(read_text(folder / FILE, MAX_BYTES), FILE)
    files = content.get("files") if isinstance(content, dict) and is_whole(content) else None
    if not isinstance(files, dict):
        raise ReportError(f"{FILE} is not what was written")
    return {str(name): str(value) for name, value in files.items()}


def report_checksum(report: LayerReport) -> str:
    """The checksum of what was measured; accuracies on tasks, and the version of lm-eval, may be added later."""
    measured = LayerReport.from_json(report.model_copy(update={"downstream": [], "versions": {}}).to_json())
    return f"{zlib.crc32(measured.to_json().encode()):08x}"
