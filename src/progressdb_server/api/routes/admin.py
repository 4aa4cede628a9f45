"""Operators' reads: health, counts, all threads, stored keys and raw values; and signatures for backends.

Owns: /healthz, /v1/_sign and /admin. Invariant: a raw value is sent as it is stored, encrypted; nothing here asks the
key service to decrypt one.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from progressdb_server.api.gate import limits
from progressdb_server.api.gate.errors import ApiError, bad_request, not_found
from progressdb_server.api.gate.keys import ADMINS, BACKENDS, OPERATORS, checked_author
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import ApiResponse, JsonList, json_response, octets_response
from progressdb_server.api.openapi.description import (
    AUTHOR,
    DISK,
    INTEGER,
    NOTHING,
    STORED_KEY,
    TEXT,
    JsonBody,
    Operation,
    Parameter,
    object_of,
    ref,
    texts,
)
from progressdb_server.api.routes.paging import Paging
from progressdb_server.api.routes.threads import THREADS
from progressdb_server.conversations.whole import Conversations

INVALID_PAYLOAD: Final = 'invalid payload: send {"userId": "…"}'
PREFIX_TOO_LONG: Final = "prefix too long"
KEY_NOT_FOUND: Final = "key not found"
KEYS: Final = Paging("keys", "after", "next", re.compile(rf"[\s\S]{{1,{limits.STORED_KEY_BYTES_MAX}}}"))


class SignBody(msgspec.Struct):
    user_id: str = msgspec.field(name="userId")


_SIGN: Final = msgspec.json.Decoder(SignBody)


@Operation("GET", "/healthz", response=texts("status"), needs=NOTHING)
async def health(request: ApiRequest) -> ApiResponse:
    """Check that the server responds. No key is needed."""
    return json_response({"status": "ok"})


@Operation(
    "POST",
    "/v1/_sign",
    roles=BACKENDS,
    response=texts("userId", "signature"),
    body=JsonBody(SignBody, {"userId": {**AUTHOR, "minLength": 1}}),
    raises=(INVALID_PAYLOAD,),
    needs=NOTHING,
)
async def sign(request: ApiRequest) -> ApiResponse:
    """Sign a user id with the caller's backend key."""
    sent = await request.json(_SIGN, INVALID_PAYLOAD)
    if not sent.user_id:
        raise bad_request(INVALID_PAYLOAD)
    try:
        checked_author(sent.user_id)
    except ApiError:
        raise bad_request(INVALID_PAYLOAD) from None
    return json_response({"userId": sent.user_id, "signature": request.caller.sign(sent.user_id)})


class AdminHandlers:
    def __init__(self, store: Conversations) -> None:
        self._store = store

    @Operation("GET", "/admin/health", roles=OPERATORS, response=texts("status", "service"), needs=NOTHING)
    async def health(self, request: ApiRequest) -> ApiResponse:
        """Check that the server responds."""
        return json_response({"status": "ok", "service": "progressdb"})

    @Operation(
        "GET", "/admin/stats", roles=OPERATORS, response=object_of(threads=INTEGER, messages=INTEGER), needs=NOTHING
    )
    async def stats(self, request: ApiRequest) -> ApiResponse:
        """Count the threads, and all stored versions of messages."""
        return json_response(await self._store.stats())

    @Operation(
        "GET",
        "/admin/threads",
        roles=ADMINS,
        response=THREADS.response(ref("Thread")),
        parameters=THREADS.parameters,
        raises=THREADS.errors,
    )
    async def threads(self, request: ApiRequest) -> JsonList:
        """List the threads of all authors, including deleted threads, in order of creation; pages begin with the
        newest."""
        page = THREADS.read(request.query_params)
        return THREADS.list(self._store.threads.list_threads(author=None, include_deleted=True, page=page), page)

    @Operation(
        "GET",
        "/admin/keys",
        roles=ADMINS,
        response=KEYS.response(TEXT),
        parameters=(Parameter("prefix", STORED_KEY, "Only keys that begin with this text."), *KEYS.parameters),
        raises=(PREFIX_TOO_LONG, *KEYS.errors),
        needs=DISK,
    )
    async def keys(self, request: ApiRequest) -> JsonList:
        """List the keys of stored entries."""
        prefix = request.query_params.get("prefix", "")
        if len(prefix.encode()) > limits.STORED_KEY_BYTES_MAX:
            raise bad_request(PREFIX_TOO_LONG)
        page = KEYS.read(request.query_params)
        return KEYS.list(self._store.stored_keys(prefix, page), page)

    @Operation(
        "GET",
        "/admin/keys/{key:path}",
        roles=ADMINS,
        response={"type": "string", "format": "binary"},
        content_type="application/octet-stream",
        path_schemas={"key": {"type": "string", "minLength": 1}},
        errors={404: (KEY_NOT_FOUND,)},
        needs=DISK,
    )
    async def value(self, request: ApiRequest) -> ApiResponse:
        """Read one stored value. It is not decrypted."""
        key = request.path_params["key"]
        value = await self._store.raw_value(key) if len(key.encode()) <= limits.STORED_KEY_BYTES_MAX else None
        if value is None:
            raise not_found(KEY_NOT_FOUND)
        return octets_response(value)
