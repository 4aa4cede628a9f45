"""Hardening: each test hardens a process of its own and then tries what it has given up."""

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms.memory import SecretArena, harden, libc, seccomp
from minikms.memory.process import Measure
from tests import needs
from tests.harness.scripts import answer_of

ALL = [
    "keys_in_secret_memory",
    "core_dumps_off",
    "umask_077",
    "memory_locked",
    "no_new_privileges",
    "capabilities_dropped",
    "not_dumpable",
    "filesystem_restricted",
    "system_calls_filtered",
]

PROLOGUE = """
import json, os, resource, signal, socket, sys
from minikms.api.errors import StartError
from minikms.memory import SecretArena, harden, interpreter_paths
def attempt(action):
    try:
        return str(action())
    except OSError as error:
        return type(error).__name__
def measures(**options):
    options = {"read": interpreter_paths(), "write": [], **options}
    return {measure.name: measure.status() for measure in harden(SecretArena(1), **options)}
answer = None
"""

in_a_process = partial(answer_of, PROLOGUE)


def status_of(pid: int | str) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def test_every_measure_is_reported_and_has_a_reason_if_missing() -> None:
    told = in_a_process("answer = measures()")
    assert list(told) == ALL
    for measure in told.values():
        assert ("why" in measure) == (not measure["in_force"])


def test_all_but_the_memory_lock_hold_on_this_machine() -> None:
    """The lock on all memory needs an infinite RLIMIT_MEMLOCK, which only the unit gives."""
    told = in_a_process("answer = measures()")
    missing = {name for name, measure in told.items() if not measure["in_force"]}
    assert missing <= {"memory_locked"}
    if missing:
        assert "LimitMEMLOCK=infinity" in told["memory_locked"]["why"]


def test_required_hardening_refuses_to_start_and_names_what_is_missing() -> None:
    answer = in_a_process("""
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        try:
            measures(require=True, keep_capabilities=True)
        except StartError as error:
            answer = str(error)
    """)
    assert "memory_locked (" in answer and "capabilities_dropped (kept as configured)" in answer
    assert "not_dumpable" not in answer


def test_an_arena_without_memfd_secret_is_a_missing_measure() -> None:
    answer = in_a_process("""
        try:
            harden(SecretArena(1, force_fallback=True), read=[], write=[], require=True)
        except StartError as error:
            answer = str(error)
    """)
    assert "keys_in_secret_memory (memfd_secret is not available" in answer


def test_the_kernel_confirms_what_is_reported() -> None:
    """Asked from outside, through /proc/<pid>/status."""
    code = PROLOGUE + textwrap.dedent("""
        measures()
        print(os.umask(0), resource.getrlimit(resource.RLIMIT_CORE), flush=True)
        sys.stdin.read()
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"63 (0, 0)\n"
        status = status_of(process.pid)
        owner = os.stat(f"/proc/{process.pid}/environ").st_uid
        assert process.stdin is not None
        process.stdin.close()
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind], 16) == 0
    if os.geteuid() == 0:
        assert int(status["CapBnd"], 16) == 0
    assert owner == 0  # not dumpable: its /proc files belong to root


def test_all_memory_is_locked_where_the_limit_is_infinite() -> None:
    """The limit cannot be raised everywhere, so the child says that it was; root's right to lock does the rest."""
    needs.root()
    answer = in_a_process("""
        from minikms.memory import process
        process.resource.setrlimit = lambda *_: None
        status = open("/proc/self/status")
        measures()
        locked = [line.split()[1] for line in status if line.startswith("VmLck")]
        answer = int(locked[0])
    """)
    assert answer > 10_000, "kilobytes"


def test_a_process_of_the_same_user_cannot_read_memory_or_environment() -> None:
    needs.root()
    code = PROLOGUE + textwrap.dedent("""
        os.setgroups([]); os.setresgid(45678, 45678, 45678); os.setresuid(45678, 45678, 45678)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            measures()
            os.write(writer, b"ready")
            signal.pause()
        os.read(reader, 5)
        print(json.dumps([attempt(lambda: open(f"/proc/{child}/{name}", "rb")) for name in ("mem", "environ", "maps")]))
        os.kill(child, signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout) == ["PermissionError"] * 3, done.stderr


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    code = PROLOGUE + "os.chdir(sys.argv[1]); measures(write=[sys.argv[1]]); os.abort()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGABRT
    assert os.listdir(tmp_path) == []


def test_only_the_given_directories_can_be_read_or_written(tmp_path: Path) -> None:
    for name in ("written", "read", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    answer = in_a_process(
        """
        base = sys.argv[1]
        measures(read=[f"{base}/read", f"{base}/missing"], write=[f"{base}/written"])
        answer = [
            attempt(lambda: open(f"{base}/read/file").read()),
            attempt(lambda: open(f"{base}/written/file").read()),
            attempt(lambda: open(f"{base}/other/file").read()),
            attempt(lambda: open(f"{base}/read/new", "w")),
            attempt(lambda: open(f"{base}/read/file", "a")),
            attempt(lambda: os.truncate(f"{base}/read/file", 0)),
            attempt(lambda: os.unlink(f"{base}/read/file")),
            attempt(lambda: os.rename(f"{base}/written/file", f"{base}/read/file")),
            attempt(lambda: os.symlink("/etc/passwd", f"{base}/written/link")),
            attempt(lambda: os.listdir("/")),
        ]
        """,
        str(tmp_path),
    )
    # EXDEV is how Landlock refuses a rename into a directory without the right.
    assert answer[:2] == ["read", "written"]
    assert set(answer[2:7] + answer[8:]) == {"PermissionError"}
    assert answer[7] in ("PermissionError", "OSError")


def test_the_working_directory_is_not_among_what_the_interpreter_may_read(tmp_path: Path) -> None:
    """As `python -m` would have it, which puts it on the module path."""
    (tmp_path / "file").write_text("text")
    answer = in_a_process(
        """
        os.chdir(sys.argv[1])
        sys.path[:0] = [sys.argv[1], "/"]
        measures()
        answer = [attempt(lambda: open("file").read()), attempt(lambda: os.listdir("/")), "/" in interpreter_paths()]
        """,
        str(tmp_path),
    )
    assert answer == ["PermissionError", "PermissionError", False]


def test_what_a_key_store_does_works_in_the_written_directories(tmp_path: Path) -> None:
    """Files and directories made, renamed within and between them, removed; sockets made; directories synced."""
    for name in ("data", "run"):
        (tmp_path / name).mkdir()
    answer = in_a_process(
        """
        data, run = f"{sys.argv[1]}/data", f"{sys.argv[1]}/run"
        measures(write=[data, run])
        os.mkdir(f"{data}/sub")
        for name in ("a", "b"):
            with open(f"{data}/{name}", "w") as file:
                file.write(name)
                os.fsync(file.fileno())
        os.rename(f"{data}/a", f"{data}/b")
        os.rename(f"{data}/b", f"{data}/sub/b")
        os.rename(f"{data}/sub/b", f"{run}/b")
        os.unlink(f"{run}/b")
        os.rmdir(f"{data}/sub")
        directory = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"{run}/s")
        os.unlink(f"{run}/s")
        answer = os.listdir(data) + os.listdir(run)
        """,
        str(tmp_path),
    )
    assert answer == []


def test_no_signal_reaches_a_process_that_it_did_not_start() -> None:
    try:
        abi = libc.syscall("landlock_create_ruleset", 444, None, 0, 1)
    except OSError:
        abi = 0
    needs.linux("6.12", abi >= 6)
    answer = in_a_process("""
        measures()
        child = os.fork()
        if child == 0:
            signal.pause()
        answer = [attempt(lambda: os.kill(pid, 0)) for pid in (os.getpid(), child, os.getppid())]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    """)
    assert answer == ["None", "None", "PermissionError"]


def test_modules_that_were_not_loaded_yet_still_load() -> None:
    assert in_a_process("measures(); import wsgiref.validate, sqlite3; answer = 'loaded'") == "loaded"


@pytest.mark.parametrize("allowed", [False, True])
def test_programs_can_be_started_only_if_a_root_provider_needs_it(allowed: bool) -> None:
    answer = in_a_process(f"""
        import subprocess
        measures(allow_exec={allowed})
        answer = attempt(lambda: subprocess.run([sys.executable, "-c", ""]).returncode)
    """)
    assert answer == ("0" if allowed else "PermissionError")


@pytest.mark.parametrize("allowed", [False, True])
def test_network_sockets_can_be_opened_only_if_configured(allowed: bool) -> None:
    answer = in_a_process(f"""
        measures(allow_network={allowed})
        families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
        answer = [attempt(lambda: socket.socket(family, socket.SOCK_DGRAM).close()) for family in families]
    """)
    assert answer == ["None"] + ["None" if allowed else "PermissionError"] * 3


def test_every_denied_call_fails_with_eperm_in_every_thread() -> None:
    """The arguments are invalid, so that an allowed call would fail with another error."""
    needs.machine("x86_64", "aarch64")
    column = 0 if os.uname().machine == "x86_64" else 1
    calls = {name: numbers[column] for name, numbers in (seccomp.DENIED | seccomp.DENIED_PROGRAMS).items()}
    calls = {name: number for name, number in calls.items() if number is not None}
    answer = in_a_process(
        """
        import ctypes, threading
        libc = ctypes.CDLL(None, use_errno=True)
        measures(keep_capabilities=True)
        answer = {}
        def call_all():
            for name, number in json.loads(sys.argv[1]).items():
                ctypes.set_errno(0)
                result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
                answer.setdefault(name, []).append([result, ctypes.get_errno()])
        thread = threading.Thread(target=call_all)
        thread.start(), thread.join(), call_all()
        """,
        json.dumps(calls),
    )
    assert answer == {name: [[-1, 1], [-1, 1]] for name in calls}


def test_the_numbers_are_those_that_libseccomp_knows() -> None:
    needs.program("systemd-analyze")  # its Debian package brings the library
    library = ctypes.CDLL("libseccomp.so.2")
    judged = {"socket": seccomp.SOCKET, "clone": seccomp.CLONE, "clone3": seccomp.CLONE3, "ioctl": seccomp.IOCTL}
    for column, architecture in enumerate(seccomp.AUDIT_ARCH.values()):
        for name, numbers in (seccomp.DENIED | seccomp.DENIED_PROGRAMS | judged).items():
            known = library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(architecture), name.encode())
            assert known == numbers[column] if numbers[column] is not None else known < 0, name


def test_an_unknown_machine_is_refused_without_a_filter() -> None:
    with pytest.raises(OSError, match="riscv64"):
        seccomp.filter_program("riscv64", allow_exec=False, allow_network=False)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("allow_exec", [False, True])
@pytest.mark.parametrize("allow_network", [False, True])
def test_the_filter_decides_each_call_as_listed(machine: str, allow_exec: bool, allow_network: bool) -> None:
    """Run by an interpreter of its own, for every number of both tables and some others."""
    column = ["x86_64", "aarch64"].index(machine)
    architecture = seccomp.AUDIT_ARCH[machine]
    program = seccomp.filter_program(machine, allow_exec=allow_exec, allow_network=allow_network)
    listed = seccomp.DENIED if allow_exec else seccomp.DENIED | seccomp.DENIED_PROGRAMS
    denied = {numbers[column] for numbers in listed.values()}
    deny, allow, kill, no_such_call = 0x50001, 0x7FFF0000, 0x80000000, 0x50000 | errno.ENOSYS
    for number in range(600):
        for family in (1, 2, 10, 16):
            expected = deny if number in denied else allow
            if number == seccomp.SOCKET[column] and family != 1 and not allow_network:
                expected = deny
            if number == seccomp.CLONE3[column]:
                expected = no_such_call
            assert _decide(program, number, architecture, family) == expected, (number, family)
    assert _decide(program, 0, architecture ^ 1, 0) == kill
    assert _decide(program, 0x40000000 + 1, architecture, 0) == deny
    for bit in range(32):
        namespace = bit in (17, 25, 26, 27, 28, 29, 30)
        assert _decide(program, seccomp.CLONE[column], architecture, 1 << bit) == (deny if namespace else allow), bit
    for request, decision in ((0x5411, allow), (0x5412, deny), (0x5413, allow), (0x541C, deny), (0x5421, allow)):
        assert _decide(program, seccomp.IOCTL[column], architecture, 0, request) == decision, hex(request)


def test_namespaces_and_terminal_input_are_denied_and_threads_start() -> None:
    """Most privilege escalations begin with a namespace; simulated input would let a daemon leave its terminal."""
    answer = in_a_process("""
        import ctypes, fcntl, termios, threading
        libc = ctypes.CDLL(None, use_errno=True)
        main, other = os.openpty()
        measures()
        answer = [attempt(lambda: fcntl.ioctl(other, termios.TIOCSTI, b"x"))]
        pid = libc.syscall(56 if os.uname().machine == "x86_64" else 220, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        answer.append([pid, ctypes.get_errno()])
        thread = threading.Thread(target=lambda: answer.append("a thread"))
        thread.start(), thread.join()
        child = os.fork()
        if child == 0:
            os._exit(7)
        answer.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert answer == ["PermissionError", [-1, 1], "a thread", 7]


def _decide(program: list[seccomp.Instruction], number: int, architecture: int, argument: int, second: int = 0) -> int:
    """A classic BPF machine, as far as these programs go (struct seccomp_data at its offsets)."""
    data = {0: number, 4: architecture, 16: argument, 24: second}
    position, accumulator = 0, 0
    while True:
        step = program[position]
        position += 1
        if step.code == 0x20:
            accumulator = data[step.value]
        elif step.code == 0x15:
            position += step.then if accumulator == step.value else step.otherwise
        elif step.code == 0x35:
            position += step.then if accumulator >= step.value else step.otherwise
        elif step.code == 0x45:
            position += step.then if accumulator & step.value else step.otherwise
        else:
            return step.value


def test_a_process_with_a_second_thread_is_not_hardened() -> None:
    answer = in_a_process("""
        import threading
        threading.Thread(target=signal.pause, daemon=True).start()
        try:
            measures()
        except StartError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)
        os._exit(0)
    """)
    assert "one thread, and it has 2" in answer


def test_a_thread_that_was_joined_does_not_prevent_hardening() -> None:
    """Before Python 3.13 it may end shortly after: on one processor in every second case."""
    assert (
        in_a_process("""
        import threading
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        answer = []
        for _ in range(20):
            child = os.fork()
            if child == 0:
                thread = threading.Thread(target=int)
                thread.start()
                thread.join()
                measures()
                os._exit(0)
            answer.append(os.waitpid(child, 0)[1])
    """)
        == [0] * 20
    )


def test_a_failing_measure_does_not_prevent_the_others() -> None:
    answer = in_a_process("""
        from minikms.memory import process
        def fail(*_, **__): raise OSError(38, "as on an old kernel")
        process.resource.setrlimit = process.drop_capabilities = process.restrict_filesystem = fail
        answer = measures()
    """)
    missing = {name for name, measure in answer.items() if not measure["in_force"]}
    assert missing - {"memory_locked"} == {"core_dumps_off", "capabilities_dropped", "filesystem_restricted"}
    assert answer["core_dumps_off"]["why"] == "as on an old kernel"


def test_a_measure_in_force_has_no_reason_in_status() -> None:
    assert Measure("name", True).status() == {"measure": "name", "in_force": True}
    assert Measure("name", False, "because").status() == {"measure": "name", "in_force": False, "why": "because"}


def test_hardening_this_very_process_is_refused_when_it_has_threads() -> None:
    """A guard for the test suite itself: nothing here may harden pytest."""
    with SecretArena(1) as arena, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "listdir", lambda _: ["1", "2"])
        with pytest.raises(StartError):
            harden(arena, read=[], write=[])
