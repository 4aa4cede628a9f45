"""The secret arena: its pages, its slots, and how keys get into them."""

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import ArenaFullError, KeyTextError
from minikms.memory import SLOT_BYTES, SecretArena, fill_random, hex_decode_into, read_key_fd_into, zero, zero_bytes
from minikms.memory import arena as arena_module
from tests import needs

both_backings = pytest.mark.parametrize("fallback", [False, True], ids=["memfd_secret", "anonymous"])


def run_python(code: str) -> str:
    """The output of a fresh interpreter that ran `code` and ended well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@both_backings
def test_a_slot_is_zero_when_allocated_even_after_use(fallback: bool) -> None:
    with SecretArena(1, force_fallback=fallback) as arena:
        for _ in range(3):
            slot = arena.allocate()
            assert bytes(slot.view) == bytes(SLOT_BYTES)
            fill_random(slot.view)
            assert bytes(slot.view) != bytes(SLOT_BYTES)
            slot.release()


@both_backings
def test_the_bytes_of_a_released_slot_are_zeroed_in_place(fallback: bool) -> None:
    with SecretArena(4, force_fallback=fallback) as arena:
        slot = arena.allocate()
        fill_random(slot.view)
        alias = slot.view[:]  # a part somebody kept, against the rules
        slot.release()
        assert bytes(alias) == bytes(SLOT_BYTES)
        alias.release()


@both_backings
def test_zero_all_zeroes_every_slot_and_makes_every_view_raise(fallback: bool) -> None:
    """So nothing encrypts, signs or writes with a key of zeros. Old slots have no hold on the slots that come next."""
    with SecretArena(3, force_fallback=fallback) as arena:
        slots = [arena.allocate() for _ in range(2)]
        aliases = [slot.view[:] for slot in slots]
        for slot in slots:
            fill_random(slot.view)
        arena.zero_all()
        assert [bytes(alias) for alias in aliases] == [bytes(SLOT_BYTES)] * 2
        for slot in slots:
            with pytest.raises(ValueError, match="released"):
                bytes(slot.view)
        assert (arena.in_use, arena.slots) == (0, 3)
        fresh = [arena.allocate() for _ in range(3)]
        for slot in fresh:
            fill_random(slot.view)
        for slot in slots:
            slot.release()
        assert all(bytes(slot.view) != bytes(SLOT_BYTES) for slot in fresh)
        assert arena.in_use == 3


def test_zero_all_leaves_a_lent_slot_until_its_owner_releases_it() -> None:
    with SecretArena(2) as arena, arena.allocate() as lent, arena.allocate() as other:
        fill_random(lent.view)
        alias = lent.view[:]
        content = bytes(alias)
        lent.lend()
        arena.zero_all()
        assert bytes(lent.view) == content
        with arena.allocate() as fresh, pytest.raises(ArenaFullError):
            assert fresh.view.nbytes == SLOT_BYTES
            arena.allocate()
        lent.release()
        other.release()
        assert bytes(alias) == bytes(SLOT_BYTES)
        arena.zero_all()
        assert arena.in_use == 0


def test_zero_all_never_hands_out_a_slot_that_a_running_call_holds() -> None:
    with SecretArena(2) as arena:
        held, exported = arena.allocate(), None
        exported = pickle.PickleBuffer(held.view)
        arena.zero_all()
        assert arena.slots == 1
        exported.release()


def test_a_view_of_a_released_slot_raises() -> None:
    with SecretArena(1) as arena:
        slot = arena.allocate()
        view = slot.view
        slot.release()
        with pytest.raises(ValueError, match="released"):
            view[0]
        slot.release()  # again: nothing happens
        assert arena.in_use == 0


def test_slots_are_separate_and_bounded_in_number() -> None:
    with SecretArena(3) as arena:
        slots = [arena.allocate() for _ in range(3)]
        for number, slot in enumerate(slots, start=1):
            slot.view[:] = bytes([number]) * SLOT_BYTES
        assert [bytes(slot.view) for slot in slots] == [bytes([number]) * SLOT_BYTES for number in (1, 2, 3)]
        with pytest.raises(ArenaFullError):
            arena.allocate()
        slots[1].release()
        assert bytes(arena.allocate().view) == bytes(SLOT_BYTES)


def test_a_slot_that_is_dropped_or_left_by_an_exception_is_freed() -> None:
    with SecretArena(1) as arena:
        slot = arena.allocate()
        del slot
        gc.collect()
        assert arena.in_use == 0
        with pytest.raises(RuntimeError), arena.allocate() as slot:
            slot.view[0] = 1
            raise RuntimeError
        assert arena.in_use == 0


def test_a_slot_whose_view_is_in_use_is_zeroed_and_never_reused() -> None:
    with SecretArena(1) as arena:
        slot = arena.allocate()
        fill_random(slot.view)
        alias = slot.view[:]
        call = re.finditer(b".", slot.view)  # holds the buffer for as long as it lives, as a running C function does
        with pytest.raises(BufferError):
            slot.release()
        assert bytes(alias) == bytes(SLOT_BYTES)
        with pytest.raises(ArenaFullError):
            arena.allocate()
        del call
        alias.release()


@both_backings
def test_closing_zeroes_all_slots_and_releases_their_views(fallback: bool) -> None:
    arena = SecretArena(2, force_fallback=fallback)
    slot = arena.allocate()
    fill_random(slot.view)
    alias = slot.view[:]
    arena.close()
    arena.close()
    assert bytes(alias) == bytes(SLOT_BYTES)
    with pytest.raises(ValueError, match="released"):
        slot.view[0]
    with pytest.raises(ArenaFullError):
        arena.allocate()
    slot.release()
    alias.release()


def test_an_arena_that_is_left_by_an_exception_is_zeroed() -> None:
    alias = memoryview(b"")
    with pytest.raises(RuntimeError), SecretArena(1, force_fallback=True) as arena:
        slot = arena.allocate()
        fill_random(slot.view)
        alias = slot.view[:]
        raise RuntimeError
    assert bytes(alias) == bytes(SLOT_BYTES)
    alias.release()


def test_neither_arena_nor_slot_shows_or_copies_a_key() -> None:
    with SecretArena(1) as arena, arena.allocate() as slot:
        slot.view[:] = b"K" * SLOT_BYTES
        assert "KK" not in repr(slot) + repr(arena)
        for leak in (lambda: copy.copy(slot), lambda: pickle.dumps(slot)):
            with pytest.raises(TypeError):
                leak()


def test_no_descriptor_of_the_pages_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with SecretArena(1):
        opened = set(os.listdir("/proc/self/fd")) - before
        assert not any(
            "secretmem" in os.readlink(f"/proc/self/fd/{fd}") for fd in opened if os.path.lexists(f"/proc/self/fd/{fd}")
        )


def test_a_forked_child_has_no_secret_pages() -> None:
    """MADV_DONTFORK: the address is not mapped in the child; the fallback's pages are zero there (MADV_WIPEONFORK)."""
    output = run_python("""
        import os
        from minikms.memory import SecretArena, fill_random
        secret, plain = SecretArena(1), SecretArena(1, force_fallback=True)
        slot = plain.allocate()
        fill_random(slot.view)
        held = secret.allocate()
        if os.fork() == 0:
            print("secretmem" in open("/proc/self/maps").read(), any(slot.view), flush=True)
            held.release(), secret.close(), slot.release(), plain.close()
            os._exit(0)
        assert os.wait()[1] == 0
        print("secretmem" in open("/proc/self/maps").read(), any(slot.view))
    """)
    assert output.split() == ["False", "False", "True", "True"]


def test_the_pages_are_locked_and_stay_out_of_core_dumps() -> None:
    """VmFlags of proc_pid_smaps(5): lo locked, dd not dumped, dc not copied on fork, wf wiped on fork."""
    output = run_python("""
        import ctypes, re
        from minikms.memory import SecretArena
        for fallback in (False, True):
            arena = SecretArena(1, force_fallback=fallback)
            slot = arena.allocate()
            address = ctypes.addressof(ctypes.c_char.from_buffer(slot.view))
            text = open("/proc/self/smaps").read()
            regions = re.findall(r"(?ms)^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", text)
            [flags] = [flags for start, end, flags in regions if int(start, 16) <= address < int(end, 16)]
            print(*sorted({"lo", "dd", "dc", "wf"} & set(flags.split())))
    """)
    secret, fallback = (line.split() for line in output.splitlines())
    assert {"lo", "dd", "dc"} <= set(secret)
    assert {"lo", "dd", "wf"} <= set(fallback)


def test_root_cannot_read_the_arena_through_proc_mem() -> None:
    needs.root()
    output = run_python("""
        import ctypes, os
        from minikms.memory import SecretArena
        arena = SecretArena(1)
        slot = arena.allocate()
        slot.view[:] = b"s" * 32
        address = ctypes.addressof(ctypes.c_char.from_buffer(slot.view))
        descriptor = os.open("/proc/self/mem", os.O_RDONLY)
        try:
            print(os.pread(descriptor, 32, address))
        except OSError as error:
            print("refused")
    """)
    assert output == "refused\n"


def test_without_memfd_secret_the_fallback_names_missing_protections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "SYS_MEMFD_SECRET", 0xFFFF)  # no such call: ENOSYS
    with SecretArena(1) as arena:
        assert arena.backing == "anonymous"
        assert "memfd_secret" in arena.lacks[0]


@both_backings
def test_an_error_about_the_lock_limit_names_the_setting(fallback: bool) -> None:
    """Without CAP_IPC_LOCK: the limit does not bind root's process, so the child gives its capabilities up first."""
    output = run_python(f"""
        import resource
        from minikms.api.errors import StartError
        from minikms.memory import SecretArena
        from minikms.memory.process import drop_capabilities
        drop_capabilities()
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        SecretArena(512, force_fallback={fallback}).close()
        try:
            SecretArena(65536, force_fallback={fallback})
        except StartError as error:
            print(error)
    """)
    assert "2097152 bytes" in output and "LimitMEMLOCK" in output and "65536 bytes" in output


def test_an_error_below_the_lock_limit_names_a_system_call_filter() -> None:
    """As under a container's seccomp profile; in the arena, and in the measure of the whole process."""
    output = run_python("""
        import resource
        from minikms.api.errors import StartError
        from minikms.memory import SecretArena, harden, libc, seccomp
        libc.prctl("prctl(PR_SET_NO_NEW_PRIVS)", 38, 1)
        seccomp.DENIED = {"memfd_secret": (447, 447), "mlock": (149, 228), "mlockall": (151, 230)}
        seccomp.install_filter(allow_exec=True, allow_network=True)
        try:
            SecretArena(1)
        except StartError as error:
            print(error)
        resource.getrlimit = lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        print(*(measure.why for measure in harden(None, read=[], write=[]) if measure.name == "memory_locked"))
    """)
    assert output.count("a system call filter") == 2 and "LimitMEMLOCK" not in output


def test_an_arena_of_no_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="slot"):
        SecretArena(0)


def test_random_bytes_fill_the_whole_view_over_short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.readv
    monkeypatch.setattr(os, "readv", lambda fd, views: real(fd, [views[0][:5]]))
    target = bytearray(32)
    fill_random(memoryview(target))
    assert all(any(target[start : start + 5]) for start in range(0, 32, 5))


def test_a_random_device_that_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "readv", lambda fd, views: 0)
    with pytest.raises(OSError, match="returned no bytes"):
        fill_random(memoryview(bytearray(32)))


def test_a_plain_file_as_random_device_is_refused(tmp_path: Path) -> None:
    """In another process: in this one the device is open already."""
    path = tmp_path / "urandom"
    path.write_bytes(b"the same key everywhere" * 10)
    output = run_python(f"""
        from minikms.api.errors import StartError
        from minikms.memory import arena
        arena.RANDOM_DEVICE = {str(path)!r}
        try:
            arena.SecretArena(1)
        except StartError as error:
            print(error)
    """)
    assert "not a device" in output


@pytest.mark.parametrize("size", [0, 1, 32, 65536, 65537, 200_001])
def test_zero_overwrites_every_byte(size: int) -> None:
    data = bytearray(b"\xff") * size
    zero(memoryview(data))
    assert data == bytes(size)


def test_a_bytes_object_of_a_library_is_zeroed_in_place() -> None:
    data = os.urandom(100)
    zero_bytes(data)
    assert data == bytes(100)


@pytest.mark.parametrize("shared", [b"", b"x"])
def test_a_bytes_object_that_the_interpreter_shares_is_left_alone(shared: bytes) -> None:
    with pytest.raises(ValueError, match="shared"):
        zero_bytes(shared)


@given(st.binary(min_size=32, max_size=32), st.booleans())
def test_hex_text_is_decoded_in_place(key: bytes, upper: bool) -> None:
    text = key.hex().upper() if upper else key.hex()
    target = bytearray(32)
    hex_decode_into(memoryview(text.encode()), memoryview(target))
    assert target == key
    buffer = bytearray(text.encode())
    hex_decode_into(memoryview(buffer), memoryview(buffer)[:32])
    assert buffer[:32] == key


@given(st.binary(min_size=64, max_size=64), st.integers(0, 63))
def test_text_that_is_not_hex_is_refused_and_leaves_nothing(text: bytes, place: int) -> None:
    bad = text.replace(b" ", b"0")[:place] + b" " + text[place + 1 :]
    target = bytearray(b"\x55" * 32)
    with pytest.raises(KeyTextError) as refusal:
        hex_decode_into(memoryview(bad), memoryview(target))
    assert target == bytes(32)
    assert repr(bad)[2:10] not in str(refusal.value)


@pytest.mark.parametrize("size", [0, 63, 65, 128])
def test_text_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(KeyTextError):
        hex_decode_into(memoryview(b"a" * size), memoryview(bytearray(32)))


KEY = bytes(range(32))
ACCEPTED = [KEY.hex().encode(), KEY.hex().upper().encode(), KEY.hex().encode() + b"\n"]
REFUSED = [
    b"",
    b"\n",
    KEY.hex().encode()[:-1],
    KEY.hex().encode()[:-1] + b"\n",
    KEY.hex().encode() + b"\n\n",
    KEY.hex().encode() + b"\r\n",
    KEY.hex().encode() + b"0",
    KEY.hex().encode() + b" ",
    b"\xef\xbb\xbf" + KEY.hex().encode(),
    b"g" + KEY.hex().encode()[1:],
    KEY.hex().encode()[:-1] + b"z",
]


def _memfd(content: bytes) -> int:
    descriptor = os.memfd_create("key")
    os.write(descriptor, content)
    return descriptor


def _pipe(content: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return reader


@pytest.mark.parametrize("source", [_memfd, _pipe])
@pytest.mark.parametrize("content", ACCEPTED)
def test_a_key_is_read_from_a_file_or_a_pipe(source: Callable[[bytes], int], content: bytes) -> None:
    descriptor = source(content)
    with SecretArena(4) as arena, arena.allocate() as slot:
        read_key_fd_into(descriptor, slot)
        assert bytes(slot.view) == KEY
        assert arena.in_use == 1
    os.close(descriptor)


@pytest.mark.parametrize("source", [_memfd, _pipe])
@pytest.mark.parametrize("content", REFUSED)
def test_any_other_content_is_refused_and_leaves_nothing(source: Callable[[bytes], int], content: bytes) -> None:
    descriptor = source(content)
    with SecretArena(4) as arena, arena.allocate() as slot:
        slot.view[:] = b"x" * 32
        with pytest.raises(KeyTextError):
            read_key_fd_into(descriptor, slot)
        assert bytes(slot.view) == bytes(32)
        assert arena.in_use == 1
    os.close(descriptor)


def test_each_reader_of_a_shared_descriptor_gets_the_whole_key() -> None:
    """Children that inherit one memfd share its offset; the second must not find it at the end."""
    descriptor = _memfd(ACCEPTED[2])
    with SecretArena(8) as arena, arena.allocate() as first, arena.allocate() as second:
        read_key_fd_into(descriptor, first)
        read_key_fd_into(descriptor, second)
        assert bytes(first.view) == bytes(second.view) == KEY
    os.close(descriptor)


def test_a_key_is_read_whole_from_a_pipe_that_delivers_it_in_pieces() -> None:
    reader, writer = os.pipe()
    if os.fork() == 0:
        for byte in ACCEPTED[2]:
            os.write(writer, bytes([byte]))
        os._exit(0)
    os.close(writer)
    with SecretArena(4) as arena, arena.allocate() as slot:
        read_key_fd_into(reader, slot)
        assert bytes(slot.view) == KEY
    os.close(reader)
    os.wait()


def test_reading_a_key_needs_free_slots() -> None:
    descriptor = _memfd(ACCEPTED[0])
    with SecretArena(3) as arena, arena.allocate() as slot:
        with pytest.raises(ArenaFullError):
            read_key_fd_into(descriptor, slot)
        assert arena.in_use == 1
    os.close(descriptor)


def test_the_default_arena_fits_the_lock_limit_that_debian_sets() -> None:
    with SecretArena() as arena:
        assert arena.locked_bytes <= 8 * 1024 * 1024 // 2
        assert arena.slots == arena_module.SLOTS_DEFAULT
