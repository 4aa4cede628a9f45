"""Changes of keys that a fault interrupts, and the expected result of each.

Owns: the changes (both forms of rotation, adding and removing a root key, destroy, create) on a prepared directory; the
enumeration of the system calls at which a fault is injected; and one run for each: start, inject, check. The
enumeration ends at a call that is not reached.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import minikms
from minikms.api.errors import ConflictError, KmsError
from tests.minikms.custody.rotation.crash_points import (
    DEADLINE_SECONDS,
    Daemon,
    Injection,
    Point,
    Prepared,
    wait_for_revocation,
    wait_until_settled,
)

Change = Literal[
    "rotate the KEK", "rotate to a new root key", "add a root key", "remove a root key", "destroy a key", "create a key"
]
CHANGES: tuple[Change, ...] = get_args(Change)


class InterruptedChange:
    """Makes one change, interrupted at one point after another."""

    def __init__(self, prepared: Prepared, base: Path, change: Change) -> None:
        self._prepared = prepared
        self._base = base
        self._change = change
        self._count = 0
        self.points = 0
        self._old = (prepared.base / "key").read_text().strip()
        self._new = os.urandom(32).hex()
        self._added = self._removed = False
        """Whether adding or removing the new root key was acknowledged in this run."""

    def points_of(self, thread: str, calls: str, *, numbers: Iterator[int], action: str) -> None:
        """Injects the fault at each number in turn, until one is not reached."""
        for number in numbers:
            if not self.interrupt(Point(thread, calls, number), action):
                return

    def interrupt(self, point: Point, action: str) -> bool:
        """One run; False if the change was complete before the point was reached."""
        self._count += 1
        base = self._base / f"v{self._count}"
        daemon = self._prepared.copy_to(base)
        self._added = self._removed = False
        try:
            assert daemon.start(), daemon.log()
            with daemon.client() as client:
                wait_until_settled(client)  # else the system calls of the start would be counted too
                if self._change == "remove a root key":
                    client.add_root(self._new, provider="file")
            injection = Injection(daemon, point, action)
            made = self._perform(daemon)
            injection.end()
            if not injection.happened():
                return False
            self.points += 1
            if action == "signal=KILL":
                assert daemon.has_died(within_s=DEADLINE_SECONDS), "the daemon is still alive"
                # Whichever key the operator may still have: in turn the old and the new one first.
                first, other = (self._old, self._new) if self._count % 2 else (self._new, self._old)
                self._prepared.check_state(daemon, first, other)
                self._check_roots(daemon)
            else:
                self._check_alive(daemon, point)
            for key_id in made:
                self._check_created(daemon, key_id)
        except AssertionError as error:
            raise AssertionError(f"{self._change}, {point}, {action}: {error}") from error
        finally:
            daemon.kill()
        shutil.rmtree(base)
        return True

    def _perform(self, daemon: Daemon) -> list[str]:
        """Makes the change; the ids of keys whose creation was acknowledged."""
        made: list[str] = []
        with contextlib.suppress(KmsError), minikms.Client(daemon.base / "s", timeout_s=DEADLINE_SECONDS) as client:
            match self._change:
                case "rotate the KEK":
                    client.rotate_kek()
                case "rotate to a new root key":
                    client.rotate_kek(new_kek_hex=self._new)
                case "add a root key":
                    with contextlib.suppress(ConflictError):  # it was added before a fault
                        client.add_root(self._new, provider="file")
                    self._added = True
                case "remove a root key":
                    found = [root.slot_id for root in client.list_roots().roots if not root.in_use]
                    for slot_id in found:
                        client.remove_root(slot_id)
                    self._removed = True
                    wait_for_revocation(client)
                case "create a key":
                    for number in range(3):
                        made.append(client.create_dek_for_thread(f"n{number}").key_id)
                case "destroy a key":
                    key_id = client.create_dek_for_thread("doomed").key_id
                    client.retire_key(key_id)
                    client.destroy_key(key_id)
        return made

    def _check_alive(self, daemon: Daemon, point: Point) -> None:
        """After a fault the daemon still serves, a retry completes, and a restart finds every key."""
        assert not daemon.has_died(), "the daemon died"
        with daemon.client(wait_s=5.0) as client:
            wait_until_settled(client)
            self._perform(daemon)
            wait_until_settled(client)
            self._prepared.check_records(client)
        daemon.stop()
        self._prepared.check_state(daemon, self._old, self._new)
        self._check_roots(daemon)

    def _check_roots(self, daemon: Daemon) -> None:
        """A root key whose adding was acknowledged opens the keyring; one whose removal was does not."""
        if self._change not in ("add a root key", "remove a root key"):
            return
        daemon.key_file.write_text(self._new + "\n")
        opens = daemon.start()
        daemon.stop()
        assert opens or not self._added, daemon.log()
        assert not opens or not self._removed, "a removed root key opens the keyring"

    def _check_created(self, daemon: Daemon, key_id: str) -> None:
        assert daemon.start(), daemon.log()
        with daemon.client() as client:
            client.decrypt(key_id, client.encrypt(key_id, b"x"))
        daemon.stop()
