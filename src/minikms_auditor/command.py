"""The command `minikms-auditor`.

Owns: its subcommands and flags, and the sentence for each error. Invariants: results go to standard output, everything
else to standard error; what `check-config` accepts, a start accepts too, but for its sockets and its state; only
`accept-log` and `skip` write, and only the list of accepted keys or of skipped lines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from minikms.commands.usage import (
    EXIT_FAILED,
    EXIT_GOOD,
    EXIT_MISSING,
    LogFormat,
    Parameter,
    RequireHardening,
    new_helper,
    run_service,
)

if TYPE_CHECKING:
    from minikms_auditor.auditor import Status
    from minikms_auditor.config import Sink

app = new_helper(
    "minikms-auditor",
    "Makes the audit log into a tree that witnesses cosign. Without a command it runs.",
    "Exit status: 0 done, 1 something is wrong or was refused, 2 wrong usage, or something is missing.",
)
FRESH_SECONDS: Final = 15
"""A process that runs writes its status more often: a round of witnesses takes 10 s."""
FREE_BYTES_MIN: Final = 16 * 1024 * 1024
"""The free space that the file system of the state directory needs: more than one step writes."""

Config = Annotated[Path, Parameter(name="--config", help="The configuration, a TOML file.")]
Json = Annotated[bool, Parameter(name="--json", help="One JSON object instead of text.", negative=())]


@app.default
def run(*, config: Config, log_format: LogFormat = "console", require_hardening: RequireHardening = False) -> int:
    """Run until SIGTERM."""
    from minikms_auditor import process

    process.run(config, log_format, require_hardening=require_hardening)
    return EXIT_GOOD


@app.command(name="check-config")
def check_config(*, config: Config) -> int:
    """Read the configuration and the keys that it names, as a start does, and show the log's verifier keys."""
    from minikms.memory import SecretArena
    from minikms_auditor.config import AuditorFiles
    from minikms_auditor.process import ARENA_SLOTS, load

    with SecretArena(ARENA_SLOTS) as arena:
        settings, signers, witnesses, _ = load(AuditorFiles(config), arena)
        vkeys = [key.text() for key in signers.verifiers]
        signers.close()
    print(f"{config}: valid; a quorum of {settings.quorum} of {len(witnesses.clients)} witnesses")
    for vkey in vkeys:
        print(f"  log key  {vkey}")
    if any(uri.startswith("pkcs11:") for uri in settings.signers):
        print("  signer   token_paths must name the PKCS#11 library's configuration, its tokens, and the PIN file")
    if not os.path.isdir(settings.log_dir):
        print(f"  log_dir  {settings.log_dir} is not there yet")
    for sink in settings.sink:
        print(f"  sink     {sink.name}: {sink.format}{', required' if sink.required else ''}; {_receiver_must(sink)}")
    return EXIT_GOOD


@app.command
def status(*, config: Config, json: Json = False) -> int:
    """Show how far the tree and its witnesses are, and what is wrong. Exit status: 0 all is well, 1 something is wrong,
    2 the auditor never ran.
    """
    import msgspec

    from minikms.commands.output import print_result
    from minikms_auditor.config import AuditorFiles

    state_dir = AuditorFiles(config).config().state_dir
    state = _status_of(state_dir)
    age_s = int(time.time()) - state.updated_at
    state = msgspec.structs.replace(state, errors=(*_unseen(state_dir, age_s), *state.errors))
    print_result(state, _status_lines(state, age_s), json=json)
    return EXIT_FAILED if state.alarm or state.problems else EXIT_GOOD


@app.command
def checkpoint(*, config: Config) -> int:
    """Print the newest tree checkpoint that a quorum has cosigned: a signed note."""
    from minikms.api.errors import StartError
    from minikms_auditor import store
    from minikms_auditor.config import AuditorFiles

    content = store.published(AuditorFiles(config).config().state_dir)
    if content is None:
        raise StartError("no tree checkpoint has been published yet")
    print(content.decode(), end="")
    return EXIT_GOOD


@app.command
def prove(
    line: Annotated[int, Parameter(help="The number of the line, `seq`.")],
    *,
    config: Config,
    log: Annotated[str, Parameter(name="--log", help="The id of the log, if not the newest.")] = "",
) -> int:
    """Print a line of the log with the proof that it is under the newest tree checkpoint, as `minikms audit export`."""
    import msgspec

    from minikms.api.errors import StartError
    from minikms.audit.export import NotInTreeError, open_tree
    from minikms.audit.reader import line_of
    from minikms_auditor.config import AuditorFiles
    from minikms_auditor.store import TREE_NAME

    settings = AuditorFiles(config).config()
    prover = open_tree(Path(settings.state_dir) / TREE_NAME)
    content = line_of(settings.log_dir, line)
    if content is None:
        raise StartError(f"the log in {settings.log_dir} has no line {line}")
    try:
        proven = prover.prove(log or prover.newest_log, line, content)
    except NotInTreeError as error:
        raise StartError(str(error)) from None
    print(msgspec.json.encode(proven).decode())
    return EXIT_GOOD


@app.command(name="accept-log")
def accept_log(
    public_key: Annotated[str, Parameter(help="The public key that the log begins with, in base64.")] = "",
    *,
    config: Config,
) -> int:
    """Let the tree go on with a log that begins with another public key than those that are known.

    Without a key it shows the one that the auditor waits for. Compare it with the one that `minikms audit verify` or
    the start of the daemon shows, and give it then. Exit status: 0 accepted, 1 a key waits, 2 none does.
    """
    from minikms.api.base64 import decode_exact
    from minikms.api.errors import StartError
    from minikms.audit.chain import PUBLIC_KEY_BYTES
    from minikms_auditor import store
    from minikms_auditor.config import AuditorFiles

    state_dir = AuditorFiles(config).config().state_dir
    if not public_key:
        return _show_pending(state_dir)
    key = decode_exact(public_key, PUBLIC_KEY_BYTES)
    if key is None:
        raise StartError("a public key is 32 bytes in base64: 44 characters")
    status = _shown(state_dir)
    pending = status.pending if status is not None else None
    store.accept_key(state_dir, key)
    waits = pending is not None and pending.public_key == key
    then = "The auditor goes on within seconds." if waits else "No log that begins with it waits now."
    print(f"A log may begin with {public_key}. {then}")
    return EXIT_GOOD


@app.command
def skip(
    line: Annotated[int, Parameter(help="The number of the line that a sink waits at.")], *, config: Config
) -> int:
    """Let the sinks that wait at a line go on without it. It is kept in their files `rejected`.

    Exit status: 0 done, 1 no sink waits there, 2 the auditor never ran.
    """
    from minikms_auditor import store
    from minikms_auditor.config import AuditorFiles

    state_dir = AuditorFiles(config).config().state_dir
    waiting = {sink.name: sink.waits_log_id for sink in _status_of(state_dir).sinks if sink.waits_at == line > 0}
    if not waiting:
        print(f"No sink waits at line {line}.")
        return EXIT_FAILED
    for log_id in sorted(set(waiting.values())):
        store.skip_line(state_dir, log_id, line)
    print(f"Line {line} is skipped by {', '.join(waiting)}, which go on within seconds.")
    return EXIT_GOOD


def main() -> None:
    """Runs the command line and ends the process."""
    run_service(app)


def _shown(state_dir: str) -> Status | None:
    """The status of the last step; None if the auditor never ran."""
    import msgspec

    from minikms_auditor import store
    from minikms_auditor.auditor import Status

    content = store.shown(state_dir)
    return None if content is None else msgspec.json.decode(content, type=Status)


def _status_of(state_dir: str) -> Status:
    from minikms.api.errors import StartError

    status = _shown(state_dir)
    if status is None:
        raise StartError("the auditor has not run with this configuration yet")
    return status


def _show_pending(state_dir: str) -> int:
    from minikms.api.base64 import encode_text

    status = _shown(state_dir)
    pending = status.pending if status is not None else None
    if pending is None:
        print("No log waits to be accepted.")
        return EXIT_MISSING
    print(f"The log {pending.log_id} begins with the public key {encode_text(pending.public_key)}.")
    print(f"To accept it: minikms-auditor accept-log {encode_text(pending.public_key)} --config FILE")
    return EXIT_FAILED


def _receiver_must(sink: Sink) -> str:
    from minikms.audit.ocsf import EVENT_BYTES_MAX
    from minikms_auditor.config import FileSink

    if isinstance(sink, FileSink):
        return f"the directory {Path(sink.path).parent} must be there"
    warning = "" if sink.has_tls else ", without TLS"
    return f"its receiver must take messages of {EVENT_BYTES_MAX >> 20} MiB{warning}"


def _unseen(state_dir: str, age_s: int) -> Iterator[str]:
    """What the auditor can't write into its status: that it does not run, or that its disk is full."""
    from minikms.commands.output import byte_count
    from minikms.platform.directory_lock import is_owned

    if not is_owned(state_dir):
        yield "process: the auditor does not run"
    elif not 0 <= age_s <= FRESH_SECONDS:
        yield f"process: the auditor has written no status for {age_s} s"
    disk = os.statvfs(state_dir)
    free = disk.f_bavail * disk.f_frsize
    if free < FREE_BYTES_MIN:
        yield f"disk: {byte_count(free)} are free in {state_dir}"


def _status_lines(status: Status, age_s: int) -> Iterator[str]:
    from minikms.commands.output import counted
    from minikms_auditor.store import REJECTED_NAME, SINKS_NAME

    if status.alarm:
        yield f"STOPPED: {status.alarm}"
    for problem in status.problems:
        yield f"FAILS: {problem}"
    yield f"  as of      {_time(status.updated_at)}, {age_s} s ago"
    yield f"  origin     {status.origin}"
    for vkey in status.vkeys:
        yield f"  log key    {vkey}"
    yield f"  tree       {status.size} leaves; {status.published_size} under the published tree checkpoint"
    position = f"line {status.position_seq} of {status.durable_seq}, {status.lag_lines} to come"
    yield f"  log        {status.log_id}; {position}"
    if status.quorum:
        at = _time(status.witnessed_at) if status.witnessed_at else "never"
        yield f"  cosigned   by {status.quorum} of {len(status.witnesses)} witnesses, last {at}"
    else:
        yield "  cosigned   by nobody: no witness is configured"
    for sink in status.sinks:
        at = f"last {_time(sink.delivered_at)}" if sink.delivered_at else "nothing sent since the start"
        failures = counted(sink.failures, "failure")
        yield f"  sink       {sink.name}: line {sink.seq}, {sink.lag_lines} to come, {at}, {failures}"
        if sink.rejected:
            rejected = counted(sink.rejected, "line")
            yield f"             {rejected} rejected: {SINKS_NAME}/{sink.name}/{REJECTED_NAME}"
    for witness in status.witnesses:
        state = witness.error or (f"last {_time(witness.cosigned_at)}" if witness.cosigned_at else "not asked yet")
        yield f"  witness    {witness.name}: {state}"


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
