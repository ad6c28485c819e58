"""Faults from outside, for as long as is wanted: visitors of a Space, sweeps and trainings, all chosen by one seed.

    python benchmarks/soak.py --minutes 30 --seed 1
    python benchmarks/soak.py --minutes 5 --seed 1 --only sweeps

    visitors     upload, leave, stop, are killed and send junk, at a served Space (soak_visitors.py)
    sweeps       are killed at random moments, with a random file damaged in between, and run to their end
    trainings    with callbacks are killed and resumed (both in soak_sweeps.py)

They come one after the other and share the time. What was done is counted; at the end there may be no process, no
temporary file and no fault, such as a wrong result, damage that nobody named, a port that is taken or memory that grew.
Exits with 1 if there is.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

SHARES = {"visitors": 0.45, "sweeps": 0.4, "trainings": 0.15}  # of the time
MARK = "DEPTHSCOPE_SOAK"  # a variable by which processes of this run are known, whoever their parent is now
ENDING = 30  # seconds that processes have to end


def part(name: str) -> Callable[[int, float], dict[str, int]]:
    """The part of the soak with this name."""
    if name == "visitors":
        from soak_visitors import visitors

        return visitors
    import soak_sweeps

    return {"sweeps": soak_sweeps.sweeps, "trainings": soak_sweeps.trainings}[name]


def run(name: str, seed: int, seconds: float) -> dict[str, int]:
    """Run one part; what stops it counts as a fault."""
    try:
        return part(name)(seed, seconds)
    except Exception as error:
        print(f"{name}: {error!r}", flush=True)
        return {"fault: it stopped": 1}


def processes_left() -> list[str]:
    """Processes of this run that are still there, once they had time to end."""
    until = time.monotonic() + ENDING
    while (found := _marked()) and time.monotonic() < until:
        time.sleep(0.5)
    return found


def _marked() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            own = process.pid == os.getpid() or process.ppid() == os.getpid()  # such as multiprocessing's tracker
            if not own and process.environ().get(MARK) == os.environ[MARK]:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        except psutil.Error:  # gone meanwhile, or of somebody else
            continue
    return found


def main() -> int:
    """Run the parts, print what was counted, and say whether anything was amiss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=list(SHARES), action="append", help="only this part; may be given again")
    given = parser.parse_args()
    names = given.only or list(SHARES)
    print(f"seed {given.seed}, {given.minutes:g} minutes", flush=True)
    os.environ[MARK] = str(os.getpid())
    place = tempfile.mkdtemp(prefix="soak-")
    os.environ["TMPDIR"] = place
    table = Table("part", "what", "count", box=None)
    faults = 0
    for name in names:
        seconds = given.minutes * 60 * SHARES[name] / sum(SHARES[each] for each in names)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            counts = pool.submit(run, name, given.seed, seconds).result()
        for what, count in sorted(counts.items()):
            table.add_row(name, what, str(count))
            faults += count if what.startswith("fault") else 0
    left = {
        "processes left": processes_left(),
        "temporary files left": [str(path) for path in Path(place).rglob("*") if path.is_file()],
    }
    for what, found in left.items():
        table.add_row("", what, str(len(found)))
        faults += len(found)
        for each in found[:20]:
            print(f"{what}: {each}")
    shutil.rmtree(place, ignore_errors=True)
    Console().print(table)
    print(f"{faults} faults (seed {given.seed})")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
