"""What real members did is a behaviour of the model of `models`."""

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import KmsError
from tests import needs
from tests.harness.replica_hosts import KeyHost, key_hosts
from tests.harness.waiting import wait_until
from tests.minikms_replicator.traces import RECORD, Event, is_explained, recorded

KEPT = Path(__file__).with_name("trace.json")
"""Two hosts: the first one makes, rotates and destroys keys, is killed and replaced, comes back, and is promoted."""


def kept() -> list[Event]:
    return [Event(*row) for row in json.loads(KEPT.read_text())]


def place_of(events: list[Event], what: str, term: int) -> int:
    return next(n for n, event in enumerate(events) if (event.what, event.term) == (what, term))


def altered(events: list[Event], place: int, **members: Any) -> list[Event]:
    """With one event changed, at the place that its time gives it."""
    changed = [*events[:place], events[place]._replace(**members), *events[place + 1 :]]
    return sorted(changed, key=lambda event: event.now)


def test_a_run_of_real_members_is_a_behaviour_of_the_model(tmp_path: Path) -> None:
    assert is_explained(tmp_path, kept())


@pytest.mark.parametrize(
    "change",
    [
        lambda run: altered(run, place_of(run, "serve", 2), now=run[place_of(run, "serve", 2)].now - 2),
        lambda run: altered(run, place_of(run, "answer", 1), now=run[place_of(run, "serve", 2)].now - 0.5),
        lambda run: altered(run, place_of(run, "answer", 1), now=run[place_of(run, "answer", 2)].now + 0.01),
        lambda run: altered(run, place_of(run, "change", 2), by=run[0].by, term=1),
        lambda run: altered(run, place_of(run, "change", 1), number=2),
        lambda run: altered(run, place_of(run, "answer", 2), number=99),
        lambda run: [event for event in run if event.what != "release"],
        lambda run: altered(run, place_of(run, "answer", 3), by=run[place_of(run, "answer", 2)].by),
    ],
    ids=[
        "it took over before the wait was over", "it answered after its lease", "two answered at one time",
        "a commit did not ask for its term", "a change is missing", "it answered before its change was stored",
        "it took over without a release", "another one answered",
    ],
)  # fmt: skip
def test_a_run_that_breaks_the_protocol_is_not_explained(
    tmp_path: Path, change: Callable[[list[Event]], list[Event]]
) -> None:
    assert not is_explained(tmp_path, change(kept()))


class Run:
    """Two hosts, a client of each that never stops to ask, and the moments at which a host was ended or began."""

    def __init__(self, a: KeyHost, b: KeyHost) -> None:
        self.hosts = {"m1": a, b.status().member_id: b}
        self.others: list[Event] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(host,)) for host in (a, b)]

    def _ask(self, host: KeyHost) -> None:
        number = 0
        while not self._over.wait(0.3):
            number += 1
            with contextlib.suppress(KmsError, OSError), host.client(wait_s=0, timeout_s=30) as kms:
                kms.encrypt(kms.create_dek_for_thread(f"{host.name}{number}").key_id, b"text")

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()

    def serving(self) -> str:
        """The member that serves, once one does."""
        found: list[str] = []

        def settled() -> bool:
            for member, host in self.hosts.items():
                with contextlib.suppress(KmsError):
                    if host.status().mode == "serving":
                        found.append(member)
            return bool(found)

        wait_until(settled)
        return found[-1]

    def end(self, member: str) -> None:
        self.hosts[member].end()
        self.others.append(Event(time.time(), "leave", member))

    def start(self, member: str) -> None:
        self.others.append(Event(time.time(), "return", member))
        self.hosts[member].start()


@contextlib.contextmanager
def stopped(*processes: Any) -> Iterator[None]:
    pids = [process.pid for process in processes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_a_run_with_faults_is_a_behaviour_of_the_model(public: Path) -> None:
    needs.library("asyncpg")
    with key_hosts(public) as hosts:
        hosts.execute(RECORD)
        a = hosts.first("a")
        b = hosts.joined("b", a)
        run = Run(a, b)
        with run.asking():
            for fault in (stop_replicator, stop_host, kill_host, restart_daemon, lose_answers, promote):
                fault(run, hosts.execute)
                time.sleep(3)
        events = recorded(hosts.owner, [host.data_dir / "minikms-audit.log" for host in (a, b)], run.others)
    with tempfile.TemporaryDirectory() as place:
        assert is_explained(Path(place), events), events


def stop_replicator(run: Run, _: Callable[[str], None]) -> None:
    before = run.hosts[run.serving()]
    with stopped(before.replicator):
        wait_until(lambda: run.hosts[run.serving()] is not before)


def stop_host(run: Run, _: Callable[[str], None]) -> None:
    """Its clock goes on."""
    before = run.serving()
    other = next(host for member, host in run.hosts.items() if member != before)
    with stopped(run.hosts[before].replicator, run.hosts[before].daemon):
        wait_until(lambda: other.status().mode == "serving")


def kill_host(run: Run, _: Callable[[str], None]) -> None:
    before = run.serving()
    run.end(before)
    time.sleep(2)
    run.start(before)
    run.serving()


def restart_daemon(run: Run, _: Callable[[str], None]) -> None:
    """Its replicator goes on, and has the head."""
    before = run.serving()
    host = run.hosts[before]
    assert host.daemon is not None
    host.daemon.kill()
    host.daemon.wait()
    run.others.append(Event(time.time(), "leave", before))
    run.others.append(Event(time.time(), "return", before))
    host.start_daemon()
    run.serving()


def lose_answers(run: Run, execute: Callable[[str], None]) -> None:
    for _ in range(10):
        execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'replicator'")
        time.sleep(0.5)
    run.serving()


def promote(run: Run, _: Callable[[str], None]) -> None:
    before = run.serving()
    other = next(host for member, host in run.hosts.items() if member != before)
    wait_until(lambda: other.status().number >= run.hosts[before].status().number - 1)
    other.run("replica", "promote", "--wait", "60", "--yes", *other.at)
