"""The log: the form of its lines, and a writer that never waits."""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys

import pytest

from minikms.platform import logs
from tests import needs

CONFIGURED = "from progressdb_server.logs import *; configure('json', 'info')"


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.parametrize("module", ["minikms_daemon.serve", "progressdb_server.server"])
def test_neither_daemon_nor_server_imports_rich(module: str) -> None:
    program = f"import sys, {module}; print([name for name in sys.modules if name.partition('.')[0] == 'rich'])"
    assert run(program).stdout == "[]\n"


@pytest.mark.parametrize("begin", ["from minikms.platform.logs import *; service_logger('json')", CONFIGURED])
def test_a_service_with_a_closed_standard_error_starts(begin: str) -> None:
    program = f"{begin}\nfrom minikms.platform.logs import Log\nLog().warning('x')\nprint('ran')"
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout == "ran\n"


@pytest.mark.parametrize("module", ["minikms.platform.logs", "progressdb_server.logs"])
def test_a_log_of_text_cannot_command_the_terminal(module: str) -> None:
    """A peer chose the value: a witness, an issuer, a database."""
    program = f"""
from {module} import *
from minikms.platform.logs import Log
service_logger("text") if {module!r} == "minikms.platform.logs" else configure("console", "info")
Log().warning("failed", why="\\x1b[2J \\x9b31m \\r all is well")
"""
    log = run(program).stderr
    assert "?[2J ?31m ? all is well" in log
    assert log.rstrip("\n").isprintable()


def test_a_traceback_in_the_servers_log_shows_no_values_of_variables() -> None:
    program = """
from progressdb_server import logs
logs.configure("console", "info")
def fail():
    held = "zx9-" + "secret"
    return 1 // (held == "")
try:
    fail()
except ZeroDivisionError:
    logs.Log().exception("broken")
"""
    log = run(program).stderr
    assert log.count("\n") == 1
    assert "event=broken" in log
    assert "ZeroDivisionError" in log
    assert "zx9-secret" not in log


VALUES = {"text": 'a "b" = ö\x1b\n', "none": None, "yes": True, "ms": 0.5, "list": ["a", 2], "id": 2**63}
FORMS = {
    "json": r"""{"started_at": 7, "text": "a \"b\" = \u00f6\u001b\n", "none": null, "yes": true, "ms": 0.5, """
    r""""list": ["a", 2], "id": 9223372036854775808, "event": "it ran", "level": "warning", "timestamp": "T"}""",
    "logfmt": r"""timestamp=T level=warning event="it ran" started_at=7 text="a \"b\" = ö??" none= yes ms=0.5 """
    r"""list="['a', 2]" id=9223372036854775808""",
}


def line(log_format: str, **values: object) -> str:
    stream = io.StringIO()
    previous = logs.set_output(logs.Output("debug", print))
    logs.log_to(stream, log_format)
    try:
        logs.Log(started_at=7).warning("it ran", **values)
    finally:
        logs.set_output(previous)
    return stream.getvalue()


@pytest.mark.parametrize("log_format", FORMS)
def test_a_line_has_this_form(log_format: str) -> None:
    """What programs that read logs rely on."""
    assert re.sub(r"2\d{3}-[-0-9T:.]+Z", "T", line(log_format, **VALUES)) == FORMS[log_format] + "\n"


@pytest.mark.parametrize("log_format", FORMS)
@pytest.mark.parametrize(
    "values",
    [
        {"why": "\U0001f600" * 100_000},
        {f"n{number}": "\x00" * 900 for number in range(300)},
        {"\x00" * 90_000: ["\x00" * 9] * 90_000},
    ],
    ids=["long", "many", "name"],
)
def test_a_line_has_a_bound_whatever_its_texts_are(log_format: str, values: dict[str, object]) -> None:
    text = line(log_format, **values)
    assert len(text) <= logs.LINE_CHARS_MAX
    assert "it ran" in text
    if log_format == "json":
        assert json.loads(text)["level"] == "warning"


@pytest.mark.parametrize("log_format", FORMS)
def test_the_content_of_a_buffer_is_never_written(log_format: str) -> None:
    key = b"zx9-secret"
    assert "zx9" not in line(log_format, a=key, b=bytearray(key), c=[memoryview(key), {"d": key}])


LINES_COUNT = 20_000
LOGGERS = {
    "a service, as text": "logs.service_logger('text')",
    "a service, as JSON": "logs.service_logger('json')",
    "the message server": "(server_logs.configure('console', 'info'), logs.Log())[1]",
}


@pytest.mark.parametrize("logger", LOGGERS)
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_log_that_nobody_reads_holds_nothing_back(logger: str, kind: str) -> None:
    """Lines are dropped whole, and counted by the first line that fits again."""
    program = f"""
from minikms.platform import logs
from progressdb_server import logs as server_logs
log = {LOGGERS[logger]}
for number in range({LINES_COUNT}):
    log.info("line", number=number)
print("done", flush=True)
input()
log.info("last")
"""
    reader, writer = socket.socketpair()
    with reader, writer, contextlib.ExitStack() as stack:
        errors = subprocess.PIPE if kind == "pipe" else writer.fileno()
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        )
        writer.close()
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        stream = process.stderr or stack.enter_context(reader.makefile("rb"))
        first = stream.readline()
        process.stdin.write(b"\n")
        process.stdin.close()
        lines = [first, *stream]
    [count] = [int(found[1]) for line in lines if (found := re.search(rb"lines dropped.*count\W+(\d+)", line))]
    assert b"last" in lines[-1]
    assert len([line for line in lines if b"number" in line]) == LINES_COUNT - count


def test_a_log_whose_reader_has_gone_raises_nothing() -> None:
    program = (
        "import os; from minikms.platform import logs; log = logs.service_logger('text'); os.read(0, 1); log.info('x')"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stderr.close()
        process.stdin.close()
        assert process.wait(60) == 0


def writes_without_waiting(descriptor: int) -> bool:
    try:
        return os.pwritev(descriptor, [b"x"], -1, os.RWF_NOWAIT) == 1
    except OSError:
        return False


def test_a_log_does_not_wait_if_another_process_has_filled_its_pipe() -> None:
    """It takes the room between the question and the write. Without RWF_NOWAIT the write would never end."""
    program = """
import os, select
class Full:
    def register(self, *_): pass
    def poll(self, _):
        try:
            while True: os.write(other, bytes(select.PIPE_BUF))
        except BlockingIOError: return [(2, select.POLLOUT)]
from minikms.platform import logs
select.poll = Full
other = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK)
logs.service_logger("text").info("x")
print("done")
"""
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"):
        needs.linux("6.4", writes_without_waiting(writer))
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, timeout=60, check=True
        )
    assert done.stdout == b"done\n"


def test_a_line_longer_than_a_pipe_takes_at_once_is_written() -> None:
    written = run(f"from minikms.platform import logs; logs.service_logger('text').info('x' * {LINES_COUNT})").stderr
    assert "x" * LINES_COUNT in written


UNHANDLED = {
    "exception in a thread": "threading.Thread(target=fail).start()",
    "exception in a finalizer": "type('Finalized', (), {'__del__': lambda self: fail()})()",
    "Task exception was never retrieved": "asyncio.run(leave(task()))",
    "Exception in callback fail": "call(asyncio.new_event_loop)",
    "Exception in callback": "call(uvloop.new_event_loop)",
    "exception": "fail()",
}


@pytest.mark.parametrize("event", UNHANDLED)
def test_an_exception_that_nothing_handles_is_a_line_without_values(event: str) -> None:
    """Also its own text may be a value: that of a KeyError is the key."""
    program = f"""
import asyncio, threading, uvloop
from minikms.platform import logs
def fail(*_):
    raise KeyError("zx9-secret")
async def task():
    fail()
async def leave(work):
    asyncio.ensure_future(work)
    await asyncio.sleep(0)
def call(new_loop):
    async def soon():
        asyncio.get_running_loop().call_soon(fail, "zx9-argument")
        await asyncio.sleep(0)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(soon())
logs.service_logger("json")
{UNHANDLED[event]}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    [text] = done.stderr.splitlines()
    values = json.loads(text)
    assert (values["level"], values["error"]) == ("critical", "KeyError")
    assert values["event"] == event
    assert re.search(r"__main__:\d+$", values["at"])
    assert "zx9" not in text


def test_a_line_that_is_logged_while_its_thread_writes_one_comes_after_it() -> None:
    """A signal handler or a finalizer logs in the middle of a write."""
    program = """
import os
from minikms.platform import logs
write = os.write
def interrupted(descriptor, part):
    os.write = write
    log.info("second")
    return write(descriptor, part)
log = logs.service_logger("text")
os.write = interrupted
del os.RWF_NOWAIT
log = logs.service_logger("text")
log.info("first")
log.info("third")
"""
    events = re.findall(r"event=(\w+)", run(program).stderr)
    assert events == ["first", "second", "third"]
