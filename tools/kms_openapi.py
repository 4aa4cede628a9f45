"""Write docs/minikms-openapi.yaml, the key service's API: `python tools/kms_openapi.py`; `--check` compares only.

The paths and verbs come from the daemon's own table of routes, the shapes and bounds from `minikms.api`, statuses and
codes from `minikms.errors`; here is only what no code says. Served by nobody: the daemon's trusted base stays small.
An operation without an entry in `SAID`, or an entry without its operation, is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import yaml

from minikms import api, errors
from minikms.daemon import metrics
from minikms.daemon.application import Application

TARGET = Path(__file__).resolve().parents[1] / "docs" / "minikms-openapi.yaml"
Schema = dict[str, Any]
Kinds = tuple[type[errors.MiniKmsError], ...]

KEY_ERRORS: Kinds = (errors.KeyNotFoundError, errors.KeyDestroyedError, errors.KeyUnreadableError)
OPENING: Kinds = (*KEY_ERRORS, errors.WrongThreadError, errors.ArenaFullError)
ENCRYPTING: Kinds = (*OPENING, errors.KeyRetiredError, errors.KeyExhaustedError, errors.StorageUnavailableError)
WRITING: Kinds = (errors.StorageUnavailableError, errors.RequestInterruptedError)
EVERYWHERE: Kinds = (
    errors.InvalidRequestError,
    errors.UnauthorizedError,
    errors.ForbiddenError,
    errors.MiniKmsError,
    errors.AuditUnavailableError,
)
BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
ID: Schema = {"type": "string", "pattern": f"^{api.THREAD_ID_PATTERN.pattern}$"}
KEY_ID: Schema = {"type": "string", "pattern": f"^{api.KEY_ID_PATTERN.pattern}$"}
REQUEST_ID: Schema = {"type": "string", "description": "Another one than docs/spec/http.md allows is ignored."}
FIELDS: dict[str, Schema] = {
    "thread_id": ID,
    "replaces": KEY_ID,
    "key_id": KEY_ID,
    "from_key_id": KEY_ID,
    "to_key_id": KEY_ID,
    "request_id": REQUEST_ID,
    "plaintext": {"type": "string", "pattern": BASE64, "description": f"At most {api.PLAINTEXT_BYTES_MAX} bytes."},
    "ciphertext": {"type": "string", "pattern": BASE64, "description": "nonce(12) | ciphertext | tag(16)."},
    "aad": {"type": "string", "pattern": BASE64, "description": f"At most {api.AAD_BYTES_MAX} bytes."},
    "count": {"type": "integer", "minimum": 1, "maximum": api.RANDOM_BYTES_MAX},
    "new_kek_hex": {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"},
}


class Said(msgspec.Struct, frozen=True):
    summary: str
    role: str
    answer: type[msgspec.Struct] | None
    body: type[msgspec.Struct] | None = None
    refusals: Kinds = ()
    query: dict[str, tuple[Schema, bool]] = {}
    also: int = 0
    """Another good status with the same shape."""


LISTING: dict[str, tuple[Schema, bool]] = {
    "thread_id": ({"type": "string"}, False),
    "state": ({"type": "string", "enum": ["active", "retired"]}, False),
    "cursor": ({"type": "string"}, False),
    "limit": ({"type": "integer", "minimum": 1, "maximum": api.LIST_KEYS_COUNT_MAX}, False),
}
SAID: dict[str, Said] = {
    "create_dek": Said(
        "A new key for a thread, on disk before the answer", "create", api.CreateDekAnswer, api.CreateDekRequest,
        (*KEY_ERRORS, *WRITING, errors.WrongThreadError, errors.KeyExhaustedError,
         errors.ConflictError, errors.ArenaFullError),
    ),
    "encrypt": Said("Encrypt one text", "encrypt", api.EncryptAnswer, api.EncryptItem, ENCRYPTING),
    "decrypt": Said(
        "Decrypt one text", "decrypt", api.DecryptAnswer, api.DecryptItem, (*OPENING, errors.DecryptionError)
    ),
    "encrypt_batch": Said(
        "Encrypt many; each item has its own outcome", "encrypt", api.EncryptBatchAnswer, api.EncryptBatchRequest,
        (errors.TooManyError,),
    ),
    "decrypt_batch": Said(
        "Decrypt many; each item has its own outcome", "decrypt", api.DecryptBatchAnswer, api.DecryptBatchRequest,
        (errors.TooManyError,),
    ),
    "reencrypt_batch": Said(
        "Encrypt under another key of the same thread what is under one", "decrypt and encrypt",
        api.EncryptBatchAnswer, api.ReencryptBatchRequest,
        (*OPENING, errors.KeyRetiredError, errors.StorageUnavailableError, errors.WrongPurposeError,
         errors.TooManyError),
    ),
    "check_batch": Said(
        "Whether many texts open under one key; none is answered", "decrypt", api.CheckBatchAnswer,
        api.CheckBatchRequest, (*OPENING, errors.TooManyError),
    ),
    "get_wrapped": Said(
        "A key as it is sealed under the current KEK", "decrypt", api.WrappedAnswer, None, KEY_ERRORS,
        {"key_id": (KEY_ID, True)},
    ),
    "generate_data_key": Said(
        "A fresh key of the caller's own, sealed under a key of purpose `data`", "data_key", api.DataKeyAnswer,
        api.GenerateDataKeyRequest,
        (*(kind for kind in ENCRYPTING if kind is not errors.WrongThreadError), errors.WrongPurposeError),
    ),
    "random": Said("Random bytes", "data_key", api.RandomAnswer, api.RandomRequest),
    "status": Said("What an operator needs to know", "monitor", None),
    "metrics": Said("The same as numbers, for Prometheus (docs/metrics.md)", "monitor", None),
    "rotate_kek": Said(
        "Rotate the KEK, and to a new root key where one is given", "rotate", api.RotateKekAnswer,
        api.RotateKekRequest,
        (errors.ConflictError, errors.TooManyError, errors.DecryptionError, *KEY_ERRORS, *WRITING,
         errors.ArenaFullError), also=202,
    ),
    "prune_kek": Said(
        "Destroy KEK versions that no file names any more", "destroy", api.PruneKekAnswer, api.PruneKekRequest,
        (errors.ConflictError, *WRITING),
    ),
    "list_keys": Said("Keys, a page at a time", "monitor", api.KeyListAnswer, None, (), LISTING),
    "get_key": Said("One key", "monitor", api.KeyAnswer, None, KEY_ERRORS),
    "retire_key": Said(
        "From here on the key decrypts only", "create", api.KeyAnswer, None, (*KEY_ERRORS, *WRITING)
    ),
    "destroy_key": Said(
        "Destroy a retired key, and whatever only it opens", "destroy", api.DestroyKeyAnswer, api.DestroyKeyRequest,
        (errors.KeyNotFoundError, errors.KeyUnreadableError, *WRITING, errors.ConflictError),
    ),
}  # fmt: skip


def structs() -> tuple[type[msgspec.Struct], ...]:
    found: dict[type[msgspec.Struct], None] = {api.ErrorAnswer: None}
    for said in SAID.values():
        found |= {struct: None for struct in (said.answer, said.body) if struct is not None}
    return tuple(found)


def schemas() -> dict[str, Schema]:
    """Of every struct; what a request holds is bound as the daemon binds it."""
    _, made = msgspec.json.schema_components(structs(), ref_template="#/components/schemas/{name}")
    for name, schema in made.items():
        if "description" in schema:  # a docstring: Python 3.13 takes the indentation away, older ones leave it
            schema["description"] = " ".join(schema["description"].split())
        if name.endswith("Answer"):
            continue
        for field, bound in FIELDS.items():
            if field in schema.get("properties", {}):
                schema["properties"][field] = bound
        for field in ("items", "verify"):
            if field in schema.get("properties", {}):
                maximum = api.BATCH_ITEMS_MAX if field == "items" else api.VERIFY_SAMPLES_MAX
                schema["properties"][field]["maxItems"] = maximum
        if "backups_before" in schema.get("properties", {}):
            schema["properties"]["backups_before"] = {"type": "string", "pattern": "^[0-9]{8}T[0-9]{6}$"}
    made["ErrorAnswer"]["properties"]["code"] = {"enum": sorted({kind.code for kind in every_error()})}
    return made


def every_error() -> set[type[errors.MiniKmsError]]:
    found: set[type[errors.MiniKmsError]] = set()
    waiting: list[type[errors.MiniKmsError]] = [errors.MiniKmsError]
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        waiting += kind.__subclasses__()
    return found


def ref(struct: type[msgspec.Struct]) -> Schema:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}


def operation(path: str, said: Said) -> dict[str, Any]:
    made: dict[str, Any] = {
        "summary": said.summary,
        "description": f"Role: {said.role}.",
    }
    parameters = [
        {"name": name, "in": "query", "required": required, "schema": schema}
        for name, (schema, required) in said.query.items()
    ]
    if "{key_id}" in path:
        parameters.append({"name": "key_id", "in": "path", "required": True, "schema": KEY_ID})
    if parameters:
        made["parameters"] = parameters
    if said.body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": ref(said.body)}}}
    made["responses"] = responses(said)
    return made


def responses(said: Said) -> dict[str, Any]:
    answer = {"type": "object"} if said.answer is None else ref(said.answer)
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if said.summary.startswith("The same as numbers"):
        content = {metrics.CONTENT_TYPE.partition(";")[0]: {"schema": {"type": "string"}}}
    made: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    if said.also:
        made[str(said.also)] = {"description": "Begun.", "content": content}
    codes: dict[int, set[str]] = {}
    of_items = said.body in (api.EncryptBatchRequest, api.DecryptBatchRequest)
    everywhere = (kind for kind in EVERYWHERE if not (of_items and kind is errors.ForbiddenError))
    kinds = (*everywhere, *said.refusals, *((errors.TooLargeError,) if said.body else ()))
    for kind in kinds:
        codes.setdefault(kind.status, set()).add(kind.code)
    codes[503] |= {api.CODE_TOO_MANY, api.CODE_SHUTTING_DOWN}  # told to a connection, whatever it asks
    for status in sorted(codes):
        made[str(status)] = {
            "description": ", ".join(f"`{code}`" for code in sorted(codes[status])),
            "content": {"application/json": {"schema": ref(api.ErrorAnswer)}},
        }
    return made


def document() -> dict[str, Any]:
    nothing: Any = None  # no route is called
    application = Application(
        service=nothing,
        issuing=nothing,
        lifecycle=nothing,
        keks=nothing,
        policy=nothing,
        audit=nothing,
        vault=nothing,
        connections_max=api.CONNECTIONS_MAX,
    )
    paths: dict[str, dict[str, Any]] = {
        "/health": {
            "get": {
                "summary": "That the daemon answers; to everybody who can connect",
                "operationId": "health",
                "responses": {"200": {"description": "Done.", "content": {"text/plain": {"schema": {"const": "ok"}}}}},
            }
        }
    }
    operations = application.operations()
    if {verb for _, _, verb in operations} != SAID.keys():
        raise SystemExit(f"described and served differ: {SAID.keys() ^ {verb for _, _, verb in operations}}")
    for method, path, verb in operations:
        paths.setdefault(path, {})[method.lower()] = {"operationId": verb, **operation(path, SAID[verb])}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "miniKMS",
            "version": "1",
            "description": "The key service, over a Unix socket. Who asks is told by the peer's uid; no header "
            "authenticates. docs/spec/http.md says what a request may look like, docs/spec/api.md what each verb does. "
            "All binary values are canonical base64. Made by tools/kms_openapi.py.",
        },
        "paths": paths,
        "components": {"schemas": schemas()},
    }


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def text() -> str:
    return yaml.dump(document(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def main() -> None:
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != text():
            raise SystemExit(f"{TARGET} is out of date: python tools/kms_openapi.py")
        return
    TARGET.write_text(text())


if __name__ == "__main__":
    main()
