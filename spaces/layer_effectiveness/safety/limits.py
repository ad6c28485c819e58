"""The limits for visitors; the owner of the Space sets each with an environment variable.

`Limits.from_environment()` reads `DEPTHSCOPE_SPACE_<FIELD>`, such as DEPTHSCOPE_SPACE_MAX_PARAMETERS=3e9. The defaults
fit a Space on free hardware: two cores, 16 GB of memory.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

__all__ = ["Limits", "seconds"]

PREFIX = "DEPTHSCOPE_SPACE_"
MIB, GIB = 2**20, 2**30
LARGEST = 1e18
SHARE_OF_MEMORY = 0.7  # of the machine's, for all jobs together


@dataclass(frozen=True)
class Limits:
    """The limits; bytes are bytes, times are seconds.

    Attributes:
        max_parameters: parameters of a model, counted from its files before they are downloaded.
        max_download_bytes: bytes of the files of a model on the Hub.
        max_upload_bytes: bytes of an upload as it arrives.
        max_unpacked_bytes: bytes of an upload when it is unpacked.
        max_files: files in an upload, or of a model on the Hub.
        max_ratio: the largest compression ratio of a file in an archive; weights compress little.
        max_folders: folders inside each other in an archive.
        max_json_bytes: bytes of a JSON file, except a tokenizer's.
        max_tokenizer_bytes: bytes of a tokenizer's file.
        max_header_bytes: bytes of the header of a safetensors or GGUF file.
        max_report_bytes: bytes of an uploaded report.
        max_text_bytes: bytes of a pasted or uploaded text.
        max_layers: decoder layers.
        max_tokens: tokens to measure on.
        max_block_size: tokens in a block.
        max_job_bytes: memory of one job; 0 is a share of the machine's memory.
        max_job_seconds: time of one job.
        max_jobs: jobs at once.
        max_waiting: jobs that wait for their turn.
        max_jobs_per_visitor: jobs of one visitor that wait or run.
        max_results: results that are cached for equal tasks.
    """

    max_parameters: int = 2_000_000_000
    max_download_bytes: int = 8 * GIB
    max_upload_bytes: int = 2 * GIB
    max_unpacked_bytes: int = 4 * GIB
    max_files: int = 200
    max_ratio: int = 100
    max_folders: int = 4
    max_json_bytes: int = 2 * MIB
    max_tokenizer_bytes: int = 64 * MIB
    max_header_bytes: int = 32 * MIB
    max_report_bytes: int = 32 * MIB  # of `max_layers` layers, with both maps and their errors
    max_text_bytes: int = 4 * MIB
    max_layers: int = 512
    max_tokens: int = 8192
    max_block_size: int = 1024
    max_job_bytes: int = 0
    max_job_seconds: int = 900
    max_jobs: int = 1
    max_waiting: int = 20
    max_jobs_per_visitor: int = 2
    max_results: int = 200

    def __post_init__(self) -> None:
        if not self.max_job_bytes:
            object.__setattr__(self, "max_job_bytes", int(_machine_memory() * SHARE_OF_MEMORY / self.max_jobs))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Limits":
        """Read the limits from environment variables; a limit that is not set has its default.

        Raises:
            ValueError: a variable is not a positive whole number; the message names it.
        """
        given = os.environ if environment is None else environment
        known = {f"{PREFIX}{field.name.upper()}": field.name for field in fields(cls)}
        return cls(
            **{name: _number(variable, given[variable]) for variable, name in known.items() if variable in given}
        )


def seconds(name: str, default: int) -> int:
    """A time that the owner may set as `DEPTHSCOPE_SPACE_<NAME>`.

    Raises:
        ValueError: the variable is not a positive whole number; the message names it.
    """
    variable = f"{PREFIX}{name}"
    return _number(variable, os.environ[variable]) if variable in os.environ else default


def _number(variable: str, text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < LARGEST or number != int(number):
        raise ValueError(f"{variable} is {text!r}; give a positive whole number, such as 1000000 or 1e6.")
    return int(number)


def _machine_memory() -> int:
    """Bytes of memory that this container may use."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                whole = min(whole, int(file.read()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return whole
