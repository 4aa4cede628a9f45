"""Threads that take turns are kept on one processor for a while, and each gets back what it had."""

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from minikms.memory import libc
from minikms_daemon.server.parts import on_one_cpu


@pytest.fixture
def thread_ids() -> Iterator[list[int]]:
    """Of this thread and one other."""
    with ThreadPoolExecutor(1) as worker:
        yield [threading.get_native_id(), worker.submit(threading.get_native_id).result()]


def affinities(thread_ids: list[int]) -> list[set[int]]:
    return [os.sched_getaffinity(thread_id) for thread_id in thread_ids]


def test_threads_share_one_cpu_inside_and_have_their_own_afterwards(thread_ids: list[int]) -> None:
    before = affinities(thread_ids)
    with on_one_cpu(thread_ids):
        first, second = affinities(thread_ids)
        assert first == second
        assert len(first) == 1
        assert first <= before[0]
    assert affinities(thread_ids) == before


def test_a_failure_inside_restores_the_affinity(thread_ids: list[int]) -> None:
    before = affinities(thread_ids)
    with pytest.raises(ZeroDivisionError), on_one_cpu(thread_ids):
        raise ZeroDivisionError
    assert affinities(thread_ids) == before


def test_without_affinity_the_work_is_done_all_the_same(thread_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    before = affinities(thread_ids)
    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_setaffinity", refuse)
        with on_one_cpu(thread_ids):
            assert affinities(thread_ids) == before
    monkeypatch.setattr(libc, "library", object)
    with on_one_cpu(thread_ids):
        assert affinities(thread_ids) == before


def test_a_thread_that_has_ended_is_no_obstacle(thread_ids: list[int]) -> None:
    before = affinities(thread_ids)
    with on_one_cpu([thread_ids[0], 2**22 - 1]):
        pass
    assert affinities(thread_ids) == before
