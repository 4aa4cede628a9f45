"""A root key that clevis wraps: under a tang server, a TPM 2.0, or shares of them (pin `sss`).

Owns: the file that names pin and configuration, and the check of a wrapped key against it. A source is `clevis:/PATH`
of a file with what `clevis encrypt` takes: `tang {"url": "http://…", "thp": "…"}`. A wrapped key is a compact JWE
(RFC 7516). Invariants: clevis runs only for a JWE whose header has the pin, server and configuration of the file; each
member that clevis puts into a URL or a command is checked first; a tang server is never trusted at first use; a root
key goes through pipes only. clevis proves no refusal: tang answers over plain HTTP, and clevis has one exit status for
all failures. So each is AwayError, and a key that was taken back is used until the lease ends. clevis binds no context.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any, Final

from minikms_tokens import programs
from minikms_tokens.signing import TokenError
from minikms_tokens.wrapping import BLOB_BYTES_MAX, PROVIDER_SECONDS_MAX, AwayError, give, read_file

CONFIG_BYTES_MAX: Final = 4096
MEMORY_BYTES_MAX: Final = 128 * 1024 * 1024
"""The memory of each program that clevis starts: its shells keep the whole answer of a server."""
_JWE: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+){3}", re.ASCII)
_URL: Final = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(?:/[A-Za-z0-9._~-]+)*", re.ASCII)
_THUMBPRINT: Final = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
_CURVE: Final = re.compile(r"P-(?:256|384|521)", re.ASCII)
_WORD: Final = re.compile(r"[a-z0-9_]{1,16}", re.ASCII)
_PCRS: Final = re.compile(r"[0-9]{1,2}(?:,[0-9]{1,2})*", re.ASCII)
_TPM2: Final = {"hash": "sha256", "key": "ecc", "pcr_bank": "", "pcr_ids": ""}
"""The configuration of a TPM 2.0, with what clevis takes if it is absent."""
_DIRECT: Final = {"alg", "clevis", "enc"}
_HEADERS: Final = {"sss": _DIRECT, "tang": _DIRECT | {"epk", "kid"}, "tpm2": _DIRECT}
"""The members of a header, by its pin. None of them asks for compression."""
_FORM_ERRORS: Final = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading JSON of another form raises."""


class ClevisWrapper:
    """What `clevis encrypt` and `clevis decrypt` do with the configuration of a file, read at each call."""

    def __init__(self, source: str) -> None:
        self._path = source.removeprefix("clevis:")
        if not self._path.startswith("/") or "\0" in self._path:
            raise TokenError("clevis: is followed by the absolute path of a file with pin and configuration")
        prlimit, run = programs.find("prlimit", "util-linux"), programs.find("clevis", "clevis")
        self._command = (prlimit, f"--as={MEMORY_BYTES_MAX}", "--core=0", run)

    def wrap(self, key: memoryview, context: str) -> bytes:
        pin, config = self._config()
        ended = self._run("encrypt", pin, json.dumps(config), stdin=key)
        blob = ended.output.strip()
        _check(blob, pin, config)
        return blob

    def unwrap(self, blob: bytes, context: str, into: memoryview) -> None:
        _check(blob, *self._config())
        ended = self._run("decrypt", stdin=blob, into=into)
        give(into[: ended.output_bytes], into, "clevis")

    def _config(self) -> tuple[str, Any]:
        """Pin and configuration of the file, as clevis takes them."""
        content = read_file(self._path, "configuration of clevis", CONFIG_BYTES_MAX)
        try:
            pin, _, text = content.decode("ascii").strip().partition(" ")
            config = _parse(text)
            _policy(pin, config)
        except _FORM_ERRORS:
            raise AwayError(
                f'{self._path} has one line, such as tang {{"url": "http://HOST", "thp": "THUMBPRINT"}}: url and thp '
                "(SHA-256) of each tang server; pcr_bank and pcr_ids, or neither, of a TPM; t and pins of sss"
            ) from None
        return pin, config

    def _run(self, *words: str, **how: Any) -> programs.Ended:
        environ = {"HOME": "/nonexistent"}  # curl reads settings there
        try:
            ended = programs.run((*self._command, *words), seconds=PROVIDER_SECONDS_MAX, environ=environ, **how)
        except AwayError as error:
            raise AwayError(str(error).replace("prlimit", "clevis")) from None
        if ended.status != 0:
            raise AwayError(f"clevis {words[0]} failed: its server or TPM is away, or has the key no longer")
        return ended


def _check(blob: bytes, pin: str, config: Any) -> None:
    """Checks that `blob` is a JWE under this configuration. Raises AwayError."""
    try:
        is_ours = len(blob) <= BLOB_BYTES_MAX and _header(blob.decode("ascii")) == _policy(pin, config)
    except _FORM_ERRORS:
        is_ours = False
    if not is_ours:
        raise AwayError("the wrapped key is no JWE of clevis under the pin and configuration of the file")


def _policy(pin: str, config: Any) -> tuple[Any, ...]:
    """Pin and configuration, as `clevis encrypt` takes them, in a form that can be compared; without thumbprints, which
    count for `clevis encrypt` only. Raises _FORM_ERRORS.
    """
    if pin == "tang" and config.keys() == {"url", "thp"}:
        if _URL.fullmatch(config["url"]) and _THUMBPRINT.fullmatch(config["thp"]):
            return pin, config["url"]
    elif pin == "tpm2" and config.keys() <= _TPM2.keys():
        kind, key, bank, pcrs = ({**_TPM2, **config}[name] for name in _TPM2)
        has_pcrs = _WORD.fullmatch(bank) and _PCRS.fullmatch(pcrs)
        if _WORD.fullmatch(kind) and _WORD.fullmatch(key) and (has_pcrs or not bank + pcrs):
            return pin, kind, key, bank, pcrs
    elif pin == "sss" and config.keys() == {"t", "pins"}:
        lists = {name: listed if isinstance(listed, list) else [listed] for name, listed in config["pins"].items()}
        shares = [(name, share) for name, listed in lists.items() for share in listed]
        if type(config["t"]) is int and 1 <= config["t"] <= len(shares) and "sss" not in config["pins"]:
            return pin, config["t"], sorted(_policy(*share) for share in shares)
    raise ValueError("another configuration")


def _header(jwe: str) -> tuple[Any, ...]:
    """The same of the header of a JWE. Raises _FORM_ERRORS."""
    protected = jwe.partition(".")[0]
    raw = base64.urlsafe_b64decode(protected + "==")
    if not _JWE.fullmatch(jwe) or base64.urlsafe_b64encode(raw).decode().rstrip("=") != protected:
        raise ValueError("no compact JWE")
    header = _parse(raw.decode("ascii"))
    pin = header["clevis"]["pin"]
    if header.keys() != _HEADERS[pin] or header["clevis"].keys() != {"pin", pin} or header["enc"] != "A256GCM":
        raise ValueError("another header")
    inner = dict(header["clevis"][pin])
    if pin == "sss":
        return pin, inner["t"], sorted(_header(share) for share in inner["jwe"])
    if pin == "tang":
        if not (_THUMBPRINT.fullmatch(header["kid"]) and _CURVE.fullmatch(header["epk"]["crv"])):
            raise ValueError("another key")
        return pin, inner["url"]
    del inner["jwk_pub"], inner["jwk_priv"]
    return _policy(pin, inner)


def _parse(text: str) -> Any:
    """The value of a JSON text, in which no object has a name twice: programs differ in which of two they take."""

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(members := dict(pairs)) != len(pairs):
            raise ValueError("a name twice")
        return members

    return json.loads(text, object_pairs_hook=made)
