"""`minikms-unlock serve`: gives the root key to the key service once, and ends (docs/spec/unlock.md).

Owns: the process that the service manager starts for a question at its socket; who may ask; its time limits; what
hardening each provider leaves. Invariants: only the configured user gets an answer; the provider is asked for every
answer; the root key goes from the arena to the socket, after the pin was compared. A provider's library may leave
copies of the key in memory as Python `bytes`, which die with the process: so it ends after one answer, and no child of
it is left. What is wrong with the configuration is an answer too: a process that ended without one would be started
again at once, and without an end. It must never answer from anything that it keeps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Final, NamedTuple

from minikms.api.errors import StartError
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD
from minikms.memory import SecretArena, harden
from minikms.platform.activation import passed_socket
from minikms.platform.logs import Log, service_logger
from minikms.processes.handover import (
    AWAY,
    KEY,
    QUESTION_BYTES_MAX,
    QUESTION_SECONDS_MAX,
    REFUSED,
    Question,
    parse_question,
    sentence,
)
from minikms.processes.peer import read_peer
from minikms_tokens import AwayError, TokenError, UnwrapRefusedError
from minikms_tokens.wrapping import PROVIDER_SECONDS_MAX, ProviderCalls
from minikms_unlock.files import Config, read_config, unwrap_into

IDLE_SECONDS_MAX: Final = 5.0
"""How long it waits for a whole question, whoever connects meanwhile."""
FETCH_SECONDS_MAX: Final = PROVIDER_SECONDS_MAX + 1
"""For all that it does to answer. The rest of `minikms.processes.handover.ANSWER_SECONDS_MAX` is for its own start."""
SEND_SECONDS_MAX: Final = 1.0
_NO_CONFIGURATION: Final = "the unlock service can't use its configuration; its log says why"
_NETWORK: Final = frozenset(("aws-kms", "clevis", "pkcs11", "vault-transit"))
_PROGRAMS: Final = frozenset(("clevis", "tpm2"))
_WRITES: Final = frozenset(("clevis", "pkcs11", "tpm2"))
"""What providers need, by the scheme of the source: a PKCS#11 module may use any file, device or host. The unit
restricts what stays open here."""


class _Fetch(ProviderCalls):
    seconds_max = FETCH_SECONDS_MAX


class Asked(NamedTuple):
    """A connection of the key service, and its question."""

    connection: socket.socket
    question: Question


def serve(config_path: Path, log_format: str) -> int:
    """Answers one question; the exit status. Raises StartError without a passed socket."""
    log = service_logger(log_format)
    listener = passed_socket(os.environ)
    if listener is None:
        raise StartError(
            "`minikms-unlock serve` is started by its socket: systemctl enable --now minikms-unlock.socket"
        )
    config, uid = None, None
    try:
        settings = read_config(config_path)
        config, uid = settings, settings.uid
    except StartError as error:
        log.warning("configuration refused", why=str(error))
    scheme = "" if config is None else config.source.partition(":")[0]
    with listener, SecretArena(1) as arena:
        measures = harden(
            arena,
            read=["/"],
            write=["/"] if scheme in _WRITES else [],
            allow_exec=scheme in _PROGRAMS,
            allow_network=scheme in _NETWORK,
        )
        for measure in measures:
            if not measure.in_force:
                log.warning("hardening measure not in force", measure=measure.name, why=measure.why)
        question = _asked(listener, uid, log)
        if question is None:
            log.info("nobody asked")
            return EXIT_GOOD
        with question.connection:
            return _answer(question, config, arena, log)


def _asked(listener: socket.socket, uid: int | None, log: Log) -> Asked | None:
    """The first whole question of the user `uid`; None if there was none in time. Without `uid` anybody's: the answer
    has no key then.
    """
    deadline = time.monotonic() + IDLE_SECONDS_MAX
    refused: set[int] = set()
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        peer = read_peer(connection).uid
        if uid is not None and peer != uid:
            connection.close()
            if peer not in refused:
                log.warning("peer refused", uid=peer)
            refused.add(peer)
            continue
        question = _question(connection, min(deadline, time.monotonic() + QUESTION_SECONDS_MAX))
        if question is not None:
            return Asked(connection, question)
        connection.close()
        log.warning("no question", uid=peer)
    return None


def _question(connection: socket.socket, deadline: float) -> Question | None:
    data = b""
    while b"\n" not in data and len(data) <= QUESTION_BYTES_MAX:
        left = deadline - time.monotonic()
        try:
            connection.settimeout(max(left, 0.001))
            part = connection.recv(QUESTION_BYTES_MAX + 1 - len(data)) if left > 0 else b""
        except OSError:
            return None
        if not part:
            return None
        data += part
    return parse_question(data)


def _answer(request: Asked, config: Config | None, arena: SecretArena, log: Log) -> int:
    connection, question = request
    log = log.bind(purpose=question.purpose, keyring_id=question.keyring_id)
    key = arena.allocate()  # the arena zeroes it, also while a provider that is late has its view
    kind, why = AWAY, _NO_CONFIGURATION
    if config is not None:
        kind, why = _fetched(config, question.keyring_id, key.view)
    try:
        connection.settimeout(SEND_SECONDS_MAX)
        connection.sendall(kind)
        connection.sendall(key.view if kind == KEY else sentence(why))
    except OSError as error:
        log.warning("the key service has left before the answer", why=error.strerror or "it reads too slowly")
        return EXIT_FAILED
    if kind == KEY:
        log.info("root key given")
        return EXIT_GOOD
    log.error("no root key given", answer="refused" if kind == REFUSED else "away", why=why)
    return EXIT_FAILED


def _fetched(config: Config, keyring_id: str, into: memoryview) -> tuple[bytes, str]:
    """The kind of the answer, and why there is no key. After FETCH_SECONDS_MAX it is AWAY, whatever still runs."""

    def fetch() -> None:
        try:
            unwrap_into(config, keyring_id, into)
        except StartError as error:
            raise AwayError(str(error)) from None

    try:
        _Fetch("the provider").call(fetch)
    except TokenError as error:
        _kill_children()
        return REFUSED if isinstance(error, UnwrapRefusedError) else AWAY, str(error)
    return KEY, ""


def _kill_children() -> None:
    """Each with its process group: a provider's programs have groups of their own."""
    for tasks in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # of a thread that ends meanwhile
            for pid in tasks.read_text("ascii").split():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(pid), signal.SIGKILL)
