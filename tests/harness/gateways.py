"""A real `minikms-gateway` process beside a real daemon, under users of their own.

Owns: the files of both, the start, and requests over TLS with a certificate or a token. Invariants: the gateway is the
command that an operator types, under a user of its own; the daemon has one with `daemon_uid`. It asserts nothing about
the answers.
"""

import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests import needs
from tests.harness.callers import WAIT_S, Caller, PolicyDaemon
from tests.harness.certificates import SERVER, Authority, Issued, replace
from tests.harness.forked import Forked
from tests.harness.ports import free_ports
from tests.harness.waiting import wait_until

GATEWAY, DAEMON = 45_690, 45_689
"""The uid of the gateway, and of a daemon that does not run as root; they belong to nobody on the machine."""
HOST = "gateway.internal"
POLICY = f"""
[[grant]]
name = "operator"
principals = ["uid:0"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor", "rotate", "destroy", "unseal"]
threads = ["*"]
[[grant]]
name = "remote"
principals = ["spiffe://prod/**", "dns:api.chat.internal", "oidc:https://issuer.example|*"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor"]
threads = ["*"]
[[proxy]]
name = "gateway"
principals = ["uid:{GATEWAY}"]
on_behalf_of = ["spiffe://prod/**", "dns:*.chat.internal", "oidc:https://issuer.example|*"]
"""


class Gateway:
    """Certificates, configuration and process, in `base`/gateway. Files are replaced by `replace`."""

    def __init__(
        self,
        base: Path,
        kms_socket: Path,
        *,
        kms_uid: int = 0,
        tables: str = "",
        files: Mapping[str, bytes] | None = None,
        crl: bool = False,
        cas: bool = True,
        under: Sequence[str] = (),
        forked: bool = True,
    ) -> None:
        """`tables` are added to the configuration, and name `files`. `crl`: the CA has a file of revocation lists.
        `under`: a program that runs it as root, instead of its own user. `forked`: by `tests.harness.forked`, unless
        `under` is given.
        """
        self._under = list(under)
        self._forked = forked and not under
        self._uid = 0 if under else GATEWAY
        needs.interpreter_for(self._uid)
        self.directory = base / "gateway"
        self.directory.mkdir(mode=0o755)
        self.log = base / "gateway.log"
        self.root = Authority("test root")
        self.authority = self.root.below("test issuing CA")
        self.port, self.metrics_port = free_ports(2)
        self.own = self.authority.issue(dns=[HOST, "localhost"], extended=[SERVER])
        self.write("server.pem", self.own.chain)
        self.write("server.key", self.own.key, private=True)
        self.write("clients.pem", self.root.pem)
        table = ""
        if cas:
            table = '[[client_ca]]\nfile = "clients.pem"\ntrust_domains = ["prod"]\ndns_suffixes = ["chat.internal"]\n'
        if crl:
            self.revoke()
            table += 'crl = "clients.crl"\n'
        for name, content in (files or {}).items():
            self.write(name, content)
        self.config = self.directory / "gateway.toml"
        self.configure(
            f'version = 1\nlisten = "127.0.0.1:{self.port}"\nmetrics = "127.0.0.1:{self.metrics_port}"\n'
            f'kms_socket = "{kms_socket}"\nkms_server_uids = [{kms_uid}]\n'
            f'[tls]\ncert = "server.pem"\nkey = "server.key"\n{table}{tables}'
        )
        self.ca_file = base / "server-ca.pem"
        self.ca_file.write_bytes(self.root.pem)
        self.process: Forked | subprocess.Popen[bytes] | None = None

    # --- files ------------------------------------------------------------------------------------------------------

    def write(self, name: str, content: bytes, *, private: bool = False) -> None:
        replace(self.directory / name, content, 0o640 if private else 0o644, self._uid)

    def configure(self, text: str) -> None:
        self.write("gateway.toml", text.encode())

    def revoke(self, *revoked: Issued, **how: Any) -> None:
        """New revocation lists: of the root, and of the issuing CA."""
        self.write("clients.crl", self.root.crl() + self.authority.crl(*revoked, **how))

    # --- process ----------------------------------------------------------------------------------------------------

    def command(self, *words: str) -> list[str]:
        setpriv = [needs.program("setpriv"), f"--reuid={GATEWAY}", f"--regid={GATEWAY}", "--clear-groups"]
        return [
            *(self._under or setpriv),
            sys.executable,
            "-P",
            "-m",
            "minikms_gateway",
            *words,
            "--config",
            str(self.config),
        ]

    def start(self) -> Self:
        with self.log.open("ab") as log:
            if self._forked:
                words = ["minikms_gateway", "--config", str(self.config)]
                user = (GATEWAY, GATEWAY, ())
                self.process = Forked(words, None, log.fileno(), log.fileno(), cwd="/", user=user)
            else:
                self.process = subprocess.Popen(self.command(), cwd="/", stdout=log, stderr=log)
        wait_until(self._lives)
        return self

    def _lives(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), WAIT_S):
            return self.process is not None and "serving" in self.log.read_text()
        return False

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(WAIT_S) == 0, self.log.read_text()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    # --- requests ---------------------------------------------------------------------------------------------------

    def connect(self, shown: Issued | None = None, **how: Any) -> ssl.SSLSocket:
        """A TLS connection, with a client certificate if one is given. `how`: attributes of the context."""
        context = ssl.create_default_context(cafile=self.ca_file)
        for name, value in how.items():
            setattr(context, name, value)
        if shown is not None:
            cert, key = shown.write(self.ca_file.parent, f"client-{os.getpid()}")
            context.load_cert_chain(cert, key)
        sock = socket.create_connection(("127.0.0.1", self.port), WAIT_S)
        try:
            return context.wrap_socket(sock, server_hostname=HOST)
        except BaseException:
            sock.close()
            raise

    @contextlib.contextmanager
    def caller(self, shown: Issued | None = None) -> Any:
        with contextlib.closing(Caller(self.connect(shown))) as caller:
            yield caller

    def page(self) -> str:
        with socket.create_connection(("127.0.0.1", self.metrics_port), WAIT_S) as sock:
            caller = Caller(sock)
            return str(caller.get("/metrics").body.decode())

    def metric(self, name: str, **labels: str) -> float:
        wanted = ",".join(f'{label}="{value}"' for label, value in labels.items())
        line = re.compile(
            rf"^minikms_gateway_{name}{re.escape(f'{{{wanted}}}' if wanted else '')} (\S+)$", re.MULTILINE
        )
        match = line.search(self.page())
        assert match is not None, (name, labels)
        return float(match[1])

    def refused(self, reason: str) -> int:
        """How many were refused for this reason, by the metrics."""
        return int(self.metric("refused_total", reason=reason))

    def logged(self) -> list[str]:
        return re.findall(r"event=refused .*?reason=(\w+)", self.log.read_text())


class Pair:
    """A daemon under a policy, and a gateway before it, in a directory that every user reaches."""

    def __init__(self, *, policy: str = POLICY, daemon_uid: int = 0, **how: Any) -> None:
        needs.interpreter_for(GATEWAY)
        with contextlib.ExitStack() as started:
            base = Path(started.enter_context(tempfile.TemporaryDirectory(prefix="minikms-test-")))
            self.daemon = started.enter_context(PolicyDaemon(base, policy, uid=daemon_uid))
            self.gateway = started.enter_context(Gateway(base, self.daemon.socket, kms_uid=daemon_uid, **how))
            self._started = started.pop_all()

    def client(self, *, uri: str = "spiffe://prod/chat/api") -> Issued:
        return self.gateway.authority.issue(uris=[uri])

    def audited(self) -> list[dict[str, Any]]:
        *lines, _ = (self.daemon.data_dir / "minikms-audit.log").read_text().split("\n")
        return [json.loads(line)["event"] for line in lines]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()
