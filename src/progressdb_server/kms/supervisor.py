"""The supervisor of miniKMS, and the miniKMS process that it starts.

Owns: the choice between the daemon that answers and a new one, its restarts and its end; of a started process the
command line, the environment, the pipe whose end of file shows it that the server is gone, and the lines that it writes
to stderr. Rules:

1. A daemon that answers `/health` at the socket, served by an expected uid, is used. None is started beside a socket
   that answers.
2. Otherwise one is started (unless `spawn` is false), also when the one in use dies later. When two servers do so at
   once, the lock on miniKMS's data directory decides. The loser's child ends, and by rule 1 the loser uses the
   winner's daemon.
3. A started daemon that dies is started again after a pause that grows from PAUSE_S_MIN to PAUSE_S_MAX, with random
   jitter. One that lived for STABLE_S resets the pause. If the first start fails, `start` raises.
4. A started daemon that leaves UNANSWERED_MAX health checks in a row unanswered hangs. It is killed by its pid, and
   rule 3 applies once it has ended. A found daemon that hangs is logged and never killed.
5. A daemon that was started here is stopped with this server. One that was found keeps running.
6. A root key of the environment is passed to one child, and every descriptor of it is closed here at once, also when a
   daemon was found and none is started. Then no second start is possible. If the daemon ends, `on_lost` is called, and
   the server ends: its service manager starts it again with the variable.
7. Each start passes the line that the daemon's audit log must have, as this server remembers it at that moment.

Invariants: a started process inherits only the descriptors named here, and only the variables of `environment`; it
leads a session of its own, so that a Ctrl-C for the server does not end the key service before the server is done; it
never outlives the server, even if that is killed (the kernel closes the pipe). The supervisor passes the path of the
key file, or the descriptor of `root_key`, which it does not keep. It must never read a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import random
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Final

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsError, KmsRefusedError, KmsUnavailableError, KmsUntrustedServerError
from minikms.client import AsyncClient
from minikms.platform.logs import LEVELS, Log
from minikms.processes.flags import EXIT_FAILED, EXIT_MISSING

READY_S_MAX: Final = 30.0
FOUND_S_MAX: Final = 2.0
"""How long another server's daemon may take to answer, after the one started here ended before it answered."""
ABSENT_S_MAX: Final = 10.0
"""How long a miniKMS that others start may take, if none is started here."""
HEALTH_TIMEOUT_S: Final = 2.0
READY_POLL_S: Final = 0.03
WATCH_POLL_S: Final = 0.5
CHILD_POLL_S: Final = 2.0
UNANSWERED_MAX: Final = 3
"""A daemon hangs if it leaves this many health checks in a row unanswered. Each check of a child takes at most
CHILD_POLL_S and HEALTH_TIMEOUT_S."""
REFUSES: Final = "miniKMS answers, and refuses"
HANGS: Final = "miniKMS hangs: this server did not start it, so restart it"
PAUSE_S_MIN: Final = 0.1
PAUSE_S_MAX: Final = 10.0
STABLE_S: Final = 30.0
LINE_BYTES_MAX: Final = 8192
"""The bytes of one line of the child's log; the rest of a longer line is dropped."""
LAST_LINES_MAX: Final = 5
STOP_S_MAX: Final = 10.0
LAST_LINES_S_MAX: Final = 1.0
"""After its end: a process that it started may still hold its stderr."""
_READ_BYTES_MAX: Final = 64 * 1024
_KEPT_VARIABLES: Final = ("LANG", "LC_ALL", "LC_CTYPE", "PATH", "TZ")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildOptions:
    """What to start. Paths are taken as seen from the server's working directory.

    `binary` is the program (PROGRESSDB_KMS_BINARY); None is the miniKMS installed beside this server. At most one of
    `master_key_file` and `master_key_fd` is given; neither leaves it to `dev` or to a start that is refused.
    """

    socket_path: str | os.PathLike[str]
    data_dir: str
    binary: str | None = None
    dev: bool = False
    master_key_file: str | None = None
    master_key_fd: int | None = None
    log_format: str = "json"

    def command(self, parent_fd: int, audit_head: str = "") -> list[str]:
        """`audit_head`: the line that its audit log must have (`SEQ:SIG`), empty where none is remembered."""
        # -P: or a file in the working directory could stand in for a module of the key service
        program = [os.path.abspath(self.binary)] if self.binary else [sys.executable, "-P", "-m", "minikms"]
        words = [*program, "--socket", os.path.abspath(self.socket_path), "--data-dir", os.path.abspath(self.data_dir)]
        if self.master_key_file:
            words += ["--master-key-file", os.path.abspath(self.master_key_file)]
        if self.master_key_fd is not None:
            words += ["--master-key-fd", str(self.master_key_fd)]
        if self.dev:
            words.append("--dev")
        if audit_head:
            words += ["--expect-audit-head", audit_head]
        return [*words, "--parent-fd", str(parent_fd), "--log-format", self.log_format]


def environment(own: Mapping[str, str], uid: int) -> dict[str, str]:
    """The child's environment: nothing secret, and the server's uid as the one that it serves."""
    variables = {name: own[name] for name in _KEPT_VARIABLES if name in own}
    return {**variables, "PROGRESSDB_MINIKMS_ALLOWED_UIDS": str(uid)}


class Lines:
    """Cuts a stream into lines of bounded length, safe to log. Pure."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that `data` completes; without data (at the end) the rest."""
        *whole, rest = data.split(b"\n") if data else [b"", b""]
        for piece in whole:
            self._keep(piece)
            if self._kept:
                yield self._text()
            self._kept.clear()
        self._keep(rest)

    def _keep(self, piece: bytes) -> None:
        self._kept += piece[: LINE_BYTES_MAX + 1 - len(self._kept)]

    def _text(self) -> str:
        text = self._kept[:LINE_BYTES_MAX].decode("utf-8", "replace")
        cleaned = "".join(char if char.isprintable() else " " for char in text).rstrip()
        return f"{cleaned} … (cut)" if len(self._kept) > LINE_BYTES_MAX else cleaned


class Child:
    """A started process; made by `Child.start`, ends by itself or by `stop`."""

    def __init__(self, process: Process, parent_pipe: int, on_line: Callable[[str], None]) -> None:
        self._process = process
        self._parent_pipe: int | None = parent_pipe
        self._on_line = on_line
        self.last_lines: list[str] = []
        self._forwarding = asyncio.get_running_loop().create_task(self._forward(), name="minikms log")

    @classmethod
    async def start(cls, options: ChildOptions, on_line: Callable[[str], None], *, audit_head: str = "") -> Child:
        """Starts the program. Raises OSError when it can't be started."""
        for_child, ours = os.pipe()  # not inherited through exec (PEP 446)
        try:
            passed = [for_child]
            if options.master_key_fd is not None:
                passed.append(options.master_key_fd)
            process = await asyncio.create_subprocess_exec(
                *options.command(for_child, audit_head),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                env=environment(os.environ, os.geteuid()),
                pass_fds=passed,
                start_new_session=True,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(for_child)
        return cls(process, ours, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Waits for its end and its last lines. Returns the exit status, negative for a signal."""
        status = await self._process.wait()
        await asyncio.wait([self._forwarding], timeout=LAST_LINES_S_MAX)
        self._close_pipe()
        return status

    def kill(self) -> None:
        """Ends it at once, also when it is stopped (SIGSTOP) or hangs. `wait` returns when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self) -> None:
        """Asks it to end, and kills it after STOP_S_MAX."""
        try:
            if self._process.returncode is None:
                self._process.terminate()
            async with asyncio.timeout(STOP_S_MAX):
                await self.wait()
        except (TimeoutError, ProcessLookupError):
            if self._process.returncode is None:
                self._process.kill()
            await self.wait()
        finally:
            self._close_pipe()
            self._forwarding.cancel()

    def _close_pipe(self) -> None:
        if self._parent_pipe is not None:
            os.close(self._parent_pipe)
            self._parent_pipe = None

    async def _forward(self) -> None:
        stream = self._process.stderr
        lines = Lines()
        data = b"."
        while stream is not None and data:
            data = await stream.read(_READ_BYTES_MAX)
            for line in lines.feed(data):
                self.last_lines = [*self.last_lines[1 - LAST_LINES_MAX :], line]
                self._on_line(line)


class SupervisorError(Exception):
    """There is no miniKMS to use; the text says why and what to do. `exit_status`: that of the started one, if it ended
    because something is missing or wrong, else EXIT_FAILED.
    """

    def __init__(self, text: str, exit_status: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.exit_status = exit_status


@dataclass(eq=False)
class Supervisor:
    """Keeps a miniKMS at `options.socket_path` running from `start` to `stop`. Belongs to one event loop.

    `audit_head` is called before each start, in the event loop; see `ChildOptions.command`. `on_lost` is called with
    the reason when the daemon is gone and can't be started again, because its root key was passed on. Takes over
    `options.master_key_fd`, and closes it in `start`.
    """

    options: ChildOptions
    _: KW_ONLY
    spawn: bool = True
    server_uids: Collection[int] | None = None
    audit_head: Callable[[], Awaitable[str]] | None = None
    on_lost: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        path = self.options.socket_path
        self._key_closed = False
        self._health = AsyncClient(path, server_uids=self.server_uids, timeout_s=HEALTH_TIMEOUT_S, wait_s=0.0)
        self._log = Log(socket=os.fspath(path))
        self._task: asyncio.Task[None] | None = None
        self._child: Child | None = None
        self._reason = ""
        self._exit_status = EXIT_FAILED
        self._starting = True
        self._failures = 0

    @property
    def child_pid(self) -> int | None:
        """The pid of the daemon that was spawned here, while it lives."""
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Returns once a miniKMS answers. Raises SupervisorError when none does; nothing is left running then."""
        try:
            is_answering = await self._find_or_start(FOUND_S_MAX)
        except BaseException:
            await self.stop()
            raise
        finally:
            self._close_key()
        if not is_answering:
            await self.stop()
            raise SupervisorError(f"no miniKMS at {self.options.socket_path}: {self._reason}", self._exit_status)
        self._starting = False
        self._task = asyncio.get_running_loop().create_task(self._keep(), name="minikms supervisor")

    async def stop(self) -> None:
        """Stops the daemon that was started here, gracefully, and waits for its end. May be repeated."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        child, self._child = self._child, None
        if child is not None:
            await child.stop()
            self._log.info("miniKMS stopped", pid=child.pid)
        await self._health.close()

    async def _find_or_start(self, found_s_max: float) -> bool:
        """One try: true once a daemon answers, started here or found; false with `_reason` set."""
        error = await self._ask()
        if error is None:
            self._log.info("using the miniKMS that answers")
            return True
        if isinstance(error, KmsUntrustedServerError):
            self._reason = str(error)
            return False
        if not self.spawn or not isinstance(error, KmsUnavailableError):  # absent, or present and silent
            self._log.info("waiting for miniKMS to answer")
            self._reason = f"{error}; start it, or let this server spawn one (unset PROGRESSDB_KMS_SPAWN)"
            return await self._await_answer(None, ABSENT_S_MAX)
        return await self._spawn_one(found_s_max)

    async def _spawn_one(self, found_s_max: float) -> bool:
        try:
            self._make_socket_directory()
            audit_head = await self.audit_head() if self.audit_head is not None else ""
            child = self._child = await Child.start(self.options, self._forward, audit_head=audit_head)
        except OSError as error:
            self._reason = f"miniKMS can't be started: {error.strerror}"
            return False
        finally:
            self._close_key()
        self._log.info("miniKMS spawned", pid=child.pid)
        if await self._await_answer(child, READY_S_MAX):
            return True
        await child.stop()
        self._child = None
        self._exit_status = EXIT_MISSING if await child.wait() == EXIT_MISSING else EXIT_FAILED
        if await self._await_answer(None, found_s_max):
            self._log.info("using the miniKMS of another server")
            return True
        output = " / ".join(child.last_lines) or "nothing"
        self._reason = f"the one that was spawned did not come up, and said: {output}"
        return False

    def _close_key(self) -> None:
        descriptor = self.options.master_key_fd
        if descriptor is not None:
            self.options = replace(self.options, master_key_fd=None)
            self._key_closed = True
            os.close(descriptor)

    def _make_socket_directory(self) -> None:
        """The socket's default place is inside the server's data directory, which may be new."""
        os.makedirs(os.path.dirname(os.path.abspath(self.options.socket_path)), mode=0o700, exist_ok=True)

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            since_s = loop.time()
            if self._child is None:
                await self._watch_found()
            else:
                await self._watch_child(self._child)
                self._child = None
            if self._key_closed and self.spawn:
                self._give_up()
                return
            if loop.time() - since_s >= STABLE_S:
                self._failures = 0
            while not await self._again():
                self._log.error("no miniKMS", reason=self._reason)

    async def _watch_child(self, child: Child) -> None:
        """Returns once the child has ended. One that hangs is killed."""
        ended = asyncio.get_running_loop().create_task(child.wait())
        unanswered = 0
        try:
            while unanswered < UNANSWERED_MAX:
                await asyncio.wait([ended], timeout=CHILD_POLL_S)
                if ended.done():
                    break
                error = await self._ask()
                unanswered = 0 if error is None or isinstance(error, KmsRefusedError) else unanswered + 1
            else:
                self._log.error("miniKMS hangs and is killed", pid=child.pid, reason=str(error))
                child.kill()
                await asyncio.wait([ended])
            self._log.error("miniKMS died", pid=child.pid, status=ended.result())
        finally:
            ended.cancel()

    def _give_up(self) -> None:
        reason = (
            "miniKMS has ended, and this server can't start another: it keeps no copy of the root key of "
            "PROGRESSDB_MINIKMS_MASTER_KEY; start the server again with the variable"
        )
        self._log.critical("the server stops: its key service is lost", reason=reason)
        if self.on_lost is not None:
            self.on_lost(reason)

    async def _again(self) -> bool:
        if self._failures:
            await asyncio.sleep(self._pause_s())
        self._failures += 1
        try:
            return await self._find_or_start(0.0)  # the next try finds one that starts late
        except Exception as error:  # noqa: BLE001 - without a supervisor nobody would restart miniKMS
            self._log.exception("the supervisor failed")
            self._reason = type(error).__name__
            return False

    def _pause_s(self) -> float:
        longest = min(PAUSE_S_MAX, PAUSE_S_MIN * 2.0 ** min(self._failures, 16))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret

    async def _watch_found(self) -> None:
        """Returns once the daemon that was found is gone. One that hangs or refuses is not gone; it is only logged."""
        unanswered, logged = 0, ""
        while True:
            await asyncio.sleep(WATCH_POLL_S)
            error = await self._ask()
            if isinstance(error, KmsUnavailableError):
                error = await self._ask()  # an idle connection may have been closed
            if isinstance(error, (KmsUnavailableError, KmsUntrustedServerError)):
                self._log.error("the miniKMS that was used is gone", reason=str(error))
                return
            refuses = isinstance(error, KmsRefusedError)
            unanswered = 0 if error is None or refuses else unanswered + 1
            if error is None:
                if logged:
                    self._log.info("miniKMS answers again")
                logged = ""
            elif refuses and logged != REFUSES:
                logged = REFUSES
                self._log.error(logged, reason=str(error))
            elif unanswered == UNANSWERED_MAX:
                logged = HANGS
                self._log.error(logged, reason=str(error))

    async def _ask(self) -> KmsError | None:
        """Asks for its health. The error, or None after a good answer."""
        try:
            await self._health.health()
        except KmsError as error:
            return copy.copy(error)  # without the traceback, which leads to the frame that gets it
        return None

    async def _await_answer(self, child: Child | None, wait_s_max: float) -> bool:
        """Asks until a daemon answers, `child` ends, or the time is up."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + wait_s_max
        ended = None if child is None else loop.create_task(child.wait())
        try:
            while loop.time() < until_s and (ended is None or not ended.done()):
                if await self._ask() is None:
                    return True
                await asyncio.sleep(READY_POLL_S)
        finally:
            if ended is not None:
                ended.cancel()
        return False

    def _forward(self, line: str) -> None:
        """Log a line of miniKMS's log: as its own event if it is one, else as text."""
        try:
            event = msgspec.json.decode(line, type=dict[str, Any])
            name, level = str(event.pop("event")), str(event.pop("level"))
            LEVELS[level]
        except (*UNDECODABLE, KeyError):
            if not (self._starting and line.startswith("minikms: ")):  # the error of the start has that line
                self._log.info("miniKMS", line=line)
            return
        event.pop("timestamp", None)
        self._log.log(level, name, program="minikms", **{f"minikms_{key}": value for key, value in event.items()})
