"""Metrics of a process that may open no file."""

import errno
import os
import subprocess
import sys

import pytest

from minikms.platform import process_metrics

HARDENED = """
from minikms.memory.process import harden
from minikms.platform import process_metrics
process_metrics.open_process_files()
harden(None, read=[], write=[])
for sample in process_metrics.samples("minikms_build_info"):
    print(sample.name, sample.value)
"""


def test_a_hardened_process_reports_all_of_its_metrics() -> None:
    done = subprocess.run([sys.executable, "-c", HARDENED], capture_output=True, text=True, check=True)
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found.keys() == {sample.name for sample in process_metrics.samples("minikms_build_info")}
    assert len(found) == 6


def test_without_a_free_descriptor_the_others_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: object) -> list[str]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    process_metrics.open_process_files()
    monkeypatch.setattr(os, "listdir", none_left)
    names = [sample.name for sample in process_metrics.samples("minikms_build_info")]
    assert len(names) == 5 and "process_open_fds" not in names
