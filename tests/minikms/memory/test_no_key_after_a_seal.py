"""After a seal root finds no key in the daemon's memory, nor in its arena; after an unseal no root key and no share."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.api.errors import KmsError
from minikms.client import Client
from minikms.crypto import shares
from minikms.processes.handover import KEY
from tests.harness import unlocking
from tests.harness.live_daemon import LiveDaemon, record_keys
from tests.harness.waiting import wait_until
from tests.minikms.memory import scanner
from tests.minikms.memory.test_no_key_in_memory import (
    WITHOUT_MEMFD_SECRET,
    assert_unreachable,
    make_keys,
    needles_of,
    prefix_of,
    storm_of_refused_roots,
    use_mixed,
)

pytestmark = pytest.mark.usefixtures("as_root")

UNSEAL = b"POST /unseal HTTP/1.1\r\nHost: x\r\n"
REFUSED = (
    b'{"root_hex":"%b"',
    b'{"root_hex":"%b","no_such_field":1}',
    b'{"root_hex":"%b","from_source":true}',
    b'{"root_hex":"%b","share":"mks1-0000"}',
    b'{"root_hex":"%b0"}',
    b'["root_hex","%b"]',
    b'{"root_hex":"%b\\u0030"}',
    b'{"share":"%b"}',
    b'{"other":"%b"}',
)


class SharedDaemon(LiveDaemon):
    """Its keyring opens under its key file, and under two of three shares."""

    def __init__(self, base: Path, launcher: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-m", "minikms", "init", "--data-dir", str(base / "data")]
        command += ["--master-key-file", str(base / "made")]
        command += ["--recovery-shares", "2/3", "--shares-dir", str(base / "shares")]
        subprocess.run(command, check=True, capture_output=True)
        self.texts = [file.read_text("ascii").strip() for file in sorted((base / "shares").iterdir())]
        self._made = (base / "made").read_text()
        super().__init__(base, launcher=launcher, forked=False)

    def start(self, *under: str) -> None:
        self.root_file.write_text(self._made)
        super().start(*under)

    def share_needles(self) -> list[scanner.Needle]:
        """The shares, as they are typed and as bytes; without the part that is no secret."""
        found = []
        for number, text in enumerate(self.texts, start=1):
            value = bytearray(32)
            shares.read_text([memoryview(bytearray(text.encode()))], memoryview(value))
            found += scanner.forms_of(f"share {number}", bytes(value))
            secret = text.encode()[50:100]
            found += [scanner.Needle(f"share {number}", "text", secret[at : at + 16]) for at in (0, 16, 32)]
        return found


@pytest.fixture
def readable(tmp_path: Path) -> Iterator[SharedDaemon]:
    """Its arena is memory that root can read, as on a kernel without memfd_secret(2)."""
    wrapper = tmp_path / "without_memfd_secret.py"
    wrapper.write_text(WITHOUT_MEMFD_SECRET)
    with SharedDaemon(tmp_path, launcher=(str(wrapper),)) as daemon:
        yield daemon


def test_after_a_seal_under_load_there_is_no_key_anywhere(readable: SharedDaemon) -> None:
    """Readers, writers and a rotation are running when it comes."""
    with readable.client() as client:
        assert client.status().memory.arena == "anonymous"
        key_ids = make_keys(client, 50)
        use_mixed(client, key_ids, 500)
        keys = {f"before: {name}": key for name, key in readable.keys().items()}
        keys |= record_keys(keys, prefix_of(client, key_ids[0]))

        def work() -> None:
            with readable.client() as own:
                try:
                    use_mixed(own, key_ids, 1_000_000)
                except KmsError:
                    return

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        time.sleep(0.3)
        client.rotate_kek(wait=False)
        client.seal()
        for worker in workers:
            worker.join()
        keys |= readable.keys()
        assert scanner.scan_process(readable.pid, needles_of(keys)).hits == []
        client.unseal(share=readable.texts[0])
        client.unseal(root_hex=readable.root().hex())
        report = scanner.scan_process(readable.pid, [*needles_of(keys), *readable.share_needles()])
        assert {hit.form for hit in report.hits} <= {"half"}, "in the arena only"
        assert not {hit.name for hit in report.hits if "root key" in hit.name or "share" in hit.name}
        assert report.hits, "the scan finds the keys of an unsealed daemon"
        client.seal()
        assert scanner.scan_process(readable.pid, needles_of(keys | readable.keys())).hits == []


def test_after_the_end_of_a_lease_there_is_no_key_anywhere(tmp_path: Path) -> None:
    """Nor the root keys that came to renew it."""
    wrapper = tmp_path / "without_memfd_secret.py"
    wrapper.write_text(WITHOUT_MEMFD_SECRET)
    with (
        unlocking.daemon_asking(tmp_path, "--root-lease", "40", launcher=(str(wrapper),)) as (daemon, listener),
        daemon.client() as client,
    ):
        listener.answer = KEY + daemon.root()
        wait_until(lambda: client.status().status == "ok")
        assert client.status().memory.arena == "anonymous"
        key_ids = make_keys(client, 10)
        use_mixed(client, key_ids, 500)
        keys = daemon.keys()
        needles = needles_of(keys | record_keys(keys, prefix_of(client, key_ids[0])))
        wait_until(lambda: "renew" in listener.purposes())
        report = scanner.scan_process(daemon.pid, needles)
        assert report.hits and "root key" not in {hit.name for hit in report.hits}
        listener.answer = unlocking.REFUSED
        wait_until(lambda: client.status().status == "sealed")
        assert scanner.scan_process(daemon.pid, needles).hits == []


def test_no_way_to_unseal_leaves_a_root_key_or_a_share(tmp_path: Path) -> None:
    """By key, by source, by shares; right, wrong, repeated, of another form; and requests that are refused."""
    with SharedDaemon(tmp_path) as daemon, daemon.client() as client:
        use_mixed(client, make_keys(client, 10), 200)
        keys: dict[str, bytes] = {}
        for way in ("root_hex", "source", "shares"):
            client.seal()
            if way == "root_hex":  # once: more wrong attempts would be slowed down
                _attempt_wrongly(client, daemon, keys)
                client.unseal(root_hex=daemon.root().hex())
            elif way == "source":
                client.unseal()
            else:
                client.unseal(share=daemon.texts[1])
                client.unseal(share=daemon.texts[2].upper())
            use_mixed(client, make_keys(client, 3), 100)
            keys |= {f"{way}: {name}": key for name, key in daemon.keys().items()}
            assert_unreachable(daemon, keys)
            assert scanner.scan_process(daemon.pid, daemon.share_needles()).hits == []
        client.seal()
        keys |= storm_of_refused_roots(daemon.socket, UNSEAL, REFUSED)
        assert_unreachable(daemon, keys)


def _attempt_wrongly(client: Client, daemon: SharedDaemon, keys: dict[str, bytes]) -> None:
    """One wrong root key, and shares that are refused: few enough not to be slowed down."""
    wrong = os.urandom(32)
    keys[f"wrong root {len(keys)}"] = wrong
    for text in ("root", daemon.texts[1][:-1], daemon.texts[1], daemon.texts[1]):
        try:
            if text == "root":
                client.unseal(root_hex=wrong.hex())
            else:
                client.unseal(share=text)
        except KmsError:
            continue
    with socket.socket(socket.AF_UNIX) as raw:  # a share under another name
        raw.connect(str(daemon.socket))
        body = b'{"shares":"%b"}' % daemon.texts[1].encode()
        raw.sendall(UNSEAL + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert raw.recv(4096).startswith(b"HTTP/1.1 4")
    client.seal()
