"""Root scans all memory of the real daemon after heavy use, and finds no key in any form.

Each scan runs beside a scan that must find something (test_scanner.py plants every form; here a canary in the same
process table): a scan that finds nothing proves nothing by itself.
"""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minikms.api.errors import KmsError
from minikms.client import Client, DecryptItem, EncryptItem, MacItem, ReencryptItem
from minikms.crypto.aead import LONG_TEXT_BYTES, PREFIX_BYTES
from minikms.processes.flags import BIND_VARIABLE
from tests import needs
from tests.harness import decryptor, live_daemon
from tests.harness.live_daemon import LiveDaemon, record_keys
from tests.harness.unix_http import UnixConnection
from tests.minikms.memory import scanner

pytestmark = pytest.mark.usefixtures("as_root")

THREADS_COUNT = 100
HARMLESS_SIGNALS = (
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGCHLD,
    signal.SIGWINCH,
    signal.SIGIO,
    signal.SIGRTMIN,
    signal.SIGRTMAX,
)


def needles_of(keys: dict[str, bytes]) -> list[scanner.Needle]:
    named = {key: name for name, key in keys.items()}
    found = [
        needle
        for key, name in named.items()
        for forms in (scanner.forms_of, scanner.cmac_forms)
        for needle in forms(name, key)
    ]
    for name, key in keys.items():
        if "checkpoint seed" in name:
            found += scanner.ed25519_forms(name, key)
    return found


def assert_unreachable(daemon: LiveDaemon, keys: dict[str, bytes]) -> None:
    """Nothing in memory, and the only region that root cannot read is the arena (and two of the kernel's own)."""
    report = scanner.scan_process(daemon.pid, needles_of(keys))
    assert report.hits == []
    assert report.bytes_read > 20_000_000
    unreadable = [region.split()[-1] if "secretmem" not in region else "secretmem" for region in report.unreadable]
    assert set(unreadable) <= {"secretmem", "[vvar]", "[vvar_vclock]"}
    assert "secretmem" in unreadable


def make_keys(client: Client, count: int) -> list[str]:
    return [client.create_dek_for_thread(f"thread-{number}").key_id for number in range(count)]


def prefix_of(client: Client, key_id: str) -> bytes:
    """What the nonces of the daemon's records begin with."""
    return client.encrypt(key_id, b"")[:PREFIX_BYTES]


def use_mixed(client: Client, key_ids: list[str], count: int, seed: int = 1) -> None:
    """`count` operations of every kind that touches a key, in a random order; every answer is checked."""
    pick = random.Random(seed)
    done = 0
    while done < count:
        key_id = pick.choice(key_ids)
        text = pick.randbytes(pick.choice((0, 16, 256, 5000)))
        kind = pick.randrange(10)
        if kind < 7:
            sealed = client.encrypt(key_id, text, aad=b"place")
            assert client.decrypt(key_id, sealed, aad=b"place") == text
            done += 2
        elif kind == 7:
            client.get_wrapped(key_id)
            done += 1
        elif kind == 8 and done % 20 == 0:
            client.create_dek_for_thread("another", replaces=client.create_dek_for_thread("another").key_id)
            done += 2
        else:
            items = [EncryptItem(key_id=pick.choice(key_ids), plaintext=text) for _ in range(50)]
            sealed_items = client.encrypt_batch(items)
            opened = client.decrypt_batch(
                [
                    DecryptItem(key_id=item.key_id, ciphertext=sealed)
                    for item, sealed in zip(items, sealed_items, strict=True)
                    if isinstance(sealed, bytes)
                ]
            )
            assert opened == [text] * len(items)
            checked = [
                ReencryptItem(ciphertext=sealed)
                for item, sealed in zip(items, sealed_items, strict=True)
                if isinstance(sealed, bytes) and item.key_id == items[0].key_id
            ]
            assert client.check_batch(items[0].key_id, checked) == [None] * len(checked)
            done += 2


def use_batches_in_json(socket_path: Path, key_ids: list[str], count: int) -> None:
    """Sends `count` batches there and back in JSON, as programs do that do not use the clients."""
    connection = UnixConnection(socket_path)

    def answered(target: str, items: list[dict[str, str]]) -> list[dict[str, str]]:
        connection.request("POST", target, json.dumps({"items": items}))
        found: list[dict[str, str]] = json.loads(connection.getresponse().read())["items"]
        return found

    try:
        for number in range(count):
            chosen = [key_ids[(number + step) % len(key_ids)] for step in range(4)]
            sealed = answered("/encrypt_batch", [{"key_id": key_id, "plaintext": "dGV4dA=="} for key_id in chosen])
            items = [{"key_id": key_id, **one} for key_id, one in zip(chosen, sealed, strict=True)]
            assert answered("/decrypt_batch", items) == [{"plaintext": "dGV4dA=="}] * len(chosen)
    finally:
        connection.close()


def live_a_keys_life(daemon: LiveDaemon, client: Client) -> dict[str, bytes]:
    """Every verb of a key's life, to its destruction; the keys that there were on the way."""
    old = client.create_dek_for_thread("life").key_id
    data = client.create_dek_for_thread("life", purpose="data").key_id
    sealed = client.encrypt(old, b"text", aad=b"place")
    new = client.create_dek_for_thread("life", replaces=old).key_id
    (resealed,) = client.reencrypt_batch(old, new, [ReencryptItem(ciphertext=sealed, aad=b"place")])
    assert isinstance(resealed, bytes) and client.decrypt(new, resealed, aad=b"place") == b"text"
    assert client.check_batch(new, [ReencryptItem(ciphertext=resealed, aad=b"place")]) == [None]
    client.generate_data_key(data, with_plaintext=False)
    mac_key = client.create_dek_for_thread("life", purpose="mac").key_id
    client.mac(mac_key, [MacItem(plaintext=b"text" * 999)] * 20)
    client.random(64)
    client.list_keys(thread_id="life")
    keys = {f"then: {name}": key for name, key in daemon.keys().items()}
    client.destroy_key(old)
    client.retire_key(data)
    client.destroy_key(data)
    return keys


def storm_of_errors(client: Client, socket_path: Path, key_ids: list[str]) -> None:
    """Every way to be refused that comes near a key, and input that is no request at all."""
    sealed = client.encrypt(key_ids[0], b"text", aad=b"place")
    attempts: tuple[Callable[[], object], ...] = (
        lambda: client.decrypt(key_ids[0], sealed[:-1] + bytes([sealed[-1] ^ 1]), aad=b"place"),
        lambda: client.decrypt(key_ids[1], sealed, aad=b"place"),
        lambda: client.decrypt(key_ids[0], sealed, aad=b"elsewhere"),
        lambda: client.decrypt(key_ids[0], sealed, thread_id="not-its-thread"),
        lambda: client.encrypt("k_" + "0" * 26, b"text"),
        lambda: client.check_batch(key_ids[0], [ReencryptItem(ciphertext=sealed)], thread_id="not-its-thread"),
    )
    for attempt in attempts * 30:
        with pytest.raises(KmsError):
            attempt()
    head = b"POST /%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    for path in (b"encrypt", b"decrypt", b"encrypt_batch", b"create_dek_for_thread", b"rotate_kek", b"nowhere"):
        for body in (b"{", b'{"key_id":1}', b'{"new_kek_hex":"' + b"0" * 63 + b'"}', b"\xff" * 100, b""):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(socket_path))
                raw.sendall(head % (path, len(body)) + body)
                assert raw.recv(4096).startswith(b"HTTP/1.1 4")


ROTATE = b"POST /rotate_kek HTTP/1.1\r\nHost: x\r\n"
REFUSED_ROOTS = (
    # how a key's text may arrive in a request that is refused, or never becomes one; %b is the text
    b'{"new_kek_hex":"%b"',
    b'{"new_kek_hex":"%b","no_such_field":1}',
    b'{"new_kek_hex":"%b","wait":"yes"}',
    b'{"new_kek_hex":"%b0"}',
    b'{"new_kek_hex":"x%b"}',
    b'{"new_kek_hex":"%b","verify":[{}]}',
    b'["new_kek_hex","%b"]',
    b'{"wait":false,"new_kek_hex" : "%b" }}',
    b'{"new_kek_hex":"%b\\u0030"}',
    b'{"other":"%b"}',
)


def storm_of_refused_roots(
    socket_path: Path, request: bytes = ROTATE, templates: tuple[bytes, ...] = REFUSED_ROOTS
) -> dict[str, bytes]:
    """Root keys that were sent and refused: they are secrets too."""
    keys = {}
    for number, template in enumerate(templates):
        for way in ("whole", "in pieces", "chunked", "cut off"):
            key = os.urandom(32)
            keys[f"refused root {number} {way}"] = key
            body = template.replace(b"%b", key.hex().encode())
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(socket_path))
                if way == "chunked":
                    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:40], body[40:]))
                    raw.sendall(request + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
                elif way == "cut off":
                    raw.sendall(request + b"Content-Length: %d\r\n\r\n" % (len(body) + 1) + body)
                    continue
                else:
                    raw.sendall(request + b"Content-Length: %d\r\n\r\n" % len(body))
                    step = len(body) if way == "whole" else 7
                    for start in range(0, len(body), step):
                        raw.sendall(body[start : start + step])
                assert raw.recv(4096).startswith(b"HTTP/1.1 4")
    return keys


@contextlib.contextmanager
def storm_of_signals(pid: int) -> Iterator[None]:
    """Signals of all harmless kinds, 2,000 times a second, for as long as the block runs."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.0005):
            for number in HARMLESS_SIGNALS:
                os.kill(pid, number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        stop.set()
        sender.join()


@pytest.mark.parametrize("operations", [1_000, pytest.param(10_000, marks=pytest.mark.torture)])
def test_after_heavy_use_root_finds_no_key_in_memory_or_core(tmp_path: Path, operations: int) -> None:
    """Operations over 100 keys, many errors and many signals; then memory, environment and a gcore."""
    with LiveDaemon(tmp_path, "file", forked=False) as daemon, daemon.client() as client:
        key_ids = make_keys(client, THREADS_COUNT)
        use_mixed(client, key_ids, operations)
        keys = live_a_keys_life(daemon, client)
        storm_of_errors(client, daemon.socket, key_ids)
        with storm_of_signals(daemon.pid):
            use_mixed(client, key_ids, operations // 10, seed=2)
            use_batches_in_json(daemon.socket, key_ids, operations // 20)
        keys |= daemon.keys()
        keys |= record_keys(keys, prefix_of(client, key_ids[0]))
        assert len(set(keys.values())) > THREADS_COUNT
        assert_unreachable(daemon, keys)
        client.health()
        assert scanner.scan_file(f"/proc/{daemon.pid}/environ", needles_of(keys)).hits == []
        core = core_of(daemon.pid, tmp_path)
        report = scanner.scan_file(str(core), needles_of(keys))
        assert report.bytes_read > 5_000_000
        assert report.hits == []
        client.health()


def core_of(pid: int, directory: Path) -> Path:
    """A core of the living process, made by a debugger of root's."""
    gcore = needs.program("gcore")
    done = subprocess.run(
        [gcore, "-a", "-o", str(directory / "core"), str(pid)], capture_output=True, text=True, timeout=240, check=False
    )
    core = directory / f"core.{pid}"
    assert core.exists(), done.stdout + done.stderr
    return core


@pytest.mark.parametrize("kind", ["environment", "dev"])
def test_the_root_key_is_not_found_whatever_its_source(tmp_path: Path, kind: live_daemon.RootKind) -> None:
    with LiveDaemon(tmp_path, kind, forked=False) as daemon, daemon.client() as client:
        use_mixed(client, make_keys(client, 10), 500)
        keys = daemon.keys()
        assert_unreachable(daemon, keys)
        assert scanner.scan_file(f"/proc/{daemon.pid}/environ", needles_of(keys)).hits == []
        assert scanner.scan_file(f"/proc/{daemon.pid}/cmdline", needles_of(keys)).hits == []


def test_rotations_of_both_forms_leave_no_old_and_no_new_key_in_memory(tmp_path: Path) -> None:
    """The KEK alone, then the root key too, given as text in the request and written to the key file as text; and
    texts that were refused.
    """
    with LiveDaemon(tmp_path, "file", "--rewrite-master-key-file", forked=False) as daemon, daemon.client() as client:
        key_ids = make_keys(client, 20)
        keys = {f"before: {name}": key for name, key in daemon.keys().items()}
        assert client.rotate_kek().status == "ok"
        use_mixed(client, key_ids, 200)
        new_root = os.urandom(32)
        assert client.rotate_kek(new_kek_hex=new_root.hex()).status == "ok"
        use_mixed(client, key_ids, 200, seed=2)
        assert daemon.root() == new_root
        keys |= storm_of_refused_roots(daemon.socket)
        daemon.wait_for_event("root_removed")
        keys |= daemon.keys(new_root)
        keks = {key for name, key in keys.items() if "KEK" in name and "derived" not in name}
        assert len(keks) == 4  # one for the removed root key
        keys |= record_keys(keys, prefix_of(client, key_ids[0]))
        assert_unreachable(daemon, keys)


def test_adding_testing_and_removing_roots_leaves_no_key_in_memory(tmp_path: Path) -> None:
    """Neither a root key, nor what is derived from one or sealed to one; also of roots that were refused."""
    with LiveDaemon(tmp_path, "file", forked=False) as daemon, daemon.client() as client:
        key_ids = make_keys(client, 20)
        first, spare, refused = daemon.root(), os.urandom(32), os.urandom(32)
        keys = {f"before: {name}": key for name, key in daemon.keys().items()} | {"refused root": refused}
        slot_id = client.add_root(spare.hex(), provider="file").slot_id
        assert_unreachable(daemon, keys | daemon.keys(spare))
        client.test_root(slot_id, bytearray(spare.hex().encode()))
        attempts: tuple[Callable[[], object], ...] = (
            lambda: client.test_root(slot_id, refused.hex()),
            lambda: client.test_root("s1", refused.hex()),
            lambda: client.add_root(spare.hex(), provider="file"),
            lambda: client.add_root(refused.hex(), provider="not a name"),
        )
        for attempt in attempts:
            with pytest.raises(KmsError):
                attempt()
        keys |= {f"added: {name}": key for root in (first, spare) for name, key in daemon.keys(root).items()}
        client.remove_root(slot_id)
        keys |= {f"removed: {name}": key for name, key in daemon.keys(first).items()}
        daemon.wait_for_event("root_removed")
        keys |= daemon.keys(first)
        assert len({key for name, key in keys.items() if "HPKE key" in name}) == 3
        assert_unreachable(daemon, keys)
        use_mixed(client, key_ids, 200)
        assert_unreachable(daemon, keys)


@pytest.mark.parametrize("size", [1, pytest.param(LONG_TEXT_BYTES + 1, marks=pytest.mark.torture), 1_000_000])
def test_a_text_of_any_length_leaves_no_power_of_the_hash_key(tmp_path: Path, size: int) -> None:
    """Who has one can forge records. A scan after each verb, each with a key of its own."""
    text = os.urandom(size)

    def batch(client: Client, key_id: str) -> bytes:
        [sealed] = client.encrypt_batch([EncryptItem(key_id=key_id, plaintext=text)])
        assert isinstance(sealed, bytes)
        return sealed

    with LiveDaemon(tmp_path, "file", forked=False) as daemon, daemon.client() as client:
        first, *others = make_keys(client, 7)
        source = client.create_dek_for_thread("thread-1").key_id
        sealed = {key_id: client.encrypt(key_id, text) for key_id in (*others, source)}
        altered = sealed[others[1]][:-1] + bytes([sealed[others[1]][-1] ^ 1])

        def refused() -> None:
            with pytest.raises(KmsError):
                client.decrypt(others[1], altered)

        verbs: list[tuple[str, Callable[[], object]]] = [
            (first, lambda: client.encrypt(first, text)),
            (first, lambda: batch(client, first)),
            (others[0], lambda: client.reencrypt_batch(source, others[0], [ReencryptItem(ciphertext=sealed[source])])),
            (others[1], refused),
            (others[2], lambda: client.decrypt(others[2], sealed[others[2]])),
            (others[3], lambda: client.decrypt_batch([DecryptItem(key_id=others[3], ciphertext=sealed[others[3]])])),
            (others[4], lambda: client.check_batch(others[4], [ReencryptItem(ciphertext=sealed[others[4]])])),
            (
                others[5],
                lambda: client.rotate_kek(verify=[DecryptItem(key_id=others[5], ciphertext=sealed[others[5]])]),
            ),
        ]
        for key_id, verb in verbs:
            verb()
            key = daemon.keys()[f"DEK {key_id}"]
            used = decryptor.derived(key, sealed[source][:PREFIX_BYTES])
            needles = scanner.forms_of(key_id, key) + scanner.forms_of(key_id, used) + scanner.ghash_forms(key_id, used)
            assert scanner.scan_process(daemon.pid, needles).hits == []


@pytest.mark.torture
def test_no_single_verb_leaves_a_key(tmp_path: Path) -> None:
    """A scan after each: what one verb leaves, the next must not have the chance to overwrite."""
    with LiveDaemon(tmp_path, "file", "--cache-keys", "2", forked=False) as daemon, daemon.client() as client:
        first, second, third = make_keys(client, 3)
        data = client.create_dek_for_thread("data", purpose="data").key_id
        macs = client.create_dek_for_thread("data", purpose="mac").key_id
        sealed = {key_id: client.encrypt(key_id, b"text") for key_id in (first, second, third)}
        encrypted = [EncryptItem(key_id=key_id, plaintext=b"text") for key_id in (second, third) * 20]
        decrypted = [DecryptItem(key_id=key_id, ciphertext=sealed[key_id]) for key_id in (second, third) * 20]
        checked = [ReencryptItem(ciphertext=sealed[key_id]) for key_id in (second, third) * 20]
        roots = [daemon.root()]
        spare = os.urandom(32)

        def remove_spare() -> None:
            [slot_id] = [root.slot_id for root in client.list_roots().roots if root.provider == "spare"]
            client.remove_root(slot_id)
            daemon.wait_for_event("root_removed")

        def rotate_root() -> None:
            roots.append(os.urandom(32))
            client.rotate_kek(new_kek_hex=roots[-1].hex())

        verbs: list[tuple[str, Callable[[], object]]] = [
            ("create", lambda: client.create_dek_for_thread("other")),
            ("replace", lambda: client.create_dek_for_thread("thread-0", replaces=first)),
            ("encrypt", lambda: client.encrypt(second, b"text")),
            ("decrypt", lambda: client.decrypt(second, sealed[second])),
            ("get_wrapped", lambda: client.get_wrapped(second)),
            ("encrypt_batch", lambda: client.encrypt_batch(encrypted)),
            ("decrypt_batch", lambda: client.decrypt_batch(decrypted)),
            ("check_batch", lambda: client.check_batch(second, checked)),
            ("generate_data_key", lambda: client.generate_data_key(data, with_plaintext=False)),
            ("mac", lambda: client.mac(macs, [MacItem(plaintext=b"text")] * 20)),
            ("random", lambda: client.random(32)),
            ("rotate", client.rotate_kek),
            ("rotate, verified", lambda: client.rotate_kek(verify=decrypted[:2])),
            ("add a root", lambda: client.add_root(spare.hex(), provider="spare")),
            ("remove a root", remove_spare),
            ("rotate the root", rotate_root),
            ("retire", lambda: client.retire_key(second)),
            ("destroy", lambda: client.destroy_key(second)),
            ("prune", lambda: client.prune_kek(backups=True)),
            ("status", client.status),
        ]
        keys: dict[str, bytes] = {}
        for name, verb in verbs:
            keys |= {f"before {name}: {key_name}": key for key_name, key in daemon.keys(roots[-1]).items()}
            verb()
            if name == "add a root":
                keys |= {f"of the added root: {key_name}": key for key_name, key in daemon.keys(spare).items()}
            keys |= {f"after {name}: {key_name}": key for key_name, key in daemon.keys(roots[-1]).items()}
            assert_unreachable(daemon, keys | record_keys(keys, sealed[first][:PREFIX_BYTES]))


def test_evicted_keys_leave_no_copy(tmp_path: Path) -> None:
    """Room for four keys and a hundred in use: nearly every operation opens one and evicts another."""
    with LiveDaemon(tmp_path, "file", "--cache-keys", "4", forked=False) as daemon, daemon.client() as client:
        key_ids = make_keys(client, THREADS_COUNT)
        use_mixed(client, key_ids, 500)
        memory = client.status().memory
        assert memory.keys_in_memory <= 4
        assert memory.cache_evictions > 250
        keys = daemon.keys()
        assert_unreachable(daemon, keys | record_keys(keys, prefix_of(client, key_ids[0])))


WITHOUT_MEMFD_SECRET = """
import ctypes, errno, os, sys
from minikms.memory import libc, seccomp
steps = [
    seccomp.Instruction(0x20, 0),
    seccomp.Instruction(0x15, 447, otherwise=1),
    seccomp.Instruction(0x06, 0x50000 | errno.ENOSYS),
    seccomp.Instruction(0x06, 0x7FFF0000),
]
libc.prctl("no_new_privs", 38, 1)
seccomp.install_program(steps)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_without_memfd_secret_keys_are_only_in_the_arena(tmp_path: Path) -> None:
    """A filter answers ENOSYS, as a kernel without the call does. Root can read the fallback, but nothing more."""
    wrapper = tmp_path / "without_memfd_secret.py"
    wrapper.write_text(WITHOUT_MEMFD_SECRET)
    with LiveDaemon(tmp_path, "file", launcher=(str(wrapper),)) as daemon, daemon.client() as client:
        use_mixed(client, make_keys(client, 10), 500)
        status = client.status()
        keys = daemon.keys()
        report = scanner.scan_process(daemon.pid, needles_of(keys))
    (measure,) = [entry for entry in status.hardening if entry.measure == "keys_in_secret_memory"]
    assert not measure.in_force and "memfd_secret" in measure.why
    assert status.memory.arena == "anonymous"
    assert [hit for hit in report.hits if hit.form != "half"] == []
    assert len({hit.where.split(" in ")[1] for hit in report.hits}) == 1, "the arena's region"
    assert "root key" not in {hit.name for hit in report.hits}, "it is released after the start"
    assert len({hit.name for hit in report.hits}) >= 10


@pytest.mark.parametrize("kind", live_daemon.ROOT_KINDS)
def test_the_daemon_binds_its_symbols_before_it_reads_a_key(tmp_path: Path, kind: live_daemon.RootKind) -> None:
    """Else the linker could save registers with a key schedule on the stack, at the first call of a function."""
    with LiveDaemon(tmp_path, kind, forked=False) as daemon:
        assert f"{BIND_VARIABLE}=1" in Path(f"/proc/{daemon.pid}/environ").read_text().split("\0")


def test_required_hardening_refuses_a_machine_where_something_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"hardening is required.*memory_locked"):
        LiveDaemon(tmp_path, "file", "--require-hardening", limits={resource.RLIMIT_MEMLOCK: (1 << 20, 1 << 20)})
    assert not (tmp_path / "s").exists()


def test_status_names_the_measures_in_force(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "file", forked=False) as daemon, daemon.client() as client:
        told = client.status().hardening
        kernel = Path(f"/proc/{daemon.pid}/status").read_text()
    missing = {entry.measure: entry.why for entry in told if not entry.in_force}
    assert missing.keys() <= {"memory_locked"}
    for line in ("NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"):
        assert line in kernel


def test_the_proof_would_fail_if_a_key_were_left(tmp_path: Path) -> None:
    """The same scan, of a process that opens the keyring as the daemon does but copies one key out of the arena."""
    with LiveDaemon(tmp_path, "file", forked=False) as daemon, daemon.client() as client:
        make_keys(client, 1)
        keys = daemon.keys()
        root = daemon.root_file
        daemon.process.terminate()
        daemon.process.wait()
    leaky = (
        "import sys\nfrom minikms.memory import SecretArena, read_key_fd_into\n"
        "arena = SecretArena(4); slot = arena.allocate(); read_key_fd_into(0, slot); kept = bytes(slot.view)\n"
        "print('ready', flush=True)\nimport time; time.sleep(60)\n"
    )
    with root.open("rb") as file:
        process = subprocess.Popen([sys.executable, "-c", leaky], stdin=file, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    try:
        hits = scanner.scan_process(process.pid, needles_of(keys)).hits
    finally:
        process.kill()
        process.communicate()
    assert {hit.name for hit in hits} == {"root key"}
