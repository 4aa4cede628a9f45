"""The programs in processes of their own, forked from one that has imported them: a start costs a tenth.

Owns: the process that forks, one for each process of the tests, a test's view of a forked program, and what makes the
programs of a shell forked ones. Invariants: the program has the arguments, environment, directory and standard
descriptors that the caller gives, no other descriptors, and the caller's user. Never use it for a claim about a
program's memory, its name in the process table, or the start or end of its process: those tests start an interpreter.
"""

import atexit
import contextlib
import gc
import importlib
import io
import marshal
import os
import pkgutil
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, Final, NoReturn

from cyclopts import App, ArgumentCollection

from minikms.memory import libc
from minikms.processes.flags import BIND_VARIABLE
from tests.harness import in_process

PROJECT: Final = Path(__file__).resolve().parents[2]
REQUEST_BYTES_MAX: Final = 200_000
"""Of arguments and environment: the kernel sends them in one packet."""
DESCRIPTORS: Final = 4
"""Of a request: the socket for the answers, then input, output and errors of the program."""
RUN_S_MAX: Final = 120.0
UMASK: Final = 0o022
PR_SET_DUMPABLE: Final = 4
"""linux/prctl.h"""


User = tuple[int, int, Sequence[int]]
"""Numbers of a user, its group and its other groups."""


class Forked:
    """A running program, with methods of `subprocess.Popen`."""

    def __init__(
        self,
        words: list[str],
        stdin: int | None,
        stdout: int,
        stderr: int,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ".",
        user: User | None = None,
        session: bool = False,
    ) -> None:
        """`words`: a module that `python -m` runs, such as `minikms`, and its arguments. `stdin`: a descriptor, as the
        next two; None for empty input. `user`: this process's, unless told. `session`: it has one of its own,
        and so no terminal.
        """
        environ = {BIND_VARIABLE: "1", **(os.environ if env is None else env)}
        request = {"words": words, "env": environ, "cwd": str(Path(cwd).resolve()), "user": user, "session": session}
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a packet for each
        with theirs, Path(os.devnull).open() as empty:
            given = empty.fileno() if stdin is None else stdin
            socket.send_fds(_forker(), [marshal.dumps(request)], [theirs.fileno(), given, stdout, stderr])
        self.args = words
        self.pid = int(self._answers.recv(16))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                status = self._answers.recv(16)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._answers.close()
            self.returncode = os.waitstatus_to_exitcode(int(status))
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended just now
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(command: list[str], log: IO[bytes], env: Mapping[str, str] | None = None) -> Forked | subprocess.Popen[bytes]:
    """Starts `command` with its output in `log`: forked if it is one of our programs under nothing else."""
    if command[:2] == [sys.executable, "-m"]:
        return Forked(command[2:], None, log.fileno(), log.fileno(), env=env)
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def script(module: str) -> str:
    """Lines for a shell that do what `python -P -m MODULE "$@"` does: forked in a shell that has what `for_shells`
    gives, else in an interpreter.
    """
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), module]
    interpreter = [sys.executable, "-P", "-m", module]
    return f'[ "$FORKER" ] || exec {shlex.join(interpreter)} "$@"\nexec {shlex.join(launcher)} "$@"'


def for_shells() -> tuple[dict[str, str], tuple[int, ...]]:
    """Variables for a shell, and descriptors that it is to inherit, so that each `script` in it runs forked."""
    forker = _forker().fileno()
    return {"FORKER": str(forker), BIND_VARIABLE: "1"}, (forker,)


def run(
    *words: object,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: str | Path = ".",
    user: User | None = None,
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, input=stdin, …)`."""
    with contextlib.ExitStack() as stack:
        given, out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
        given.write(stdin)
        given.seek(0)
        descriptors = given.fileno(), out.fileno(), err.fileno()
        program = Forked([*map(str, words)], *descriptors, env=env, cwd=cwd, user=user, session=True)
        try:
            status = program.wait(RUN_S_MAX)
        finally:
            program.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(program.args, status, out.read(), err.read())


@cache
def _forker() -> socket.socket:
    """The socket for requests to the process that forks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=theirs.fileno(), cwd=PROJECT, env={**os.environ, BIND_VARIABLE: "1"}
        )

    @atexit.register
    def end() -> None:
        ours.shutdown(socket.SHUT_RDWR)  # a shell may have it too
        ours.close()
        process.wait()

    return ours


# --- the process that forks -----------------------------------------------------------------------------------------
def _forked_request() -> dict[str, Any]:
    """Forks for each request, until the tests end. Returns in each forked process, with its request."""
    requests = socket.socket(fileno=os.dup(0))
    while True:
        packet, descriptors, *_ = socket.recv_fds(requests, REQUEST_BYTES_MAX, DESCRIPTORS)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not packet:
            sys.exit()
        request: dict[str, Any] = marshal.loads(packet)
        package = request["words"][0].partition(".")[0]
        if package == "tests":  # a program with faults
            _import_all("minikms")
            _import_all("progressdb_server")
        else:
            _import_all(package)
            _read_parameters(package, request["words"][1:])
        if not os.fork():
            break
        for descriptor in descriptors:
            os.close(descriptor)
    answers = socket.socket(fileno=descriptors[0])
    if program := os.fork():
        for number in (0, 1, 2, requests.fileno(), *descriptors[1:]):
            os.close(number)
        answers.send(str(program).encode())
        answers.send(str(os.waitpid(program, 0)[1]).encode())
        os._exit(0)
    for number, descriptor in enumerate(descriptors[1:]):
        os.dup2(descriptor, number)
    requests.detach()
    answers.detach()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    return request


def _take_user(uid: int, gid: int, groups: Sequence[int]) -> None:
    if uid != os.getuid():
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        libc.prctl("prctl(PR_SET_DUMPABLE)", PR_SET_DUMPABLE, 1)  # as after execve(2); else /proc/self is root's


@cache
def _import_all(package: str) -> None:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    # What a command line imports only when it is read, and what only its help does.
    for flag in "--version", "--help":
        sys.argv = [package, flag]
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module(package, run_name="__main__", alter_sys=True)
    gc.collect()
    gc.freeze()


_parameters: dict[int, ArgumentCollection] = {}
"""Of each command that was asked for, by its id: to read them again would be half of the cost of a start."""
_read_again = App.assemble_argument_collection


def _read_parameters(package: str, words: list[str]) -> None:
    place = f"{package}.cli.command" if package in ("minikms", "progressdb_server") else f"{package}.command"
    with contextlib.suppress(Exception):  # the program shows it
        *_, command = importlib.import_module(place).app.parse_commands(words)[1]
        if id(command) not in _parameters:
            _parameters[id(command)] = _read_again(command)


def _parameters_once(command: App, **how: Any) -> ArgumentCollection:
    """What is parsed stays in a collection, so that a second one is made anew."""
    read = None if how else _parameters.pop(id(command), None)
    return _read_again(command, **how) if read is None else read


def _become(request: dict[str, Any]) -> NoReturn:
    os.umask(request.get("umask", UMASK))
    if request.get("session"):
        os.setsid()
    if request["user"]:
        _take_user(*request["user"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    in_process.install()
    App.assemble_argument_collection = _parameters_once  # type: ignore[assignment, method-assign]  # here alone
    gc.unfreeze = lambda: None  # a collection would copy every page of what was imported
    module, *arguments = request["words"]
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace")
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001  as an interpreter does
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)  # an interpreter's clean-up would copy those pages too


if __name__ == "__main__":
    _become(_forked_request())
