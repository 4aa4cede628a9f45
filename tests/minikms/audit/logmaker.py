"""Logs made for tests: fixed keys, a clock that ticks, and both verifiers behind one call.

The keys are for tests only: anyone can read them here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from minikms.audit import AuditKey, AuditLog, Event, record
from minikms.audit.chain import Ed25519Signer
from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.queries import verify_directory
from minikms.audit.record import LineRef
from minikms.audit.repair import AuditKeys
from minikms.audit.rules import Trust
from minikms.audit.verdict import VerificationReport
from tests.minikms.audit import independent_verifier

LOG = "minikms-audit.log"


class Key:
    """One version of an audit key."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.mac_key = memoryview(bytearray([version] * 32))
        self.seed = memoryview(bytearray([100 + version] * 32))
        self.public_key = Ed25519Signer(self.seed).public_key()
        self.since: LineRef | None = None

    def audit_key(self) -> AuditKey:
        return AuditKey(self.version, self.mac_key, Ed25519Signer(self.seed), self.since)


KEY1, KEY2 = Key(1), Key(2)
SECOND = 1_000_000_000
SMALL = LogLimits(reserve_bytes=0)


class Clock:
    """Unix time in ns; each call returns a time `step` later."""

    def __init__(self, now: int = 1_700_000_000 * SECOND, step: int = 1000) -> None:
        self.now = now
        self.step = step

    def __call__(self) -> int:
        self.now += self.step
        return self.now


def open_log(
    directory: Path,
    key: Key = KEY1,
    *,
    former: tuple[AuditKey, ...] = (),
    since: LineRef | None = None,
    clock: Callable[[], int] | None = None,
    **options: object,
) -> AuditLog:
    """With a `Clock`, that clock is the monotonic one too, unless `options` has another."""
    clock = clock or Clock()
    options.setdefault("limits", SMALL)
    if isinstance(clock, Clock):
        options.setdefault("monotonic_ns", lambda: clock.now)
    return AuditLog(
        directory,
        AuditKeys(key.audit_key()._replace(since=since), former),
        now_ns=clock,
        **options,  # type: ignore[arg-type]  # tests pass on what `open` takes
    )


def encrypt_event(number: int = 0, **members: object) -> Event:
    key_id = f"k_01jd{number % 1000:022}"
    return Event(
        type="encrypt", actor="peer_uid:1000", pid=77, key_id=key_id, request_id=f"r{number}",
        **members,  # type: ignore[arg-type]  # tests pass on what `Event` takes
    )  # fmt: skip


def write_events(log: AuditLog, count: int, *, per_commit: int = 1, first: int = 0) -> None:
    for number in range(first, first + count):
        log.add(encrypt_event(number))
        if (number - first + 1) % per_commit == 0:
            log.commit()
    log.commit()


def make_log(directory: Path, count: int = 12, **options: object) -> AuditLog:
    """A closed log of `count` events in `directory`, which is made."""
    directory.mkdir(exist_ok=True, parents=True)
    log = open_log(directory, **options)  # type: ignore[arg-type]  # tests pass on what `open` takes
    write_events(log, count)
    log.close()
    return log


def kill_log(directory: Path, *, torn: bytes) -> None:
    """A log whose writer was killed, with bytes of an incomplete line at its end."""
    write_events(open_log(directory), 3)
    with (directory / LOG).open("ab") as file:
        file.write(torn)


def make_segments(directory: Path, count: int = 60) -> None:
    """A closed log in several files: with this clock every commit does the chores."""
    make_log(directory, count, clock=Clock(step=CHORES_NS), limits=LogLimits(segment_bytes=3000, reserve_bytes=0))


def events_of(path: Path) -> list[Event]:
    return [record.parse_line(line)[0] for line in path.read_bytes().split(b"\n")[:-1]]


def lines_of(directory: Path) -> list[bytes]:
    return (directory / LOG).read_bytes().split(b"\n")[:-1]


def trust(*keys: Key, public_only: bool = False) -> Trust:
    keys = keys or (KEY1,)
    mac_keys = {} if public_only else {key.version: key.mac_key for key in keys}
    return Trust(public_keys=frozenset(key.public_key for key in keys), mac_keys=mac_keys)


def verify(
    directory: Path,
    *keys: Key,
    public_only: bool = False,
    expect_head: LineRef | None = None,
    since: Mapping[int, LineRef] | None = None,
) -> VerificationReport:
    """The report of the product's verifier, after checking that the independent one agrees with it."""
    keys = keys or (KEY1,)
    since = {} if public_only else since or {}
    believed = msgspec.structs.replace(trust(*keys, public_only=public_only), since=since)
    report = verify_directory(str(directory), believed, expect_head=expect_head)
    fault = independent_verifier.verify(
        directory,
        keys[0].public_key,
        {} if public_only else {key.version: bytes(key.mac_key) for key in keys},
        None if expect_head is None else (expect_head.seq, expect_head.sig),
        {version: (head.seq, head.sig) for version, head in since.items()},
        () if public_only else {key.public_key for key in keys},
    )
    assert report.intact == (fault == ""), f"two verdicts: {report.findings!r} and {fault!r}"
    return report


def types_of(directory: Path) -> list[str]:
    return [event.type for event in events_of(directory / LOG)]
