"""A TPM 2.0 that seals a root key, through tpm2-tools.

Owns: the source `tpm2:`, the sealed object and its policy, the order of the tools, and which return codes are refusals.
Invariants: an object is sealed and opened only if it can't leave its TPM and opens by no password, under the policy of
the source; the key goes through pipes, and to the TPM in a session that encrypts it; files of the tools are in memory
and hold no root key; sessions and objects are flushed at the end. It must never show what a tool says, nor choose a PCR
that the source does not name. Refusals are return codes of a device of this machine: the TCTI must not leave it.

    tpm2:    tpm2:?pcrs=sha256:0,2,4    tpm2:?parent=0x81000001&tcti=device:/dev/tpmrm0
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
import time
from typing import Final

from minikms_tokens import programs
from minikms_tokens.signing import TokenError
from minikms_tokens.wrapping import BLOB_BYTES_MAX, PROVIDER_SECONDS_MAX, AwayError, UnwrapRefusedError, give

BLOB_VERSION: Final = 1
PCRS: Final = 24
FLUSH_SECONDS_MAX: Final = 3.0
"""The part of PROVIDER_SECONDS_MAX that is for sessions left in the TPM."""
_PARAMETERS: Final = {
    "parent": re.compile(r"0x81[0-9a-fA-F]{6}", re.ASCII),
    "tcti": re.compile(r"(?:device|swtpm|tabrmd)(?::[A-Za-z0-9_./:=,-]{0,200})?", re.ASCII),
    "pcrs": re.compile(r"sha(?:256|384|512):(?:0|[1-9][0-9]?)(?:,(?:0|[1-9][0-9]?))*", re.ASCII),
}
_TCTI: Final = "device:/dev/tpmrm0"
_BANKS: Final = {"sha256": (0x000B, 32), "sha384": (0x000C, 48), "sha512": (0x000D, 64)}
"""TPM_ALG_ID, and bytes of a PCR."""
_STORAGE_KEY: Final = "decrypt|restricted|fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda"
_UNIQUE_BYTES: Final = 64
"""Zeros. With both, the storage root key of the TCG's provisioning guidance: ECC P-256, from the seed of the owner."""

_FIXED: Final = 0x02 | 0x10
"""TPMA_OBJECT: fixedTPM, fixedParent."""
_USER_WITH_AUTH: Final = 0x40
_ATTRIBUTES: Final = _FIXED | 0x80 | 0x400
"""And adminWithPolicy, noDA: without a password there is nothing to guess."""
_ATTRIBUTE_NAMES: Final = "fixedtpm|fixedparent|adminwithpolicy|noda"
_PUBLIC: Final = struct.Struct(">HHIH32sHH32s")
"""TPMT_PUBLIC: type, nameAlg, objectAttributes, authPolicy, scheme, unique."""
_KEYEDHASH: Final = 0x0008
_SHA256: Final = 0x000B
_SHA256_BYTES: Final = 32
_NULL: Final = 0x0010
_CC_UNSEAL: Final = 0x0000015E
_CC_POLICY_COMMAND_CODE: Final = 0x0000016C
_CC_POLICY_PCR: Final = 0x0000017F

_CODE: Final = re.compile(rb"\(0x([0-9A-Fa-f]{1,8})\)")
_REFUSALS: Final = {
    ("unseal", 0x09D): "the PCRs of the TPM are not those under which this key was sealed",
    (
        "load",
        0x09F,
    ): "the TPM does not open this wrapped key: another TPM sealed it, the TPM was cleared, or it is damaged",
    ("startauthsession", 0x08B): "the TPM has no key at the handle of the parent",
}
"""TPM_RC_POLICY_FAIL, TPM_RC_INTEGRITY, TPM_RC_HANDLE."""
_PASSWORDS: Final = {0x08E, 0x0A2}
"""TPM_RC_AUTH_FAIL, TPM_RC_BAD_AUTH."""


def policy_of(pcrs: str, values: bytes) -> bytes:
    """The authPolicy of a sealed object. `values`: SHA-256 of the values of the PCRs, in the order of their numbers."""
    if not pcrs:
        return hashlib.sha256(bytes(32) + struct.pack(">II", _CC_POLICY_COMMAND_CODE, _CC_UNSEAL)).digest()
    bank, numbers = _parse_pcrs(pcrs)
    bits = sum(1 << number for number in numbers).to_bytes(PCRS // 8, "little")
    selection = struct.pack(">IHB", 1, _BANKS[bank][0], len(bits)) + bits
    return hashlib.sha256(bytes(32) + struct.pack(">I", _CC_POLICY_PCR) + selection + values).digest()


def parse_blob(blob: bytes, pcrs: str) -> tuple[bytes, bytes]:
    """TPM2B_PUBLIC and TPM2B_PRIVATE. Raises AwayError for an object that may leave its TPM or lacks the policy."""
    head = 1 + _SHA256_BYTES
    end = head + 2 + _PUBLIC.size
    public, private = blob[head:end], blob[end:]
    if blob[:1] != bytes([BLOB_VERSION]) or not (_is_sized(public) and _is_sized(private)):
        raise AwayError("the wrapped key is not one of this version, sealed by a TPM")
    kind, algorithm, attributes, policy_bytes, policy, scheme, unique_bytes, _ = _PUBLIC.unpack(public[2:])
    if attributes & _FIXED != _FIXED:
        raise AwayError("the sealed object may leave its TPM: fixedTPM and fixedParent have to be set")
    if attributes & _USER_WITH_AUTH:
        raise AwayError("the sealed object opens without its policy: userWithAuth has to be clear")
    if policy != policy_of(pcrs, blob[1:head]) or (not pcrs and any(blob[1:head])):
        raise AwayError("the sealed object has another policy than that of the source")
    parameters = kind, algorithm, attributes, policy_bytes, scheme, unique_bytes
    if parameters != (_KEYEDHASH, _SHA256, _ATTRIBUTES, len(policy), _NULL, _SHA256_BYTES):
        raise AwayError("the sealed object is not one that was made here")
    return public, private


def _is_sized(structure: bytes) -> bool:
    return len(structure) > 2 and len(structure) == 2 + int.from_bytes(structure[:2])


class Tpm2Wrapper:
    """A sealed object of the TPM. It binds no context: the pin of the root key does."""

    def __init__(self, source: str) -> None:
        parameters = _parameters(source)
        self._parent, self._tcti, self._pcrs = (parameters.get(name, "") for name in ("parent", "tcti", "pcrs"))
        policy_of(self._pcrs, b"")
        programs.find("tpm2_unseal", "tpm2-tools")

    def __repr__(self) -> str:
        return "<Tpm2Wrapper>"

    def wrap(self, key: memoryview, context: str) -> bytes:
        with _Work(self._tcti or _TCTI) as work:
            values = self._values(work)
            parent = self._made_parent(work)
            session = work.session(parent, "--hmac-session", "--enable-decrypt")
            policy, public, private = work.file(policy_of(self._pcrs, values)), work.file(), work.file()
            output = ("-L", policy, "-a", _ATTRIBUTE_NAMES, "-u", public, "-r", private)
            work.run("create", "-Q", "-C", parent, "-P", f"session:{session}", "-i", "-", *output, stdin=key)
            blob = bytes([BLOB_VERSION]) + values + work.read(public) + work.read(private)
        parse_blob(blob, self._pcrs)
        return blob

    def unwrap(self, blob: bytes, context: str, into: memoryview) -> None:
        public, private = parse_blob(blob, self._pcrs)
        with _Work(self._tcti or _TCTI) as work:
            parent = self._made_parent(work)
            session = work.session(parent, "--policy-session", "--enable-encrypt")
            if self._pcrs:
                work.run("policypcr", "-Q", "-S", session, "-l", self._pcrs)
            else:
                work.run("policycommandcode", "-Q", "-S", session, f"{_CC_UNSEAL:#x}")
            sealed = work.file()
            files = ("-u", work.file(public), "-r", work.file(private))
            work.run("load", "-Q", "-C", parent, *files, "-c", sealed)
            count = work.run("unseal", "-c", sealed, "-p", f"session:{session}", into=into)
        give(into[:count], into, "the TPM")

    def _made_parent(self, work: _Work) -> str:
        if self._parent:
            return self._parent
        context = work.file()
        template = ("-G", "ecc256:aes128cfb", "-a", _STORAGE_KEY, "-u", "-", "-c", context)
        work.run("createprimary", "-Q", "-C", "o", *template, stdin=bytes(_UNIQUE_BYTES))
        return context

    def _values(self, work: _Work) -> bytes:
        if not self._pcrs:
            return bytes(_SHA256_BYTES)
        bank, numbers = _parse_pcrs(self._pcrs)
        read = work.file()
        work.run("pcrread", "-Q", "-o", read, self._pcrs)
        values = work.read(read)
        if len(values) != len(numbers) * _BANKS[bank][1]:
            raise AwayError(f"the TPM has no PCRs in its bank {bank}")
        return hashlib.sha256(values).digest()


def _parameters(source: str) -> dict[str, str]:
    values: dict[str, str] = {}
    path, mark, query = source.removeprefix("tpm2:").partition("?")
    for part in query.split("&") if mark else ():
        name, _, value = part.partition("=")
        if name not in _PARAMETERS or name in values or _PARAMETERS[name].fullmatch(value) is None:
            raise TokenError(
                "the parameters of tpm2: are parent=0x81…, tcti=device:… (or swtpm, tabrmd) and pcrs=sha256:0,2,4"
            )
        values[name] = value
    if path:
        raise TokenError("tpm2: is followed by nothing, or by ? and its parameters")
    return values


def _parse_pcrs(text: str) -> tuple[str, list[int]]:
    bank, _, listed = text.partition(":")
    numbers = [int(number) for number in listed.split(",")]
    if numbers != sorted(set(numbers)) or numbers[-1] >= PCRS:
        raise TokenError(f"the PCRs of a tpm2: source are in order, each once, and below {PCRS}")
    return bank, numbers


class _Work:
    """The tools of one call: their files, sessions, and time limit."""

    def __init__(self, tcti: str) -> None:
        self._tcti = tcti
        self._end = time.monotonic() + PROVIDER_SECONDS_MAX - FLUSH_SECONDS_MAX
        self._files: dict[str, int] = {}
        self._sessions: list[str] = []

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *_: object) -> None:
        self._end = time.monotonic() + FLUSH_SECONDS_MAX
        try:
            for what in ("-t", *self._sessions):
                self._flush(what)
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)

    def file(self, content: bytes = b"") -> str:
        """The name, for a tool, of a file in memory."""
        descriptor = os.memfd_create("tpm2")
        name = f"/proc/self/fd/{descriptor}"
        self._files[name] = descriptor
        os.write(descriptor, content)
        return name

    def read(self, name: str) -> bytes:
        return os.pread(self._files[name], BLOB_BYTES_MAX, 0)

    def session(self, parent: str, kind: str, use: str) -> str:
        """A session whose salt only the TPM of `parent` can open, and which encrypts what is secret."""
        context = self.file()
        self.run("startauthsession", kind, "-c", parent, "-S", context)
        self._sessions.append(context)
        self._flush("-t")  # a TPM has room for three; its resource manager needs no help and shows no object of others
        self.run("sessionconfig", use, context)
        return context

    def run(self, tool: str, *arguments: str, stdin: memoryview | bytes = b"", into: memoryview | None = None) -> int:
        """The number of bytes in `into`. Raises TokenError."""
        command = [programs.find(f"tpm2_{tool}", "tpm2-tools"), "-T", self._tcti, *arguments]
        seconds, files = self._end - time.monotonic(), tuple(self._files.values())
        ended = programs.run(command, seconds=seconds, stdin=stdin, into=into, files=files)
        if ended.status != 0:
            raise _error(tool, ended.error)
        return ended.output_bytes

    def _flush(self, what: str) -> None:
        with contextlib.suppress(TokenError):
            self.run("flushcontext", what)


def _error(tool: str, text: bytes) -> TokenError:
    """For the first return code in the errors of a tool. One of format 1 has the number of a handle, a session or a
    parameter in it; one of another layer is not of the TPM.
    """
    match = _CODE.search(text)
    code = 0 if match is None else int(match[1], 16)
    known = code & 0xBF if code < 0x1000 and code & 0x80 else 0
    if (tool, known) in _REFUSALS:
        return UnwrapRefusedError(_REFUSALS[tool, known])
    if known in _PASSWORDS:
        return AwayError("the TPM asks for a password: name a parent without one, or give the owner hierarchy none")
    return AwayError(f"the TPM is away: tpm2_{tool} failed" + (f" with {code:#x}" if code else ""))
