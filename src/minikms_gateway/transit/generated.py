"""datakey and random: bytes that the key service makes."""

from __future__ import annotations

from typing import Any, Final

from minikms import api
from minikms_gateway.transit.encryption import prefix_of
from minikms_gateway.transit.keyring import TransitCaller, TransitKey
from minikms_gateway.transit.wire import Number, Short, TransitBody, VaultError, bound, decode_base64, envelope

RANDOM_BYTES_DEFAULT: Final = 32
DATA_KEY_BITS: Final = 256


class DataKey(TransitBody):
    context: str | None = None
    associated_data: str | None = None
    bits: Number | None = None
    key_version: Number | None = None


class Random(TransitBody):
    bytes: Number | None = None
    format: Short | None = None


class _DataKeyAnswer(TransitBody):
    """The base64 of both, which is passed on as it is."""

    ciphertext: str
    plaintext: str | None = None


async def data_key(caller: TransitCaller, name: str, body: DataKey, *, plaintext: bool) -> bytes:
    if body.bits not in (None, DATA_KEY_BITS):
        raise VaultError(f"invalid bit length: data keys have {DATA_KEY_BITS} bits")

    async def make(key: TransitKey) -> bytes:
        key.encrypts(body.key_version or 0)
        key.check_context(body.context)
        fields = {"key_id": key.latest_id, "aad": bound(body.context, body.associated_data), "plaintext": plaintext}
        answer = await caller.native(api.GENERATE_DATA_KEY, _DataKeyAnswer, body=fields)
        data: dict[str, Any] = {"ciphertext": prefix_of(key.latest) + answer.ciphertext, "key_version": key.latest}
        if plaintext:
            data["plaintext"] = answer.plaintext
        return envelope(data)

    return await caller.using(name, make, at_least=body.key_version or 0)


async def random(caller: TransitCaller, count: str, body: Random) -> bytes:
    """`count`: of the path, or empty."""
    if count and not (count.isascii() and count.isdigit() and len(count) < 10):
        raise VaultError("error parsing url-set byte count")
    wanted = int(count) if count else body.bytes if body.bytes is not None else RANDOM_BYTES_DEFAULT
    if wanted < 1:
        raise VaultError("'bytes' cannot be less than 1")
    if wanted > api.RANDOM_BYTES_MAX:
        raise VaultError(f"'bytes' should be less than {api.RANDOM_BYTES_MAX}")
    if body.format not in (None, "base64", "hex"):
        raise VaultError('unsupported encoding format; must be "hex" or "base64"')
    answer = await caller.native(api.RANDOM, _Random, body={"count": wanted})
    return envelope({"random_bytes": decode_base64(answer.random).hex() if body.format == "hex" else answer.random})


class _Random(TransitBody):
    random: str
