"""Opening a data directory: a missing root key or keyring is never made up for, and each start raises the epoch."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minikms import datadir
from minikms.audit.maintenance import compress_closed
from minikms.crypto.aead import NonceSource
from minikms.custody.files import open_directory
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.rotation_backups import newest_key_id
from minikms.datadir import RootSource
from minikms.errors import StartError
from minikms.keys.dek import make_key_id
from minikms.memory.arena import SecretArena
from vaults import key_file, opened_vault


def attempt(directory: Path, source: RootSource) -> datadir.Opened:
    """What a start does with the keyring; its keys are zeroed at once."""
    directory.mkdir(mode=0o700, exist_ok=True)
    descriptor = open_directory(directory)
    try:
        with SecretArena(32, force_fallback=True) as arena, ThreadPoolExecutor(1) as executor:
            return datadir.open_keyring(
                data_dir=str(directory),
                file=KeyringFile(descriptor, executor),
                source=source,
                arena=arena,
                nonces=NonceSource(),
            )
    finally:
        os.close(descriptor)


def test_without_a_root_key_it_refuses_and_tells_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"--master-key-file.*--dev") as refused:
        attempt(tmp_path / "d", RootSource())
    assert "openssl rand -hex 32" in str(refused.value)
    assert os.listdir(tmp_path / "d") == []


def test_the_first_start_makes_a_keyring_and_later_ones_open_it(tmp_path: Path) -> None:
    source = RootSource(file=key_file(tmp_path / "d"))
    assert attempt(tmp_path / "d", source).made
    again = attempt(tmp_path / "d", source)
    assert (again.made, again.provider) == (False, "file")


def test_a_development_key_is_made_for_a_new_directory_only(tmp_path: Path) -> None:
    dev = tmp_path / "dev.key"
    assert attempt(tmp_path / "d", RootSource(dev_file=dev)).provider == "dev"
    text = dev.read_text()
    attempt(tmp_path / "d", RootSource(dev_file=dev))
    assert dev.read_text() == text
    dev.unlink()
    with pytest.raises(StartError, match="put it back"):
        attempt(tmp_path / "d", RootSource(dev_file=dev))
    assert not dev.exists()


@pytest.mark.parametrize("left", ["kms-deks/k_01jd0000000000000000000000.json", "minikms-audit.log"])
def test_a_missing_keyring_beside_keys_or_a_log_is_never_made_anew(tmp_path: Path, left: str) -> None:
    path = tmp_path / "d" / left
    path.parent.mkdir(parents=True)
    (tmp_path / "d").chmod(0o700)
    path.write_text("x")
    with pytest.raises(StartError, match=r"restore keyring\.json"):
        attempt(tmp_path / "d", RootSource(file=key_file(tmp_path / "d")))
    assert not (tmp_path / "d" / "keyring.json").exists()


def test_every_start_raises_the_epoch(tmp_path: Path) -> None:
    async def main() -> list[int]:
        seen = []
        for _ in range(3):
            async with opened_vault(tmp_path / "d") as one:
                seen.append(one.vault.keyring.body.epoch)
        return seen

    assert asyncio.run(main()) == [2, 3, 4]


# --- the epochs that the audit log tells of -----------------------------------------------------------------------


def line(epoch: int, padding: int = 0) -> bytes:
    return b'{"event":{"seq":1,"type":"start","detail":"%b","facts":{"epoch":%d,"kek_version":1}},"sig":"x"}\n' % (
        b"x" * padding,
        epoch,
    )


def test_the_highest_epoch_of_the_log_is_found_wherever_it_lies_in_the_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "minikms-audit.log"
    assert datadir.highest_epoch(str(tmp_path)) == 0
    log.write_bytes(b"")
    assert datadir.highest_epoch(str(tmp_path)) == 0
    log.write_bytes(line(3) + line(12) + line(7))
    assert datadir.highest_epoch(str(tmp_path)) == 12
    monkeypatch.setattr(datadir, "_READ_BYTES", 64)
    for padding in range(130):
        log.write_bytes(line(3, padding) + line(345678, padding) + line(7, padding))
        assert datadir.highest_epoch(str(tmp_path)) == 345678


def test_a_log_that_was_begun_after_the_last_start_tells_through_the_file_before_it(tmp_path: Path) -> None:
    (tmp_path / "minikms-audit.log").write_bytes(b"nothing of it\n")
    (tmp_path / "minikms-audit.log.1").write_bytes(line(99))
    (tmp_path / "minikms-audit.log.2").write_bytes(line(3) + line(7) + line(5))
    assert datadir.highest_epoch(str(tmp_path)) == 7
    compress_closed(str(tmp_path))
    assert datadir.highest_epoch(str(tmp_path)) == 7
    (tmp_path / "minikms-audit.log.2.zst").write_bytes(b"damaged")
    assert datadir.highest_epoch(str(tmp_path)) == 0
    (tmp_path / "minikms-audit.log").write_bytes(line(2))
    assert datadir.highest_epoch(str(tmp_path)) == 2


def test_a_fifo_in_the_place_of_the_log_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "minikms-audit.log")
    assert datadir.highest_epoch(str(tmp_path)) == 0


def test_only_so_much_of_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "TAIL_BYTES_MAX", 1000)
    (tmp_path / "minikms-audit.log").write_bytes(line(99) + b"x" * 2000 + line(5))
    assert datadir.highest_epoch(str(tmp_path)) == 5


def test_a_keyring_older_than_the_log_is_refused_with_the_way_out(tmp_path: Path) -> None:
    found = attempt(tmp_path / "d", RootSource(file=key_file(tmp_path / "d")))
    datadir.check_newest(found.unlocked, 1)
    with pytest.raises(StartError, match=r"its epoch is 1, the log tells of 2.*--accept-restore"):
        datadir.check_newest(found.unlocked, 2)


def test_the_newest_key_is_of_now_or_of_a_file_or_backup_from_before_the_clock_went_back(tmp_path: Path) -> None:
    """Up to it keys count as used, or as spent, when it is not known how often each was used."""
    now_ms = time.time_ns() // 1_000_000
    assert newest_key_id(str(tmp_path)) >= make_key_id(now_ms, b"\xff" * 10)
    for name in ("kms-deks", "kms-deks-backup"):
        (tmp_path / name).mkdir()
    (tmp_path / "kms-deks" / "z.json").touch()
    ahead = [make_key_id(now_ms + 10_000_000 + number, bytes(10)) for number in range(2)]
    (tmp_path / "kms-deks" / f"{ahead[0]}.json").touch()
    assert newest_key_id(str(tmp_path)) == ahead[0]
    (tmp_path / "kms-deks-backup" / f"{ahead[1]}.json.20260101T000000").touch()
    assert newest_key_id(str(tmp_path)) == ahead[1]
