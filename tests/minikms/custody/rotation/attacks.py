"""Changes of keys that a fault interrupts, and the expected result of each.

Owns: the four changes (both forms of rotation, destroy, create) as attacks on a prepared directory; the enumeration of
their points; and one run for each point: start, strike, check. The enumeration ends at a point that is not reached.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import minikms
from minikms.client.errors import KmsError
from tests.minikms.custody.rotation.crash_points import (
    DEADLINE_SECONDS,
    Daemon,
    Injection,
    Point,
    Prepared,
    wait_for_rotation,
)

Change = Literal["rotate the KEK", "rotate to a new root key", "destroy a key", "create a key"]
CHANGES: tuple[Change, ...] = ("rotate the KEK", "rotate to a new root key", "destroy a key", "create a key")


class Attack:
    """Makes one change, interrupted at one point after another."""

    def __init__(self, prepared: Prepared, base: Path, change: Change) -> None:
        self._prepared = prepared
        self._base = base
        self._change = change
        self._count = 0
        self.points = 0
        self._old = (prepared.base / "key").read_text().strip()
        self._new = os.urandom(32).hex()

    def points_of(self, thread: str, calls: str, *, numbers: Iterator[int], action: str) -> None:
        """Strikes at each number in turn, until one is not reached."""
        for number in numbers:
            if not self.strike(Point(thread, calls, number), action):
                return

    def strike(self, point: Point, action: str) -> bool:
        """One run; False if the change was complete before the point was reached."""
        self._count += 1
        base = self._base / f"v{self._count}"
        daemon = self._prepared.copy_to(base)
        try:
            assert daemon.start(), daemon.log()
            injection = Injection(daemon, point, action)
            made = self._perform(daemon)
            injection.end()
            if not injection.happened():
                return injection.struck_elsewhere()
            self.points += 1
            if action == "signal=KILL":
                assert daemon.has_died(within_s=5.0), "the daemon lives"
                # Whichever key the operator may still have: in turn the old and the new one first.
                first, other = (self._old, self._new) if self._count % 2 else (self._new, self._old)
                self._prepared.judge(daemon, first, other)
            else:
                self._judge_alive(daemon, point)
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
                case "create a key":
                    for number in range(3):
                        made.append(client.create_dek_for_thread(f"n{number}").key_id)
                case "destroy a key":
                    key_id = client.create_dek_for_thread("doomed").key_id
                    client.retire_key(key_id)
                    client.destroy_key(key_id)
        return made

    def _judge_alive(self, daemon: Daemon, point: Point) -> None:
        """After a fault the daemon still serves, a retry completes, and a restart finds every key."""
        assert not daemon.has_died(), "the daemon died of it"
        self._perform(daemon)
        with daemon.client(wait_s=5.0) as client:
            wait_for_rotation(client)
            self._prepared.check_records(client)
        daemon.stop()
        self._prepared.judge(daemon, self._old, self._new)

    def _check_created(self, daemon: Daemon, key_id: str) -> None:
        assert daemon.start(), daemon.log()
        with daemon.client() as client:
            client.decrypt(key_id, client.encrypt(key_id, b"x"))
        daemon.stop()
