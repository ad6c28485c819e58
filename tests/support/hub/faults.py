"""`Faults`: what goes wrong on purpose, for which requests, and how often."""

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import TypeVar


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong with one request; what is None goes as it should.

    `status` answers with that error instead of doing anything, with the header Retry-After where `retry_after` is set.
    `cut` drops the connection: "upload" in the middle of the request, which is not carried out; "answer" after it was
    carried out, before the client hears of it; "download" in the middle of the answer's body.
    `delay` waits that many seconds first. `stale` answers late: "commit" as if a branch's last commit had not reached
    this server yet; "etag" with the etag of the version before, beside the new content.
    """

    status: int | None = None
    retry_after: int | None = None
    cut: str | None = None
    delay: float = 0.0
    stale: str | None = None

    def __post_init__(self) -> None:
        if self.cut not in (None, "upload", "answer", "download") or self.stale not in (None, "commit", "etag"):
            raise ValueError(f"no such fault: {self}")


# Each of them passes, so a client that tries again succeeds.
TRANSIENT = (
    Fault(status=429, retry_after=0),
    Fault(status=500),
    Fault(status=503),
    Fault(cut="upload"),
    Fault(cut="answer"),
    Fault(cut="download"),
    Fault(delay=0.05),
)


@dataclass
class Rule:
    """Requests that match get the fault: not the first `skip`, then `times` of them (None: all). `used` counts them."""

    operation: str
    path: str
    fault: Fault
    times: int | None
    skip: int = 0
    used: int = 0

    def take(self, operation: str, path: str) -> Fault | None:
        if not fnmatch(operation, self.operation) or not fnmatch(path, self.path):
            return None
        if self.skip > 0:
            self.skip -= 1
            return None
        if self.times is not None and self.used >= self.times:
            return None
        self.used += 1
        return self.fault


@dataclass
class RandomFaults:
    """A share `rate` of requests get one of `kinds`, `limit` at most.

    Chance depends on the seed, the request and how often it came before, not on the order in which threads send.
    """

    seed: int
    rate: float
    operation: str
    kinds: Sequence[Fault]
    limit: int | None
    used: int = 0

    def __post_init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()

    def take(self, operation: str, path: str) -> Fault | None:
        if not fnmatch(operation, self.operation) or (self.limit is not None and self.used >= self.limit):
            return None
        self.seen[operation, path] += 1
        key = f"{self.seed} {operation} {path} {self.seen[operation, path]}"
        chance = random.Random(hashlib.sha256(key.encode()).digest())
        if chance.random() >= self.rate:
            return None
        self.used += 1
        return chance.choice(self.kinds)


RuleT = TypeVar("RuleT", Rule, RandomFaults)


class Faults:
    """The rules in force; the first that matches wins. Operations are those of routes' names, with `*` and `?`.

    `hub.faults.next("commit", status=500)`; `hub.faults.always("resolve", path="*/config.json", delay=0.2)`;
    `hub.faults.random(seed=3, rate=0.2)`; `hub.faults.clear()`.
    """

    def __init__(self) -> None:
        self.rules: list[Rule | RandomFaults] = []
        self.lock = threading.Lock()

    def next(self, operation: str = "*", times: int = 1, path: str = "*", skip: int = 0, **fault: object) -> Rule:
        """The next `times` requests, after `skip` of them, get the fault (fields of `Fault`)."""
        return self._add(Rule(operation, path, replace(Fault(), **fault), times, skip))

    def always(self, operation: str = "*", path: str = "*", skip: int = 0, **fault: object) -> Rule:
        """Every request gets the fault until `clear`."""
        return self._add(Rule(operation, path, replace(Fault(), **fault), None, skip))

    def random(
        self,
        seed: int,
        rate: float,
        operation: str = "*",
        kinds: Sequence[Fault] = TRANSIENT,
        limit: int | None = None,
    ) -> RandomFaults:
        """A share of requests get one of `kinds`, the same ones for the same seed and requests."""
        return self._add(RandomFaults(seed, rate, operation, kinds, limit))

    def _add(self, rule: RuleT) -> RuleT:
        with self.lock:
            self.rules.append(rule)
        return rule

    def clear(self) -> None:
        with self.lock:
            self.rules.clear()

    def take(self, operation: str, path: str) -> Fault:
        """What goes wrong with a request that came in."""
        with self.lock:
            for rule in self.rules:
                if fault := rule.take(operation, path):
                    return fault
        return Fault()
