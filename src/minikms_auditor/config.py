"""The configuration file of the auditor.

Owns: the format of `auditor.toml` (docs/spec/tree.md), and what its values may be. Invariant: a member that is unknown
or of another type is refused. It must never open a socket.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
from pathlib import Path
from typing import Final, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec

from minikms import api
from minikms.api.base64 import decode_exact
from minikms.api.errors import StartError
from minikms.audit.chain import PUBLIC_KEY_BYTES
from minikms.audit.note import TYPE_COSIGNATURE, VerifierKey, is_name, parse_vkey
from minikms.processes.config_file import ConfigFiles, Uid, check_metrics, check_socket, parse_toml

WITNESSES_COUNT_MAX: Final = 16
SIGNERS_COUNT_MAX: Final = 2
RESUBMIT_SECONDS: Final = 300
RESUBMIT_SECONDS_MAX: Final = 24 * 3600
FILE_SCHEME: Final = "file:"
_SIGNER_SCHEMES: Final = (FILE_SCHEME, "pkcs11:", "aws-kms:")
TOKEN_PATHS_COUNT_MAX: Final = 16
SINKS_COUNT_MAX: Final = 8
QUESTIONS_SOCKET: Final = "/run/minikms-auditor/questions.sock"
_SINK_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}", re.ASCII)
_URL: Final = re.compile(r"(?:https?|tls|tcp)://[!-~]+", re.ASCII)


class Witness(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """url: its submission prefix. key: its verifier key. ca: of its TLS certificate, if not one of the machine."""

    url: str
    key: str
    ca: str = ""

    @property
    def verifier(self) -> VerifierKey:
        return parse_vkey(self.key, (TYPE_COSIGNATURE,))


class _Sink(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type"):
    """name: of its directory and in status. required: nothing counts as taken before this sink has it."""

    name: str
    format: Literal["line", "ocsf"] = "line"
    required: bool = False


class _NetworkSink(_Sink, frozen=True, kw_only=True):
    """ca: of the receiver's certificate, if not one of the machine. cert, key: the client's own, if it needs one."""

    url: str
    ca: str = ""
    cert: str = ""
    key: str = ""

    @property
    def has_tls(self) -> bool:
        return self.url.startswith(("https:", "tls:"))


class SyslogSink(_NetworkSink, frozen=True, kw_only=True, tag="syslog"):
    """url: `tls://HOST:PORT` or `tcp://HOST:PORT`. Never required: nothing proves that a line is stored."""


class HttpSink(_NetworkSink, frozen=True, kw_only=True, tag="http"):
    """token: the file of a bearer token, if the receiver needs one."""

    token: str = ""


class SplunkSink(_NetworkSink, frozen=True, kw_only=True, tag="splunk"):
    """url: of the HTTP Event Collector, without a path. token: the file of its token."""

    token: str


class FileSink(_Sink, frozen=True, kw_only=True, tag="file"):
    path: str


Sink = SyslogSink | HttpSink | SplunkSink | FileSink


class Questions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Who may ask about the log, by name or number, and on which socket."""

    users: tuple[str | Uid, ...]
    socket: str = QUESTIONS_SOCKET

    @property
    def uids(self) -> frozenset[int]:
        return frozenset(user if isinstance(user, int) else _uid_of(user) for user in self.users)


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """token_paths: what the library of a token or a cloud reads and writes while the auditor runs."""

    version: Literal[1]
    origin: str
    kms_socket: str
    log_dir: str
    state_dir: str
    signers: tuple[str, ...]
    token_paths: tuple[str, ...] = ()
    public_keys: tuple[str, ...] = ()
    kms_server_uids: tuple[Uid, ...] = (0,)
    metrics: str = ""
    witness: tuple[Witness, ...] = ()
    quorum: int = 0
    resubmit_seconds: int = RESUBMIT_SECONDS
    sink: tuple[Sink, ...] = ()
    questions: Questions | None = None

    @property
    def uses_network(self) -> bool:
        """Whether it connects to other hosts. A token may be a network HSM."""
        sinks = any(isinstance(sink, _NetworkSink) for sink in self.sink)
        return sinks or bool(self.witness) or not all(uri.startswith(FILE_SCHEME) for uri in self.signers)

    @property
    def trusted_keys(self) -> frozenset[bytes]:
        """The public keys that a log may begin with."""
        return frozenset(decode_exact(text, PUBLIC_KEY_BYTES) or b"" for text in self.public_keys)


class AuditorFiles(ConfigFiles):
    """The configuration of the auditor, and the files that it names."""

    def config(self) -> Config:
        """With absolute paths of what the auditor opens, and the numbers of users. Raises StartError."""
        config = parse_config(self.content(), str(self.config_path))
        places = {name: str(self.path(getattr(config, name))) for name in ("kms_socket", "log_dir", "state_dir")}
        check_socket(places["kms_socket"])
        questions = config.questions
        if questions is not None:
            socket, users = str(self.path(questions.socket)), tuple(questions.uids)
            check_socket(socket, "socket of questions")
            questions = msgspec.structs.replace(questions, socket=socket, users=users)
        tokens = tuple(str(self.path(each)) for each in config.token_paths)
        sinks = tuple(
            msgspec.structs.replace(sink, path=str(self.path(sink.path))) if isinstance(sink, FileSink) else sink
            for sink in config.sink
        )
        for sink in sinks:
            for own in (places["state_dir"], places["log_dir"]):
                if isinstance(sink, FileSink) and Path(os.path.realpath(sink.path)).is_relative_to(
                    os.path.realpath(own)
                ):
                    raise StartError(f"{self.config_path}: the file of the sink {sink.name!r} lies in {own}")
        return msgspec.structs.replace(config, **places, token_paths=tokens, sink=sinks, questions=questions)


def parse_config(content: bytes, place: str) -> Config:
    """Parses the configuration; errors call the file `place`."""
    return parse_toml(content, Config, place, _check)


def _check(config: Config) -> None:
    if api.ORIGIN_PATTERN.fullmatch(config.origin) is None or not is_name(config.origin):
        raise StartError("origin is 1 to 128 characters of A-Z, a-z, 0-9 and ._/:-, such as kms.example.com/audit")
    check_metrics(config.metrics)
    if not config.kms_server_uids:
        raise StartError("kms_server_uids must name a user")
    if not 0 < len(config.signers) <= SIGNERS_COUNT_MAX:
        raise StartError("signers has the signer of every tree checkpoint (Ed25519), and may have a second one")
    if not all(uri.startswith(_SIGNER_SCHEMES) for uri in config.signers):
        raise StartError("a signer is file:PATH, pkcs11:… or aws-kms:ARN")
    if len(config.token_paths) > TOKEN_PATHS_COUNT_MAX:
        raise StartError(f"there are more than {TOKEN_PATHS_COUNT_MAX} token_paths")
    if b"" in config.trusted_keys:
        raise StartError(
            "public_keys are those of the audit log: 44 characters of base64, as `minikms init` shows them"
        )
    if not 1 <= config.resubmit_seconds <= RESUBMIT_SECONDS_MAX:
        raise StartError(f"resubmit_seconds is 1 to {RESUBMIT_SECONDS_MAX}")
    if len(config.witness) > WITNESSES_COUNT_MAX:
        raise StartError(f"there are more than {WITNESSES_COUNT_MAX} witnesses")
    keys = {witness.verifier.public_key for witness in config.witness}
    if len(keys) != len(config.witness):
        raise StartError("two witnesses have the same key, so one would count twice")
    if not (1 if config.witness else 0) <= config.quorum <= len(config.witness):
        raise StartError(f"quorum is 1 to the number of witnesses, {len(config.witness)}; 0 without any")
    for witness in config.witness:
        parts = _parts(witness.url, ("https", "http"))
        if parts is None or parts.query:
            raise StartError(f"{witness.url!r} is no URL of a witness, such as https://witness.example.com/w1")
        if witness.ca and not witness.url.startswith("https:"):
            raise StartError(f"the witness {witness.url} has no TLS, so remove ca")
    if config.questions is not None and not config.questions.users:
        raise StartError("users of questions must name a user")
    if len(config.sink) > SINKS_COUNT_MAX:
        raise StartError(f"there are more than {SINKS_COUNT_MAX} sinks")
    if len({sink.name for sink in config.sink}) != len(config.sink):
        raise StartError("two sinks have the same name")
    files = [sink.path for sink in config.sink if isinstance(sink, FileSink)]
    if len(set(files)) != len(files):
        raise StartError("two sinks have the same file")
    for sink in config.sink:
        _check_sink(sink)


def _check_sink(sink: Sink) -> None:
    name = f"the sink {sink.name!r}"
    if _SINK_NAME.fullmatch(sink.name) is None:
        raise StartError(f"{name}: a name is 1 to 32 characters of a-z, 0-9 and -")
    if isinstance(sink, FileSink):
        return
    parts = _parts(sink.url, ("tls", "tcp") if isinstance(sink, SyslogSink) else ("https", "http"))
    if parts is None or (not isinstance(sink, HttpSink) and (parts.query or parts.path.strip("/"))):
        example = "tls://siem.example.com:6514" if isinstance(sink, SyslogSink) else "https://siem.example.com:8088"
        raise StartError(f"{name}: {sink.url!r} is no URL of its type, such as {example}")
    if isinstance(sink, SyslogSink) and sink.required:
        raise StartError(
            f"{name}: nothing proves that a receiver of syslog has stored a line, so remove `required`, and require a "
            "sink of the type http, splunk or file"
        )
    if isinstance(sink, SyslogSink) and parts.port is None:
        raise StartError(f"{name}: the URL must name a port, such as 6514")
    if not sink.has_tls and (sink.ca or sink.cert):
        raise StartError(f"{name} has no TLS, so remove ca and cert")
    if not sink.has_tls and not isinstance(sink, SyslogSink) and not _is_loopback(parts.hostname or ""):
        raise StartError(f"{name}: plain HTTP is for receivers on this host, such as http://127.0.0.1:8080")
    if bool(sink.cert) != bool(sink.key):
        raise StartError(f"{name}: cert and key belong together")


def _uid_of(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise StartError(f"there is no user {name}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parts(url: str, schemes: tuple[str, str]) -> SplitResult | None:
    """The parts of the URL of a receiver, without user and fragment; None if it is none."""
    try:
        parts = urlsplit(url)
        bad_port = parts.port == 0
    except ValueError:
        return None
    more = parts.username is not None or parts.fragment or bad_port
    return parts if parts.scheme in schemes and _URL.fullmatch(url) and parts.hostname and not more else None
