"""The search of the audit log for the highest epoch."""

import os
from pathlib import Path

import pytest

from minikms.audit import epochs
from minikms.audit.epochs import highest_epoch
from minikms_daemon.audit.maintenance import compress_closed


def line(epoch: int, padding: int = 0) -> bytes:
    return b'{"event":{"seq":1,"type":"start","detail":"%b","facts":{"epoch":%d,"kek_version":1}},"sig":"x"}\n' % (
        b"x" * padding,
        epoch,
    )


def test_the_highest_epoch_is_found_anywhere_in_the_tail_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "minikms-audit.log"
    assert highest_epoch(str(tmp_path)) == 0
    log.write_bytes(b"")
    assert highest_epoch(str(tmp_path)) == 0
    log.write_bytes(line(3) + line(12) + line(7))
    assert highest_epoch(str(tmp_path)) == 12
    monkeypatch.setattr(epochs, "EPOCH_READ_BYTES", 64)
    for padding in range(130):
        log.write_bytes(line(3, padding) + line(345678, padding) + line(7, padding))
        assert highest_epoch(str(tmp_path)) == 345678


def test_without_an_epoch_in_the_open_file_the_closed_one_before_it_counts(tmp_path: Path) -> None:
    (tmp_path / "minikms-audit.log").write_bytes(b"nothing of it\n")
    (tmp_path / "minikms-audit.log.1").write_bytes(line(99))
    (tmp_path / "minikms-audit.log.2").write_bytes(line(3) + line(7) + line(5))
    assert highest_epoch(str(tmp_path)) == 7
    compress_closed(str(tmp_path))
    assert highest_epoch(str(tmp_path)) == 7
    (tmp_path / "minikms-audit.log.2.zst").write_bytes(b"damaged")
    assert highest_epoch(str(tmp_path)) == 0
    (tmp_path / "minikms-audit.log").write_bytes(line(2))
    assert highest_epoch(str(tmp_path)) == 2


def test_a_fifo_in_the_place_of_the_log_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "minikms-audit.log")
    assert highest_epoch(str(tmp_path)) == 0


def test_only_so_much_of_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "EPOCH_TAIL_BYTES_MAX", 1000)
    (tmp_path / "minikms-audit.log").write_bytes(line(99) + b"x" * 2000 + line(5))
    assert highest_epoch(str(tmp_path)) == 5
