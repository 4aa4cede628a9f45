"""The child's command line, environment and log lines, without a process; and its descriptors, with one."""

import asyncio
import os
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_server.kms.supervisor import LAST_LINES_MAX, LINE_BYTES_MAX, Child, ChildOptions, Lines, environment
from tests.harness.descriptors import open_files
from tests.harness.scripts import python_program
from tests.progressdb_server.kms.conftest import Place


def lines_of(*pieces: bytes) -> list[str]:
    lines = Lines()
    return [line for piece in [*pieces, b""] for line in lines.feed(piece)]


@given(
    st.lists(
        st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=30).filter(
            lambda text: text == text.rstrip()
        ),
        max_size=10,
    ),
    st.lists(st.integers(0, 300), max_size=5),
)
def test_lines_come_out_as_they_were_written_however_they_are_cut(written: list[str], cuts: list[int]) -> None:
    data = "".join(line + "\n" for line in written).encode()
    ends = sorted({cut for cut in cuts if 0 < cut < len(data)} | {len(data)})
    pieces = [data[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]
    assert lines_of(*pieces) == written


def test_a_line_that_never_ends_is_cut_and_takes_no_more_memory() -> None:
    lines = Lines()
    piece = b"x" * LINE_BYTES_MAX
    tracemalloc.start()
    try:
        for _ in range(100):
            assert list(lines.feed(piece)) == []
        assert tracemalloc.get_traced_memory()[0] < 10 * LINE_BYTES_MAX
    finally:
        tracemalloc.stop()
    assert list(lines.feed(b"end\nnext\n")) == ["x" * LINE_BYTES_MAX + " … (cut)", "next"]


def test_a_line_can_not_forge_another_or_move_the_cursor() -> None:
    assert lines_of(b"a\rb\x1b[2J\x00c\xff\n") == ["a b [2J c\N{REPLACEMENT CHARACTER}"]


def test_a_last_line_without_an_end_is_not_lost_and_empty_lines_are_none() -> None:
    assert lines_of(b"\n\na\n\nb") == ["a", "b"]


def test_the_command_is_the_installed_miniKMS_unless_a_program_is_named() -> None:
    command = ChildOptions(socket_path="s", data_dir="d", dev=True).command(7)
    here = os.getcwd()
    assert command == [
        *[sys.executable, "-P", "-m", "minikms"],
        *["--socket", f"{here}/s", "--data-dir", f"{here}/d"],
        *["--dev", "--parent-fd", "7", "--log-format", "json"],
    ]
    assert ChildOptions(socket_path="s", data_dir="d", binary="bin/minikms").command(7)[0] == f"{here}/bin/minikms"


def test_a_remembered_line_of_the_audit_log_is_passed_on() -> None:
    command = ChildOptions(socket_path="s", data_dir="d").command(7, "12:c2ln")
    assert command[command.index("--expect-audit-head") + 1] == "12:c2ln"


def test_a_key_goes_on_as_a_path_or_a_descriptor_never_as_text() -> None:
    by_file = ChildOptions(socket_path="s", data_dir="d", master_key_file="/k").command(7)
    assert by_file[by_file.index("--master-key-file") + 1] == "/k"
    by_descriptor = ChildOptions(socket_path="s", data_dir="d", master_key_fd=5).command(7)
    assert by_descriptor[by_descriptor.index("--master-key-fd") + 1] == "5"


def test_the_child_gets_only_place_and_language_of_the_environment() -> None:
    own = {"PATH": "/bin", "LANG": "C", "PYTHONPATH": "/x", "LD_PRELOAD": "x.so", "PROGRESSDB_API_ADMIN_KEYS": "secret"}
    assert environment(own, 1000) == {"PATH": "/bin", "LANG": "C", "PROGRESSDB_MINIKMS_ALLOWED_UIDS": "1000"}


def test_the_child_reads_the_master_key_from_its_beginning(place: Place) -> None:
    descriptor = os.memfd_create("key")
    os.pwrite(descriptor, b"ab" * 32, 0)

    async def main() -> bytes:
        child = await Child.start(place.options(master_key_fd=descriptor), lambda line: None)
        seen = place.data / "seen-master-key"
        async with asyncio.timeout(60):
            while not (seen.exists() and seen.stat().st_size):
                await asyncio.sleep(0.02)
        await child.stop()
        return seen.read_bytes()

    try:
        assert asyncio.run(main()) == b"ab" * 32
    finally:
        os.close(descriptor)


def test_a_child_inherits_no_descriptor_but_those_it_is_given(place: Place) -> None:
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)

    async def main() -> list[str]:
        child = await Child.start(place.options(), lambda line: None)
        try:
            return list(open_files(child.pid).values())
        finally:
            await child.stop()

    try:
        assert "/dev/null" in (links := asyncio.run(main()))
        assert links.count("/dev/null") <= 2  # standard input and output
    finally:
        os.close(leak)


async def test_a_child_that_does_not_stop_is_killed_and_its_last_words_are_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("progressdb_server.kms.supervisor.STOP_S_MAX", 0.3)
    stubborn = place.directory / "stubborn"
    python_program(
        stubborn,
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "for n in range(9): print('line', n, file=sys.stderr, flush=True)\ntime.sleep(60)\n",
    )
    heard: list[str] = []

    child = await Child.start(place.options(binary=str(stubborn)), heard.append)
    async with asyncio.timeout(60):
        while len(heard) < 9:
            await asyncio.sleep(0.02)
    await child.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
    assert child.last_lines == [f"line {number}" for number in range(9)][-LAST_LINES_MAX:]
