"""docs/space.md: its numbers are those of the code."""

import re
from dataclasses import fields
from pathlib import Path

from jobs.queue import DESERTED_SECONDS, Results
from page.interface import CACHE_SECONDS, MOST_SESSIONS
from safety.limits import MIB, Limits

TEXT = (Path(__file__).parents[2] / "docs" / "space.md").read_text(encoding="utf-8")
ROWS = {name: bound for bound, name in re.findall(r"^\| [^|]+ \| ([^|]+) \| `([A-Z_]+)` \|$", TEXT, re.MULTILINE)}


def test_the_limits_that_the_owner_is_told_are_the_defaults():
    known = {field.name.upper(): field.default for field in fields(Limits)} | {"DESERTED_SECONDS": DESERTED_SECONDS}
    numbers = {name: bound.replace(",", "") for name, bound in ROWS.items() if name not in ("MAX_JOB_BYTES",)}
    assert {name: re.match(r"\d+", bound)[0] for name, bound in numbers.items()} == {
        name: str(known[name]) for name in numbers
    }
    assert len(numbers) == 16
    assert f"{Results(1).most_bytes // MIB} MiB together" in ROWS["MAX_RESULTS"]


def test_the_times_that_the_owner_is_told_are_those_of_the_code():
    limits = {field.name: field.default for field in fields(Limits)}
    stated = set(re.findall(r"(\d+) seconds", TEXT)) - {"5"}  # in which it ends, which a test measures
    assert stated == {str(DESERTED_SECONDS), str(limits["max_job_seconds"])}
    assert CACHE_SECONDS[1] == 3600
    assert "after an hour" in TEXT
    assert f"the last {MOST_SESSIONS} visitors" in TEXT
