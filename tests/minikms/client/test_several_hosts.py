"""The clients and two real daemons with the same keys, of which one is lost under load; two real gateways.

Two daemons never serve the same keys in reality: here the second has a copy of the directory of the first, made while
that was stopped.
"""

import asyncio
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minikms.client import AsyncClient, Client, DecryptItem, EncryptItem
from tests.harness import forked
from tests.harness.gateways import Gateway, Pair
from tests.harness.live_daemon import LiveDaemon
from tests.minikms.client.hostile import hostile
from tests.minikms.client.test_addresses import STANDBY
from tests.minikms.client.using import WAIT_S


class Hosts(NamedTuple):
    """Two daemons, and a key that both have."""

    a: LiveDaemon
    b: LiveDaemon
    key_id: str

    @property
    def path(self) -> str:
        return f"{self.a.socket},{self.b.socket}"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="kms") as directory:
        bases = Path(directory, "a"), Path(directory, "b")
        bases[0].mkdir()
        with LiveDaemon(bases[0], root=bytes(32)) as a:
            with a.client() as client:
                key_id = client.create_dek_for_thread("t").key_id
            a.stop()
            a.socket.unlink(missing_ok=True)
            shutil.copytree(*bases)
            a.start()
            with LiveDaemon(bases[1], root=bytes(32)) as b:
                yield Hosts(a, b, key_id)


def seal(hosts: Hosts) -> None:
    with hosts.a.client() as client:
        client.seal()


@pytest.mark.parametrize(
    "lose",
    [seal, lambda hosts: hosts.a.stop(), lambda hosts: hosts.a.kill()],
    ids=["sealed", "stopped", "killed"],
)
def test_calls_under_load_go_on_at_the_other_daemon(hosts: Hosts, lose: Callable[[Hosts], None]) -> None:
    """No call fails, with 8 threads and 8 tasks; each value decrypts afterwards."""
    lost = threading.Event()
    sealed: list[bytes] = []

    def work(client: Client) -> None:
        for number in range(40):
            if number == 20:
                lost.wait(WAIT_S)
            sealed.append(client.encrypt(hosts.key_id, b"%d" % number))

    async def work_async() -> None:
        async with AsyncClient(hosts.path, timeout_s=WAIT_S, wait_s=WAIT_S) as kms:
            for _ in range(4):
                sealed.extend(await asyncio.gather(*(kms.encrypt(hosts.key_id, b"x") for _ in range(50))))
                await asyncio.to_thread(lost.wait, 0.05)

    with Client(hosts.path, timeout_s=WAIT_S, wait_s=WAIT_S) as client:
        threads = [threading.Thread(target=work, args=(client,)) for _ in range(8)]
        threads.append(threading.Thread(target=asyncio.run, args=(work_async(),)))
        for thread in threads:
            thread.start()
        lose(hosts)
        lost.set()
        for thread in threads:
            thread.join()
        assert len(sealed) == 8 * 40 + 200
        assert client.address == str(hosts.b.socket)
        assert all(isinstance(client.decrypt(hosts.key_id, one), bytes) for one in sealed[::20])


def test_a_switch_between_the_requests_of_a_batch_keeps_their_order(hosts: Hosts) -> None:
    texts = [b"%d" % number for number in range(4000)]

    async def main() -> list[Any]:
        async with AsyncClient(hosts.path, timeout_s=WAIT_S, wait_s=WAIT_S) as kms:
            batch = asyncio.create_task(
                kms.encrypt_batch([EncryptItem(key_id=hosts.key_id, plaintext=text) for text in texts])
            )
            await asyncio.sleep(0.01)
            hosts.a.kill()
            sealed = await batch
            return await kms.decrypt_batch(
                [DecryptItem(key_id=hosts.key_id, ciphertext=one) for one in sealed if isinstance(one, bytes)]
            )

    assert asyncio.run(main()) == texts


def test_the_commands_go_to_the_daemon_that_serves(hosts: Hosts) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return forked.run("minikms", *words, env=hosts.a.environ | {"MINIKMS_SOCKET": hosts.path}, cwd=hosts.a.data_dir)

    seal(hosts)
    status = run("status")
    assert (status.returncode, f"the status of {hosts.b.socket}" in status.stderr) == (0, True), status
    assert hosts.key_id in run("keys", "list").stdout
    serve = run("serve", "--data-dir", str(hosts.a.data_dir))
    assert (serve.returncode, "give --socket" in serve.stderr) == (2, True), serve
    hosts.b.kill()
    away = run("keys", "list")
    assert away.returncode == 1 and all(str(host.socket) in away.stderr for host in hosts[:2]), away


def test_a_client_of_two_gateways_finds_the_one_whose_daemon_serves(tmp_path: Path) -> None:
    """The key service of the first is a standby, then away. Then the first can't prove the name in its URL."""
    with Pair() as pair:
        base = pair.daemon.data_dir.parent / "other"
        base.mkdir()
        with hostile(*[[STANDBY] * 9] * 9) as standby, Gateway(base, Path(standby.path)) as other:
            assert other.process is not None
            other.kill()
            other.write("clients.pem", pair.gateway.root.pem)
            Path(standby.path).chmod(0o666)
            Path(standby.path).parent.chmod(0o755)
            other.start()
            (tmp_path / "ca.pem").write_bytes(other.root.pem + pair.gateway.root.pem)
            cert, key = pair.client().write(tmp_path)
            shown: dict[str, Any] = {"ca": tmp_path / "ca.pem", "cert": cert, "key": key, "timeout_s": WAIT_S}

            def serving(host: str) -> Client:
                with Client(f"https://{host}:{other.port},https://localhost:{pair.gateway.port}", **shown) as client:
                    client.create_dek_for_thread("t")
                    return client

            assert serving("localhost").address.endswith(str(pair.gateway.port))
            assert standby.requests
            Path(standby.path).unlink()
            assert serving("localhost").address.endswith(str(pair.gateway.port))
            [warning] = [text for text in serving("127.0.0.1").warnings if "does not prove" in text]
            assert f"https://127.0.0.1:{other.port}" in warning
