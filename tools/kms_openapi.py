"""Write docs/minikms-openapi.yaml, the key service's API: `python tools/kms_openapi.py`; `--check` compares only.

Paths, roles, shapes, bounds, refusals and the status of a code come from `minikms.api`; this file adds how the fields
of a request are written. The daemon does not serve the document: its trusted code stays small.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import yaml

from minikms import api
from minikms.api import Verb, errors
from minikms_daemon.server import metrics
from minikms_daemon.server.lagging import SERVED

TARGET = Path(__file__).resolve().parents[1] / "docs" / "minikms-openapi.yaml"
Schema = dict[str, Any]

EVERYWHERE = {
    (400, api.CODE_INVALID_REQUEST),
    (401, api.CODE_UNAUTHORIZED),
    (403, api.CODE_FORBIDDEN),
    (429, api.CODE_LIMIT_EXCEEDED),
    (500, api.CODE_INTERNAL),
    (503, api.CODE_AUDIT_UNAVAILABLE),
    (503, api.CODE_TOO_MANY),
    (503, api.CODE_SHUTTING_DOWN),
}
"""What every verb may answer. With a policy file also `limit_exceeded`. `too_many` and `shutting_down` with 503 concern
the connection, whatever it asks.
"""
SERVED_SEALED = (api.STATUS, api.SEAL, api.UNSEAL_STATUS)
"""Every other verb may also answer `sealed`."""
BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
ID: Schema = {"type": "string", "pattern": f"^{api.THREAD_ID_PATTERN.pattern}$"}
KEY_ID: Schema = {"type": "string", "pattern": f"^{api.KEY_ID_PATTERN.pattern}$"}
ROOT_HEX: Schema = {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"}
REQUEST_ID: Schema = {"type": "string", "description": "An id that docs/spec/http.md does not allow is ignored."}
FIELDS: dict[str, Schema] = {
    "thread_id": ID,
    "replaces": KEY_ID,
    "key_id": KEY_ID,
    "slot_id": {"type": "string", "pattern": f"^{api.SLOT_ID_PATTERN.pattern}$"},
    "member_id": {"type": "string", "pattern": f"^{api.MEMBER_ID_PATTERN.pattern}$"},
    "root_hex": ROOT_HEX,
    "from_key_id": KEY_ID,
    "to_key_id": KEY_ID,
    "request_id": REQUEST_ID,
    "plaintext": {"type": "string", "pattern": BASE64, "description": f"At most {api.PLAINTEXT_BYTES_MAX} bytes."},
    "ciphertext": {"type": "string", "pattern": BASE64, "description": "nonce(24) | ciphertext | tag(16)."},
    "aad": {"type": "string", "pattern": BASE64, "description": f"At most {api.AAD_BYTES_MAX} bytes."},
    "count": {"type": "integer", "minimum": 1, "maximum": api.RANDOM_BYTES_MAX},
    "new_kek_hex": ROOT_HEX,
    "share": {"type": "string", "pattern": "^[-0-9A-Za-z \\t]+$", "maxLength": api.SHARE_BYTES_MAX},
    "from_source": {"const": True},
    "set_id": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
    "threshold": {"type": "integer", "minimum": 2, "maximum": 16},
    "digests": {"type": "array", "items": {"type": "string", "pattern": BASE64}, "minItems": 2, "maxItems": 16},
    "provider": {"type": "string", "pattern": "^[a-z0-9-]{1,32}$"},
}


QUERY: dict[str, Schema] = {
    "key_id": KEY_ID,
    "thread_id": {"type": "string"},
    "state": {"type": "string", "enum": ["active", "retired"]},
    "cursor": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": api.LIST_KEYS_COUNT_MAX},
}


_KEY = {"key_id": "k_01j9z3ndektsv4rrffq69g5fav"}
_AAD = {"aad": "bWVzc2FnZS0x"}
_PLAINTEXT = {"plaintext": "aGVsbG8="}
_CIPHERTEXT = {"ciphertext": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKiss"}
EXAMPLES: dict[str, tuple[Schema, Schema]] = {
    "get_or_create_dek": ({"thread_id": "thread-1", "purpose": "data"}, _KEY | {"created": True}),
    "encrypt": (_KEY | _PLAINTEXT | _AAD, _CIPHERTEXT),
    "decrypt": (_KEY | _CIPHERTEXT | _AAD, _PLAINTEXT),
}
"""The request and the answer of the verbs that a new reader tries first."""


MSGPACK_CONTENT: Schema = {api.MSGPACK: {}}
"""Without a schema: JSON Schema does not describe arrays of bytes. An answer has the content type of its request."""


def is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def structs() -> tuple[type[msgspec.Struct], ...]:
    answers = [verb.answer for verb in api.VERBS if is_struct(verb.answer)]
    return (api.ErrorAnswer, *answers, *(verb.request for verb in api.VERBS if verb.has_body))


def schemas() -> dict[str, Schema]:
    """Of every struct; what a request holds is bound as the daemon binds it."""
    _, found = msgspec.json.schema_components(structs(), ref_template="#/components/schemas/{name}")
    made = dict(sorted(found.items()))
    for name, schema in made.items():
        if "description" in schema:  # a docstring: Python 3.13 takes the indentation away, older ones leave it
            schema["description"] = " ".join(schema["description"].split())
        if name.endswith("Answer"):
            continue
        for field, bound in FIELDS.items():
            if field in schema.get("properties", {}):
                schema["properties"][field] = bound
        bounded = {"files": api.REPLICA_FILES_MAX, "members": api.MEMBERS_MAX}
        for field, maximum in bounded.items():
            if field in schema.get("properties", {}):
                schema["properties"][field]["maxItems"] = maximum
        for field in ("items", "verify"):
            if field in schema.get("properties", {}):
                maximum = api.BATCH_ITEMS_MAX if field == "items" else api.VERIFY_SAMPLES_MAX
                schema["properties"][field]["maxItems"] = maximum
        if "backups_before" in schema.get("properties", {}):
            schema["properties"]["backups_before"] = {"type": "string", "pattern": "^[0-9]{8}T[0-9]{6}$"}
    made["RootTestRequest"]["properties"].pop(api.TEST_ROOT.path_field)  # the path names it
    made["ErrorAnswer"]["properties"]["code"] = {"enum": sorted(errors.BY_CODE)}
    return made


def ref(struct: type[msgspec.Struct]) -> Schema:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}


def operation(verb: Verb[Any, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": verb.name,
        "summary": verb.summary,
        "description": f"Role: {' and '.join(verb.roles)}."
        + (" A proxy may ask on behalf of a principal." if verb.proxied else ""),
    }
    if verb.proxied:
        made["x-gateway"] = True
    parameters = []
    if name := verb.path_field:
        parameters.append({"name": name, "in": "path", "required": True, "schema": FIELDS[name]})
    elif verb.method == "GET":
        parameters += [
            {"name": field.name, "in": "query", "required": field.required, "schema": QUERY[field.name]}
            for field in msgspec.structs.fields(verb.request)
        ]
    if parameters:
        made["parameters"] = parameters
    if verb.has_body:
        content = {"application/json": {"schema": ref(verb.request)} | example(verb, 0)} | (
            MSGPACK_CONTENT if verb.is_batch else {}
        )
        made["requestBody"] = {"required": True, "content": content}
    made["responses"] = responses(verb)
    return made


def example(verb: Verb[Any, Any], index: int) -> Schema:
    return {"example": EXAMPLES[verb.name][index]} if verb.name in EXAMPLES else {}


def responses(verb: Verb[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "application/json": {"schema": ref(verb.answer) if is_struct(verb.answer) else {"type": "object"}}
        | example(verb, 1)
    }
    if verb.is_batch:
        content |= MSGPACK_CONTENT
    if verb.answer is str:
        content = {metrics.CONTENT_TYPE.partition(";")[0]: {"schema": {"type": "string"}}}
    made: dict[str, Any] = {"200": {"description": "Success.", "content": content}}
    if verb.may_answer_202:
        made["202"] = {"description": "Accepted. The work continues.", "content": content}
    codes: dict[int, set[str]] = {}
    for status, code in refusals(verb):
        codes.setdefault(status, set()).add(code)
    for status in sorted(codes):
        made[str(status)] = {
            "description": ", ".join(f"`{code}`" for code in sorted(codes[status])),
            "content": {"application/json": {"schema": ref(api.ErrorAnswer)}},
        }
    return made


def refusals(verb: Verb[Any, Any]) -> set[tuple[int, str]]:
    """Status and code of each."""
    kinds: list[type[errors.KmsRefusedError]] = [*errors.BY_CODE.values(), errors.ArenaFullError]
    found = EVERYWHERE | {(kind.status, kind.code) for kind in kinds if kind.code in verb.refusals}
    if verb not in SERVED_SEALED:
        found.add((errors.SealedError.status, errors.SealedError.code))
    if verb not in SERVED:
        found |= {(kind.status, kind.code) for kind in (errors.AuditLaggingError, errors.StandbyError)}
    if verb.has_body:
        found.add((errors.TooLargeError.status, errors.TooLargeError.code))
    if verb is api.SEAL:  # a limit never holds it up
        found.remove((errors.LimitExceededError.status, errors.LimitExceededError.code))
    return found


ERROR_CONTENT = {"application/json": {"schema": ref(api.ErrorAnswer)}}


def document() -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for verb, answer in ((api.HEALTH, "ok"), (api.READY, "ready")):
        success = {"description": "Success.", "content": {"text/plain": {"schema": {"const": answer}}}}
        refused = {}
        if verb.refusals:
            codes = ", ".join(f"`{code}`" for code in sorted(verb.refusals))
            refused["503"] = {"description": codes, "content": ERROR_CONTENT}
        operation_of = {
            "summary": verb.summary,
            "operationId": verb.name,
            "x-gateway": True,
            "responses": {"200": success, **refused},
        }
        paths[verb.path] = {verb.method.lower(): operation_of}
    for verb in api.VERBS:
        paths.setdefault(verb.path, {})[verb.method.lower()] = operation(verb)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "miniKMS",
            "version": "1",
            "description": "The key service, over a Unix socket. The peer's uid identifies the caller. A proxy of the "
            "policy file (docs/spec/policy.md) names in X-MiniKMS-Principal the principal for whom it asks; no header "
            "authenticates. docs/spec/http.md specifies the requests, docs/spec/api.md the verbs, and the form of "
            "application/msgpack: arrays with the members of the JSON objects in their order. In JSON all binary "
            "values are canonical base64. tools/kms_openapi.py generates this document.",
        },
        "servers": [
            {"url": "http://localhost", "description": "The Unix socket: the client connects to its path."},
            {
                "url": "https://{host}:8443",
                "description": "A gateway (docs/other-hosts.md). It serves the operations with `x-gateway`.",
                "variables": {"host": {"default": "kms.internal"}},
            },
        ],
        "paths": paths,
        "components": {"schemas": schemas()},
    }


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def text() -> str:
    """Schemas keep the names that they were published under: of a class `EncryptItemRequest`, `EncryptItem`."""
    dumped: str = yaml.dump(document(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return dumped.replace("ItemRequest", "Item")


def main() -> None:
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != text():
            raise SystemExit(f"{TARGET} is out of date: python tools/kms_openapi.py")
        return
    TARGET.write_text(text())


if __name__ == "__main__":
    main()
