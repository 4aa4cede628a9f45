"""The lease files against a model: after any event no count is below the uses that were granted."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from minikms.custody.files import open_directory
from minikms.custody.lease_format import BLOCK_BYTES, HEADER_BYTES, LEASE_USES_MAX, encode_record
from minikms.custody.lease_store import JOURNAL_NAME, SNAPSHOT_NAME, LeaseStore
from minikms.errors import StorageUnavailableError
from tests.minikms.custody.disk_faults import failing_os, flip, key, quick_directory, reserve_leases

KEYS = [key(number * 5 + 1) for number in range(12)]  # no key has the id 0, which means "none" in the floors


class LeasesAgainstModel(RuleBasedStateMachine):
    """Any sequence of reservations, failures, crashes, merges, restores and damage.

    The model knows what was granted to each key, ever. The store must never say less; and as long as nothing was lost,
    and no restore or failure intervened, it says exactly that.
    """

    @initialize()
    def begin(self) -> None:
        self.place = tempfile.TemporaryDirectory(dir=quick_directory())
        self.path = Path(self.place.name)
        self.fd = open_directory(self.path)
        self.store = LeaseStore.open(self.fd, create=True)
        self.granted = dict.fromkeys(KEYS, LEASE_USES_MAX)
        self.exact = True

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            os.close(self.fd)
            self.place.cleanup()

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=6))
    def reserve(self, keys: list[bytes]) -> None:
        for one, total in zip(keys, reserve_leases(self.store, keys), strict=True):
            if total is not None:
                self.granted[one] += LEASE_USES_MAX
                assert total >= self.granted[one]
            else:
                assert not self.exact

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6), call=st.sampled_from(["pwrite", "fdatasync"]))
    def reserve_on_a_failing_disk(self, keys: list[bytes], call: str) -> None:
        with (
            pytest.MonkeyPatch.context() as patch,
            failing_os(patch, call),
            contextlib.suppress(StorageUnavailableError),
        ):
            reserve_leases(self.store, keys)
        # A record of it may be in the file all the same; after a crash the store may then say more.
        self.exact = False

    @rule()
    def merge(self) -> None:
        self.store.merge()

    @rule(call=st.sampled_from(["write", "fsync", "rename"]), at=st.integers(1, 3))
    def merge_on_a_failing_disk(self, call: str, at: int) -> None:
        failing = pytest.MonkeyPatch.context()
        with failing as patch, failing_os(patch, call, at=at), contextlib.suppress(StorageUnavailableError):
            self.store.merge()

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = LeaseStore.open(self.fd, create=False)

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True), kept=st.floats(0, 1))
    def crash_during_an_append(self, keys: list[bytes], kept: float) -> None:
        """The append reached the disk in part, and granted nothing."""
        records = b"".join(encode_record(one, self.granted[one] + LEASE_USES_MAX) for one in keys)
        self.store.close()
        with (self.path / JOURNAL_NAME).open("ab") as file:
            file.write(records[: int(kept * len(records))])
        self.exact = False
        self.store = LeaseStore.open(self.fd, create=False)

    @rule(place=st.integers(0, 10**6), bit=st.integers(0, 7))
    def rot_in_the_journal(self, place: int, bit: int) -> None:
        """One bit of a durable record flips. The last record looks torn then; a lease covers both cases."""
        self.store.close()
        path = self.path / JOURNAL_NAME
        size = path.stat().st_size - HEADER_BYTES
        if size:
            flip(path, HEADER_BYTES + place % size, bit)
            self.exact = False
        self.store = LeaseStore.open(self.fd, create=False)

    @rule(place=st.integers(0, 10**6), bit=st.integers(0, 7))
    def rot_in_the_snapshot(self, place: int, bit: int) -> None:
        self.store.merge()
        self.store.close()
        path = self.path / SNAPSHOT_NAME
        if path.stat().st_size > BLOCK_BYTES:
            flip(path, place % BLOCK_BYTES, bit)
            self.exact = False
        self.store = LeaseStore.open(self.fd, create=False)

    @rule(key=st.sampled_from(KEYS), uses=st.integers(1, LEASE_USES_MAX))
    def reserve_a_small_lease(self, key: bytes, uses: int) -> None:
        [given] = self.store.reserve([(key, uses)])
        self.granted[key] += given
        assert given == uses or not self.exact

    @rule(newest=st.sampled_from(KEYS), forgotten=st.integers(0, 3))
    def restore(self, newest: bytes, forgotten: int) -> None:
        """The archive lacks some leases of the keys it holds."""
        self.store.exhaust(newest)
        for one in KEYS:
            if one <= newest:
                self.granted[one] += forgotten * LEASE_USES_MAX
        self.exact = False

    @invariant()
    def no_count_is_too_low(self) -> None:
        if not hasattr(self, "store"):
            return
        for one, granted in self.granted.items():
            total = self.store.total(one)
            assert total >= granted
            assert not self.exact or total == granted


TestLeasesAgainstModel = LeasesAgainstModel.TestCase
TestLeasesAgainstModel.settings = settings(max_examples=50, stateful_step_count=25)
