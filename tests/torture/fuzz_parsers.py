"""A fuzzer with coverage for each parser of the key process that takes hostile bytes.

Owns: the table of parsers, and the campaign with Atheris (libFuzzer), which is not among the project's packages:

    pip install atheris && python -m tests.torture.fuzz_parsers SECONDS [PARSER …]

gives each parser so many seconds and replaces its inputs in `tests/vectors/corpus.json` by the smallest set that
reaches the same branches. What must hold for every input: the parser raises nothing but the errors of its contract, and
what it accepted has the same meaning when it is encoded anew. An input that breaks this is printed in hexadecimal: put
it into the corpus with the correction.
"""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

import msgspec

from minikms import api
from minikms.api.errors import KmsRefusedError
from minikms.archives.archive import ArchiveReader
from minikms.audit import blocks, chain, note, receipt, record
from minikms.crypto import shares
from minikms.custody import journal_format
from minikms.http import LIMITS
from minikms.http.head import parse_head, parse_query
from minikms.http.limits import RefusedError
from minikms.keys import dek, keyring, tombstones
from minikms.memory.arena import SecretArena, read_key_fd_into
from minikms.policy import names, rules
from minikms.processes import handover
from minikms_daemon.server import strictjson, strictmsgpack
from tests.minikms.http.http_inputs import ACCEPTED, REFUSED

VECTORS: Final = Path(__file__).parents[1] / "vectors"
CORPUS: Final = VECTORS / "corpus.json"
INPUT_BYTES_MAX: Final = 4096
INPUT_SECONDS_MAX: Final = 10
REPORT_CHARS_MAX: Final = 4000
_PROGRAM: Final = """
import sys, atheris
with atheris.instrument_imports(include=["minikms", "minikms_daemon"]):
    from tests.torture.fuzz_parsers import check
name = sys.argv.pop(1)
atheris.Setup(sys.argv, lambda data: check(name, data))
atheris.Fuzz()
"""
_FORMATS: Final = json.loads((VECTORS / "formats.json").read_text())
_ARCHIVES: Final = json.loads((VECTORS / "archives.json").read_text())
_ARCHIVE_ROOT: Final = bytes.fromhex(_ARCHIVES["roots"]["s1"])
_KEY_ID: Final = _FORMATS["dek"]["key_id"]
_TOMBSTONES: Final = bytes.fromhex(_FORMATS["tombstones"]["file"])
_JSON: Final = {verb.name: msgspec.json.Decoder(verb.request) for verb in api.VERBS}
_MSGPACK: Final = {verb.name: strictmsgpack.Decoder(verb.request) for verb in api.VERBS if verb.is_batch}
_arena: Final = SecretArena(16, force_fallback=True)
REFUSALS: Final = (KmsRefusedError, RefusedError, tombstones.TombstoneFormatError)


def _head(data: bytes) -> None:
    head = parse_head(data, LIMITS)
    parse_query(head.query)


def _json(data: bytes) -> None:
    """The first byte says of which verb it is the body."""
    decoder = list(_JSON.values())[sum(data[:1]) % len(_JSON)]
    request = strictjson.decode(decoder, data[1:])
    assert decoder.decode(msgspec.json.encode(request)) == request


def _msgpack(data: bytes) -> None:
    decoder = list(_MSGPACK.values())[sum(data[:1]) % len(_MSGPACK)]
    request = decoder.decode(data[1:])
    assert decoder.decode(msgspec.msgpack.encode(request)) == request


def _policy(data: bytes) -> None:
    rules.parse_policy(data)


def _name(data: bytes) -> None:
    names.parse_name(data.decode("latin-1"))


def _root_key(data: bytes) -> None:
    descriptor = os.memfd_create("root")
    try:
        os.write(descriptor, data)
        with _arena.allocate() as slot:
            read_key_fd_into(descriptor, slot)
            assert slot.view.hex() == data.strip().decode().lower()
    finally:
        os.close(descriptor)


def _share(data: bytes) -> None:
    share = memoryview(bytearray(shares.SHARE_BYTES))
    info = shares.read_text([memoryview(data)], share)
    text = memoryview(bytearray(shares.TEXT_CHARS))
    shares.write_text(share, info, [text])
    again = memoryview(bytearray(shares.SHARE_BYTES))
    assert shares.read_text([text], again) == info and again == share


def _note(data: bytes) -> None:
    content = note.parse_note(data)
    checkpoint = note.parse_checkpoint(content.text)
    assert note.parse_checkpoint(checkpoint.text()) == checkpoint


def _audit_line(data: bytes) -> None:
    event, event_bytes, _ = record.parse_line(data)
    assert record.encode_event(event) == event_bytes


def _receipt(data: bytes) -> None:
    receipt.check(receipt.parse(data), [])


def _log_head(data: bytes) -> None:
    chain.parse_head(data.decode("latin-1"))


def _log_blocks(data: bytes) -> None:
    blocks.parse_blocks(data)


def _archive(data: bytes) -> None:
    reader = ArchiveReader(io.BytesIO(data))
    for _ in reader.entries():
        pass
    with _arena.allocate() as root:
        root.view[:] = _ARCHIVE_ROOT
        reader.check_tag(root.view, _arena)


def _journal(data: bytes) -> None:
    decoded = journal_format.decode(data)
    journal_format.chains(decoded.intact)
    journal_format.ids_in_journal(data)
    assert journal_format.decode(journal_format.encode(decoded.intact)).intact == decoded.intact


def _dek(data: bytes) -> None:
    parsed = dek.parse(data, _KEY_ID)
    assert dek.parse(dek.encode(parsed), _KEY_ID) == parsed


def _keyring(data: bytes) -> None:
    body, body_bytes, tag = keyring.parse_file(data)
    assert keyring.parse_file(keyring.encode_file(body_bytes, tag))[0] == body


def _tombstones(data: bytes) -> None:
    """With the sum of the records that are there, as the keyring would have it."""
    count = max(0, len(data) - tombstones.HEADER_BYTES) // tombstones.RECORD_BYTES
    expected = tombstones.TombstoneChain("kr_00112233445566ff")
    expected.take(data[tombstones.HEADER_BYTES : tombstones.HEADER_BYTES + count * tombstones.RECORD_BYTES])
    tombstones.read(data, keyring_id="kr_00112233445566ff", count=count, head=expected.head, mac_key=None)


def _unlock_question(data: bytes) -> None:
    question = handover.parse_question(data)
    assert question is None or question.encode() == data
    handover.parse_sentence(data)


class Parser(NamedTuple):
    """`parse` raises one of REFUSALS for an input that is not valid. `seeds`: inputs, some of them valid."""

    parse: Callable[[bytes], None]
    seeds: list[bytes]


def _parsers() -> dict[str, Parser]:
    batches = json.loads((VECTORS / "batches.json").read_text())["requests"]
    tree = json.loads((VECTORS / "tree.json").read_text())
    share = json.loads((VECTORS / "shares.json").read_text())["sets"][0]["shares"][0]["text"]
    archive = _ARCHIVES["archive"]
    policy = b'version = 1\n[[grant]]\nprincipals = ["uid:1"]\nroles = ["encrypt"]\nthreads = ["chat-*"]\n'
    return {
        "head": Parser(_head, [*ACCEPTED.values(), *(data for data, _ in REFUSED.values())]),
        "json": Parser(_json, [_numbered(_JSON, one, json.dumps(one["json"]).encode()) for one in batches]),
        "msgpack": Parser(_msgpack, [_numbered(_MSGPACK, one, bytes.fromhex(one["msgpack"])) for one in batches]),
        "policy": Parser(_policy, [policy]),
        "principal": Parser(_name, [b"uid:0", b"spiffe://prod/a", b"dns:a.example", b"oidc:https://a.example|%2A"]),
        "root key": Parser(_root_key, [b"0" * 64, b"aF" * 32 + b"\n"]),
        "share": Parser(_share, [share.encode()]),
        "note": Parser(_note, [tree["checkpoint"].encode()]),
        "audit line": Parser(_audit_line, [tree["first_line"].strip().encode()]),
        "receipt": Parser(_receipt, [json.dumps({"version": 1, "line": tree["first_line"].strip()}).encode()]),
        "log head": Parser(_log_head, [b"7:" + base64.b64encode(bytes(32))]),
        "log blocks": Parser(_log_blocks, [bytes(100)]),
        "archive": Parser(_archive, [bytes.fromhex(archive)]),
        "journal": Parser(_journal, [bytes.fromhex(_FORMATS["dek"]["journal"])]),
        "dek": Parser(_dek, [one.encode() for one in _FORMATS["dek"]["files"]]),
        "keyring": Parser(_keyring, [one["file"].encode() for one in _FORMATS["keyrings"]]),
        "tombstones": Parser(_tombstones, [_TOMBSTONES]),
        "unlock": Parser(_unlock_question, [one.encode() for one in _FORMATS["unlock"]["questions"].values()]),
    }


def _numbered(decoders: Mapping[str, object], request: dict[str, Any], body: bytes) -> bytes:
    return bytes([list(decoders).index(request["verb"])]) + body


PARSERS: Final = _parsers()


def corpus() -> dict[str, list[bytes]]:
    """The kept inputs of each parser."""
    return {name: [base64.b64decode(one) for one in kept] for name, kept in json.loads(CORPUS.read_text()).items()}


def check(name: str, data: bytes) -> None:
    """Raises AssertionError for an input that breaks what must hold."""
    try:
        PARSERS[name].parse(data)
    except REFUSALS:
        pass
    except Exception as error:
        raise AssertionError(f"{name}: {data.hex()}: {error!r}") from error


def fuzz(name: str, seconds: int) -> list[bytes]:
    """The inputs of a campaign, `smallest`. Raises AssertionError with what libFuzzer said of an input that breaks what
    must hold."""
    with tempfile.TemporaryDirectory(prefix="minikms-fuzz-") as directory:
        inputs = Path(directory, "inputs")
        inputs.mkdir()
        for number, data in enumerate([*PARSERS[name].seeds, *corpus().get(name, [])]):
            inputs.joinpath(str(number)).write_bytes(data)
        options = [f"-max_len={INPUT_BYTES_MAX}", f"-timeout={INPUT_SECONDS_MAX}", f"-max_total_time={seconds}"]
        ended = subprocess.run(
            [sys.executable, "-c", _PROGRAM, name, *options, str(inputs)],
            check=False, capture_output=True, text=True, errors="replace", cwd=directory,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        assert ended.returncode == 0, f"{ended.stdout[-REPORT_CHARS_MAX:]}\n{ended.stderr[-REPORT_CHARS_MAX:]}"
        return smallest(name, [path.read_bytes() for path in inputs.iterdir()])


def smallest(name: str, inputs: Iterable[bytes]) -> list[bytes]:
    """Those of the inputs, short ones first, that reach a branch which none before reaches."""
    reached: set[tuple[CodeType, int, int]] = set()
    kept = []
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        before = len(reached)
        sys.settrace(lambda frame, *_: _steps(frame, reached))
        try:
            check(name, data)
        finally:
            sys.settrace(None)
        if len(reached) > before:
            kept.append(data)
    return kept


def _steps(frame: FrameType, reached: set[tuple[CodeType, int, int]]) -> Callable[..., Any] | None:
    """Notes each step from a line to the next in a function of the project."""
    if f"{os.sep}src{os.sep}" not in frame.f_code.co_filename:
        return None
    last = 0

    def step(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        nonlocal last
        if event == "line":
            reached.add((frame.f_code, last, frame.f_lineno))
            last = frame.f_lineno
        return step

    return step


def main() -> None:
    seconds, chosen = int(sys.argv[1]), sys.argv[2:] or list(PARSERS)
    kept = corpus()
    for name in chosen:
        kept[name] = fuzz(name, seconds)
        print(f"{name}: {len(kept[name])} inputs of {sum(map(len, kept[name])):,} bytes", flush=True)
        texts = {key: [base64.b64encode(one).decode() for one in kept[key]] for key in sorted(kept)}
        CORPUS.write_text(json.dumps(texts, indent=0) + "\n")


if __name__ == "__main__":
    main()
