"""encrypt, decrypt and rewrap, one record or a batch.

Owns: the form of a ciphertext, `vault:vN:` and a record in base64; which requests of the key service a batch becomes.
Invariants: the results of a batch are in the order of its items, each with the item's `reference`; one failed item
makes the status 400, unless the caller asked for another one and an item succeeded; a rewrap happens in the key
service. Plaintext must never be kept or logged.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from minikms import api
from minikms.api.errors import KmsRefusedError, refusal
from minikms.http import Response
from minikms_gateway.transit.keyring import OUT_OF_DATE, TransitCaller, TransitKey
from minikms_gateway.transit.wire import (
    BATCH_ITEMS_MAX,
    UNBOUND,
    Number,
    Short,
    TransitBody,
    VaultError,
    bound,
    decode_base64,
    encode_base64,
    envelope,
    text_of,
)

STATUSES_WITHOUT_BODY: Final = frozenset({204, 205, 304})
"""Never the status of a batch: the body would be read as the next answer."""
_PREFIX: Final = "vault:v"
_VERSION: Final = re.compile(r"[0-9]{1,10}", re.ASCII)


class RecordItem(TransitBody):
    plaintext: str | None = None
    ciphertext: str | None = None
    context: str | None = None
    associated_data: str | None = None
    key_version: Number | None = None
    reference: Short | None = None


class Records(RecordItem):
    batch_input: list[RecordItem] | None = None
    partial_failure_response_code: Number | None = None
    convergent_encryption: bool | None = None


class RecordResult(TransitBody, omit_defaults=True):
    """The result of an item. `plaintext`: None unless the operation gives one."""

    plaintext: str | None = None
    ciphertext: str = ""
    key_version: int = 0
    error: str = ""
    reference: str | None = None


Results = list[str | KmsRefusedError]
"""The results of a request's items, in their order."""


async def encrypt(caller: TransitCaller, name: str, body: Records) -> bytes | Response:
    items = _items(body, "plaintext", "encrypt")

    async def seal(key: TransitKey) -> tuple[Results, int]:
        key_id, prefix = key.latest_id, prefix_of(key.latest)

        def prepare(place: int) -> tuple[str, bytes, bytes]:
            item = items[place]
            if item.key_version:
                key.encrypts(item.key_version)
            return key_id, decode_base64(item.plaintext or ""), _aad(key, item)

        if body.batch_input is None:
            _, plaintext, aad = prepare(0)
            fields = {"key_id": key_id, "plaintext": plaintext, "aad": aad}
            sealed = await caller.native(api.ENCRYPT, _Ciphertext, body=fields)
            return [prefix + sealed.ciphertext], key.latest
        return await _batch(caller, api.ENCRYPT_BATCH, len(items), prepare, prefix), key.latest

    results, latest = await caller.using(name, seal, at_least=max(item.key_version or 0 for item in items))
    return _answer(body, items, results, latest)


async def decrypt(caller: TransitCaller, name: str, body: Records) -> bytes | Response:
    items = _items(body, "ciphertext", "decrypt")
    records = [parsed(item.ciphertext, "ciphertext", "decrypt") for item in items]

    async def unseal(key: TransitKey) -> Results:
        def prepare(place: int) -> tuple[str, bytes, bytes]:
            return _opening(key, items[place], records[place])

        if body.batch_input is None:
            key_id, record, aad = prepare(0)
            fields = {"key_id": key_id, "ciphertext": record, "aad": aad}
            return [(await caller.native(api.DECRYPT, _Plaintext, body=fields)).plaintext]
        return await _batch(caller, api.DECRYPT_BATCH, len(items), prepare, "")

    return _answer(body, items, await caller.using(name, unseal, at_least=_newest(records)))


async def rewrap(caller: TransitCaller, name: str, body: Records) -> bytes | Response:
    """One request for each version among the items."""
    items = _items(body, "ciphertext", "decrypt")
    parts = [parsed(item.ciphertext, "ciphertext", "decrypt") for item in items]

    async def move(key: TransitKey) -> tuple[Results, int]:
        results: Results = [VaultError("")] * len(items)
        places: defaultdict[str, list[int]] = defaultdict(list)
        moved: defaultdict[str, list[tuple[bytes, bytes]]] = defaultdict(list)
        for place, item in enumerate(items):
            try:
                key.encrypts(item.key_version or 0)
                key_id, record, aad = _opening(key, item, parts[place])
                moved[key_id].append((record, aad))
                places[key_id].append(place)
            except KmsRefusedError as error:
                results[place] = error
        for key_id, records in moved.items():
            fields = (key_id, key.latest_id, records)
            answer = await caller.native(api.REENCRYPT_BATCH, _Outcomes, body=fields, packed=True)
            for place, outcome in zip(places[key_id], _counted(answer, records), strict=True):
                results[place] = _result(outcome, prefix_of(key.latest))
        return results, key.latest

    newest = max(_newest(parts), *(item.key_version or 0 for item in items))
    results, latest = await caller.using(name, move, at_least=newest)
    return _answer(body, items, results, latest)


class _Ciphertext(TransitBody):
    """The base64 of a record, which is passed on as it is."""

    ciphertext: str


class _Plaintext(TransitBody):
    plaintext: str


class _Refused(msgspec.Struct, array_like=True):
    error: str
    code: str


class _Outcomes(TransitBody, array_like=True):
    """The answer to a batch in MessagePack."""

    items: list[bytes | _Refused]


def _items(body: Records, member: str, what: str) -> Sequence[RecordItem]:
    """The items of a request. Raises VaultError for what refuses all of them."""
    if body.convergent_encryption:
        raise VaultError("convergent encryption is not offered")
    if body.batch_input is None:
        value = getattr(body, member)
        if value is None or (not value and member == "ciphertext"):
            raise VaultError(f"missing {member} to {what}")
        return [body]
    items = body.batch_input
    if body.context or body.associated_data:
        raise VaultError("context and associated_data stand in each item of batch_input, not beside it")
    if not items:
        raise VaultError("missing batch input to process")
    if len(items) > BATCH_ITEMS_MAX:
        raise VaultError(f"a batch has at most {BATCH_ITEMS_MAX} items", 413)
    values = [item.plaintext if member == "plaintext" else item.ciphertext for item in items]
    if None in values:
        raise VaultError(f"failed to parse batch input: '[{values.index(None)}].{member}' missing {member} to {what}")
    if len({bool(item.context) for item in items}) > 1:
        raise VaultError("context should be set either in all the request blocks or in none")
    return items


async def _batch(
    caller: TransitCaller,
    verb: api.Verb[Any, Any],
    count: int,
    prepare: Callable[[int], tuple[str, bytes, bytes]],
    prefix: str,
) -> Results:
    """One request for those items of a batch that can be read. `prefix`: of each value, in base64."""
    results: Results = []
    wanted: list[tuple[str, bytes, bytes]] = []
    places: list[int] = []
    for place in range(count):
        try:
            wanted.append(prepare(place))
            places.append(place)
            results.append("")
        except KmsRefusedError as error:
            results.append(error)
    if wanted:
        answer = await caller.native(verb, _Outcomes, body=(wanted,), packed=True)
        for place, outcome in zip(places, _counted(answer, wanted), strict=True):
            results[place] = _result(outcome, prefix)
    return results


def _counted(answer: _Outcomes, wanted: Sequence[object]) -> list[bytes | _Refused]:
    if len(answer.items) != len(wanted):
        raise VaultError("the key service answered another number of items", 500)
    return answer.items


def _result(outcome: bytes | _Refused, prefix: str) -> str | KmsRefusedError:
    """The text of a result. Raises an error of OUT_OF_DATE: the whole batch is made again."""
    if isinstance(outcome, bytes):
        return prefix + encode_base64(outcome)
    error = refusal(outcome.code, outcome.error)
    if isinstance(error, OUT_OF_DATE):
        raise error
    return error


def _answer(body: Records, items: Sequence[RecordItem], results: Results, latest: int = 0) -> bytes | Response:
    """`latest`: the version that has encrypted; 0 if the results are plaintexts."""

    def shown(result: str | KmsRefusedError, reference: str | None) -> RecordResult:
        if isinstance(result, KmsRefusedError):
            return RecordResult(None if latest else "", error=text_of(result), reference=reference)
        if latest:
            return RecordResult(None, result, latest, reference=reference)
        return RecordResult(result, reference=reference)

    failed = [result for result in results if isinstance(result, KmsRefusedError)]
    if body.batch_input is None:
        if failed:
            raise failed[0]
        return envelope(shown(results[0], None))
    data = {"batch_results": [shown(result, item.reference or "") for item, result in zip(items, results, strict=True)]}
    if not failed:
        return envelope(data)
    status, warning = 400, ""
    wanted = body.partial_failure_response_code
    if wanted is not None and len(failed) < len(results):
        if 200 <= wanted <= 599 and wanted not in STATUSES_WITHOUT_BODY:
            status = wanted
        else:
            warning = "invalid HTTP response code override from partial_failure_response_code, reverting to 400"
    return Response(status, envelope(data, warning=warning))


def prefix_of(number: int) -> str:
    """What a ciphertext of this version begins with."""
    return f"{_PREFIX}{number}:"


def parsed(text: str | None, what: str, use: str) -> tuple[int, str] | VaultError:
    """The version of a ciphertext or MAC, and the rest of it in base64."""
    if not text:
        return VaultError(f"missing {what} to {use}")
    if not text.startswith(_PREFIX):
        return VaultError(f"invalid {what}: no prefix")
    version, colon, record = text[len(_PREFIX) :].partition(":")
    if not colon:
        return VaultError(f"invalid {what}: wrong number of fields")
    if _VERSION.fullmatch(version) is None:
        return VaultError(f"invalid {what}: version number could not be decoded")
    return int(version), record


def _newest(records: Sequence[tuple[int, str] | VaultError]) -> int:
    """The highest version that ciphertexts name."""
    return max((each[0] for each in records if isinstance(each, tuple)), default=0)


def _opening(key: TransitKey, item: RecordItem, part: tuple[int, str] | VaultError) -> tuple[str, bytes, bytes]:
    """The key id, the record and the `aad` of a ciphertext. Raises VaultError."""
    if isinstance(part, VaultError):
        raise part
    key_id = key.decrypting(part[0])
    try:
        record = decode_base64(part[1])
    except VaultError:
        raise VaultError("invalid ciphertext: could not decode base64") from None
    if len(record) < api.SEAL_BYTES:
        raise VaultError("invalid ciphertext length")
    return key_id, record, _aad(key, item)


def _aad(key: TransitKey, item: RecordItem) -> bytes:
    key.check_context(item.context)
    if item.context or item.associated_data:
        return bound(item.context, item.associated_data)
    return UNBOUND
