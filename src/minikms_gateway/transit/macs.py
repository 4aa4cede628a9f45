"""hmac and verify, one value or a batch.

Owns: the form of a MAC, `vault:vN:` and HMAC-SHA-256 in base64, and what it is bound to. Invariants: a new MAC is one
of the latest version; each version verifies until it is destroyed; an item that can be read costs the same, whatever
MAC and version it claims; a batch has a result for each item. It must never answer a MAC to `verify`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from hmac import compare_digest
from typing import Final

from minikms import api
from minikms_gateway.transit.encryption import parsed, prefix_of
from minikms_gateway.transit.keyring import TransitCaller, TransitKey
from minikms_gateway.transit.wire import (
    BATCH_ITEMS_MAX,
    Number,
    Short,
    TransitBody,
    VaultError,
    decode_base64,
    encode_base64,
    envelope,
)

ALGORITHM: Final = "sha2-256"
LABEL: Final = b"minikms/transit/mac/v1\0"
"""Begins the `aad` of a MAC: then the name of the key behind its length (4 bytes, big-endian)."""


class HmacItem(TransitBody):
    input: str | None = None
    hmac: str | None = None
    signature: str | None = None
    reference: Short | None = None


class Macs(HmacItem):
    batch_input: list[HmacItem] | None = None
    key_version: Number | None = None
    algorithm: Short | None = None
    hash_algorithm: Short | None = None


class HmacResult(TransitBody, omit_defaults=True):
    """The result of an item: one of `hmac`, `valid` and `error`."""

    hmac: str | None = None
    valid: bool | None = None
    error: str = ""
    reference: str | None = None


Claim = tuple[int, bytes]
"""The version and the MAC that an item of `verify` names."""


class _Macs(TransitBody, array_like=True):
    macs: list[bytes]


async def generate(caller: TransitCaller, name: str, body: Macs) -> bytes:
    items = _items(body)
    key = await caller.found(name)  # a retired key that is remembered would still make MACs
    key.check_use(macs=True)
    key.encrypts(body.key_version or 0)
    macs = await _macs(caller, name, [(key.latest_id, item.input) for item in items])
    return _answer(
        body, items, [prefix_of(key.latest) + encode_base64(mac) if isinstance(mac, bytes) else mac for mac in macs]
    )


async def verify(caller: TransitCaller, name: str, body: Macs) -> bytes:
    items = _items(body)
    claims = [_claim(item) for item in items]

    async def compare(key: TransitKey) -> list[bool | VaultError]:
        macs = await _macs(
            caller, name, [(_key_of(key, claim), item.input) for claim, item in zip(claims, items, strict=True)]
        )
        return [_verdict(key, claim, mac) for claim, mac in zip(claims, macs, strict=True)]

    newest = max((claim[0] for claim in claims if isinstance(claim, tuple)), default=0)
    return _answer(body, items, await caller.using(name, compare, at_least=newest, macs=True))


def _items(body: Macs) -> Sequence[HmacItem]:
    """The items of a request. Raises VaultError for what refuses all of them."""
    if {body.algorithm, body.hash_algorithm} - {None, "", ALGORITHM}:
        raise VaultError(f"unsupported algorithm: MACs here are of {ALGORITHM}")
    if body.batch_input is None:
        return [body]
    if not body.batch_input:
        raise VaultError("missing batch input to process")
    if len(body.batch_input) > BATCH_ITEMS_MAX:
        raise VaultError(f"a batch has at most {BATCH_ITEMS_MAX} items", 413)
    return body.batch_input


def _claim(item: HmacItem) -> Claim | VaultError:
    if item.signature:
        return VaultError("signatures are not offered: give the member hmac")
    claim = parsed(item.hmac, "HMAC", "verify")
    try:
        return claim if isinstance(claim, VaultError) else (claim[0], decode_base64(claim[1]))
    except VaultError as error:
        return error


def _key_of(key: TransitKey, claim: Claim | VaultError) -> str | VaultError:
    """The key whose MAC is compared: the latest one if there is no such version, so that this costs the same."""
    return claim if isinstance(claim, VaultError) else key.versions.get(claim[0], key.versions[key.latest]).key_id


def _verdict(key: TransitKey, claim: Claim | VaultError, mac: bytes | VaultError) -> bool | VaultError:
    if isinstance(claim, VaultError):
        return claim
    if isinstance(mac, VaultError):
        return mac
    same = compare_digest(mac, claim[1])
    if claim[0] > key.latest:
        return VaultError("invalid HMAC: version is too new")
    if claim[0] not in key.versions:
        return VaultError("cannot verify HMAC: version is too old (disallowed by policy)")
    return same


async def _macs(
    caller: TransitCaller, name: str, wanted: Sequence[tuple[str | VaultError, str | None]]
) -> list[bytes | VaultError]:
    """The MAC of each input under its key, with one request for each key. An error in place of a key stays an error."""
    results: list[bytes | VaultError] = []
    groups: defaultdict[str, list[tuple[int, bytes]]] = defaultdict(list)
    for place, (key_id, text) in enumerate(wanted):
        results.append(VaultError("missing input for HMAC") if text is None else b"")
        try:
            if isinstance(key_id, VaultError):
                raise key_id
            if text is not None:
                groups[key_id].append((place, decode_base64(text)))
        except VaultError as error:
            results[place] = error
    aad = LABEL + len(name).to_bytes(4, "big") + name.encode("ascii")
    for key_id, group in groups.items():
        answer = await caller.native(api.MAC, _Macs, body=(key_id, [(text, aad) for _, text in group]), packed=True)
        if len(answer.macs) != len(group):
            raise VaultError("the key service answered another number of items", 500)
        for (place, _), mac in zip(group, answer.macs, strict=True):
            results[place] = mac
    return results


def _answer(body: Macs, items: Sequence[HmacItem], results: Sequence[str | bool | VaultError]) -> bytes:
    if body.batch_input is None and isinstance(results[0], VaultError):
        raise results[0]
    single = body.batch_input is None
    answers = [
        _shown(result, None if single else item.reference or "") for item, result in zip(items, results, strict=True)
    ]
    return envelope(answers[0] if single else {"batch_results": answers})


def _shown(result: str | bool | VaultError, reference: str | None) -> HmacResult:
    if isinstance(result, VaultError):
        return HmacResult(error=str(result), reference=reference)
    return (
        HmacResult(valid=result, reference=reference)
        if isinstance(result, bool)
        else HmacResult(result, reference=reference)
    )
