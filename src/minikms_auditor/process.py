"""The process of the auditor: start, steps, and stop.

Owns the order of the start: read the configuration and the private keys, lock and read the state directory, bind the
listener, harden the process (it has one thread until here), run. One thread runs the steps of
`minikms_auditor.auditor`, each sink has one, and one reads the log for questions; the event loop answers for those,
metrics, signals and the service manager.
Invariants: a stop waits for the step that runs, at most `STOP_SECONDS_MAX`, and for no sink; the hardened process can
write in its state directory only, in the paths that tokens need, and beside the file of a sink. It must never start a
step before the process is hardened.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import uvloop

from minikms.client import Client
from minikms.memory import SecretArena, SignalReader
from minikms.memory.process import name_thread
from minikms.platform.logs import service_logger
from minikms.processes.config_file import address
from minikms.processes.helper import HelperRun, listen_tcp, run_hardened
from minikms.processes.sockets import listen
from minikms_auditor.auditor import Auditor, Status
from minikms_auditor.collectors import Collector, SplunkCollector
from minikms_auditor.config import AuditorFiles, Config, FileSink, HttpSink, Sink, SplunkSink, SyslogSink
from minikms_auditor.metrics import AuditorCollector
from minikms_auditor.questions import QUESTION_LIMITS, QuestionApplication
from minikms_auditor.signers import Signers, open_signers
from minikms_auditor.sinks import FileTransport, Shipper, Transport
from minikms_auditor.store import AuditorStore, SinkFiles
from minikms_auditor.syslog import Syslog
from minikms_auditor.witnesses import Witnesses

STEP_SECONDS: Final = 2.0
"""Between two steps. The daemon must hear of the auditor every 5 s."""
STOP_SECONDS_MAX: Final = 20.0
ARENA_SLOTS: Final = 8
QUESTIONS_MODE: Final = 0o666
"""The mode of the socket for questions: the uid of a peer decides, not its groups."""


class AuditorSetup(NamedTuple):
    """A configuration, and what the keys and certificates that it names make."""

    config: Config
    signers: Signers
    witnesses: Witnesses
    transports: tuple[Transport, ...]


def load(files: AuditorFiles, arena: SecretArena) -> AuditorSetup:
    """Read everything but the state. Raises StartError."""
    config = files.config()
    witnesses = Witnesses(config.witness, files)
    transports = tuple(_transport(sink, files) for sink in config.sink)
    return AuditorSetup(config, open_signers(config.origin, config.signers, files, arena), witnesses, transports)


def _transport(sink: Sink, files: AuditorFiles) -> Transport:
    match sink:
        case SyslogSink():
            return Syslog(sink, files)
        case HttpSink():
            return Collector(sink, files)
        case SplunkSink():
            return SplunkCollector(sink, files)
        case FileSink():
            return FileTransport(sink)


def run(config_path: Path, log_format: str, *, require_hardening: bool) -> None:
    """Run until SIGTERM, SIGINT or SIGQUIT. Raises StartError, saying why it can't start and what to do."""
    log = service_logger(log_format)
    files = AuditorFiles(config_path)
    with ExitStack() as cleaning:
        arena = cleaning.enter_context(SecretArena(ARENA_SLOTS))
        config, signers, witnesses, transports = load(files, arena)
        cleaning.callback(signers.close)
        cleaning.callback(witnesses.close)
        store = AuditorStore(config.state_dir, config.origin)
        cleaning.callback(store.close)
        signals = cleaning.enter_context(SignalReader())
        listener = cleaning.enter_context(listen_tcp(*address(config.metrics))) if config.metrics else None
        questions = None
        if config.questions is not None:
            questions = cleaning.enter_context(listen(config.questions.socket, {}, mode=QUESTIONS_MODE)).socket
        write = [config.state_dir, *config.token_paths, *(path for each in transports for path in each.write_paths)]
        network = config.uses_network
        run = run_hardened(
            log, signals, arena, read=[config.log_dir], write=write, network=network, require=require_hardening
        )
        client = Client(Path(config.kms_socket), server_uids=config.kms_server_uids)
        cleaning.callback(client.close)
        stopping = threading.Event()

        def warn(event: str, text: str) -> None:
            log.warning(event, why=text)

        sinks = [
            Shipper(sink, transport, SinkFiles(config.state_dir, sink.name), store, config.log_dir, log=warn)
            for sink, transport in zip(config.sink, transports, strict=True)
        ]
        auditor = Auditor(
            config, store, signers, witnesses, client, log=warn, sinks=sinks, stopping=stopping.is_set
        )  # fmt: skip
        cleaning.callback(auditor.close)
        log.info(
            "running", origin=config.origin, size=store.state.size, vkeys=[key.text() for key in signers.verifiers]
        )
        process = _AuditorProcess(auditor, sinks, stopping=stopping, listener=listener, run=run)
        if config.questions is not None and questions is not None:
            process.questions = (
                questions,
                QuestionApplication(
                    config, config.questions, auditor, status=process.status, stopping=stopping.is_set, log=log
                ),
            )
        uvloop.run(process.serve())


@dataclass(eq=False, repr=False)
class _AuditorProcess:
    """One run. Used in the loop's thread."""

    auditor: Auditor
    sinks: Sequence[Shipper]
    stopping: threading.Event
    listener: socket.socket | None
    run: HelperRun

    def __post_init__(self) -> None:
        self._status = self.auditor.status()
        self.questions: tuple[socket.socket, QuestionApplication] | None = None
        """Its listener, and what answers questions, if they are configured."""

    def status(self) -> Status:
        """The status that the last step wrote."""
        return self._status

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        self.run.read_signals()
        steps = threading.Thread(target=self._work, args=("steps", self._run_steps), daemon=True)
        collector = AuditorCollector(self.status)
        async with AsyncExitStack() as served:
            metrics = self.run.metrics(self.listener, collector, "minikms_auditor_build_info")
            await served.enter_async_context(metrics)
            if self.questions is not None:
                served.callback(self.questions[1].close)
                await served.enter_async_context(self.run.serving(*self.questions, QUESTION_LIMITS))
            steps.start()
            for number, sink in enumerate(self.sinks):  # a stop does not wait for them: they may be killed at any time
                ship = partial(sink.run, self.stopping)
                threading.Thread(target=self._work, args=(f"sink {number + 1}", ship), daemon=True).start()
            watchdog = asyncio.ensure_future(self.run.watchdog())
            await self.run.until_stopped(f"tree of {self._status.size} leaves")
            self.stopping.set()
        await loop.run_in_executor(None, steps.join, STOP_SECONDS_MAX)
        watchdog.cancel()
        self.run.log.info("stopped", why=self.run.why)

    def _work(self, name: str, work: Callable[[], None]) -> None:
        """A thread. A defect ends the process: the service manager starts it again."""
        name_thread(name)
        try:
            work()
        except BaseException as error:  # noqa: BLE001  a thread must not end unseen
            self.run.internal_error(f"{type(error).__name__} in the thread {name!r}")
            os._exit(1)

    def _run_steps(self) -> None:
        while not self.stopping.is_set():
            self.auditor.step()
            self._status = self.auditor.status()
            self.stopping.wait(STEP_SECONDS)
