"""Eight writers while the prefix of the nonces changes every few records: all that they wrote is readable later."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minikms.client import DecryptItem, EncryptItem, ReencryptItem
from minikms.crypto.aead import PREFIX_BYTES
from tests.harness.live_daemon import LiveDaemon
from tests.harness.scripts import PROJECT

WRITERS = 8
ROUNDS = 10
BATCH_ITEMS = 40
RECORDS_PER_PREFIX = 23
LAUNCHER = """
import sys
sys.path.insert(0, {!r})
from tests.harness import in_process
from minikms.crypto import records
from minikms.cli import main
records.RECORDS_PER_PREFIX = {}
in_process.install()
sys.argv = ["minikms", *sys.argv[3:]]  # -m minikms, for which this stands
main()
"""


def test_records_of_many_prefixes_are_all_readable_after_a_kill(tmp_path: Path) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER.format(str(PROJECT), RECORDS_PER_PREFIX))
    with LiveDaemon(tmp_path, "file", launcher=(str(launcher),)) as daemon:
        with ThreadPoolExecutor(WRITERS) as threads:
            found = [
                one for written in threads.map(lambda number: write(daemon, number), range(WRITERS)) for one in written
            ]
        prefixes = {item.ciphertext[:PREFIX_BYTES] for item, _ in found}
        assert len(found) == WRITERS * ROUNDS * (BATCH_ITEMS + 1)
        assert len(prefixes) >= len(found) // RECORDS_PER_PREFIX
        daemon.kill()
        daemon.start()
        with daemon.client() as client:
            assert client.decrypt_batch([item for item, _ in found]) == [text for _, text in found]
            key_id = found[0][0].key_id
            own = [item.ciphertext for item, _ in found if item.key_id == key_id]
            new = client.create_dek_for_thread("thread-0", replaces=key_id).key_id
            moved = client.reencrypt_batch(key_id, new, [ReencryptItem(ciphertext=one) for one in own])
            assert client.check_batch(
                new, [ReencryptItem(ciphertext=one) for one in moved if isinstance(one, bytes)]
            ) == ([None] * len(own))


def write(daemon: LiveDaemon, number: int) -> list[tuple[DecryptItem, bytes]]:
    """Records of one thread, one by one and in batches."""
    found = []
    with daemon.client() as client:
        key_id = client.create_dek_for_thread(f"thread-{number}").key_id
        for turn in range(ROUNDS):
            texts = [b"%d %d %d" % (number, turn, item) for item in range(BATCH_ITEMS + 1)]
            batch = client.encrypt_batch([EncryptItem(key_id=key_id, plaintext=text) for text in texts[1:]])
            for text, sealed in zip(texts, [client.encrypt(key_id, texts[0]), *batch], strict=True):
                assert isinstance(sealed, bytes)
                found.append((DecryptItem(key_id=key_id, ciphertext=sealed), text))
    return found
