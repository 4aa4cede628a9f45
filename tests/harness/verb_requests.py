"""A request of each verb, made from the fields of its type, so that a new verb needs no line in the tests of all verbs.

Owns: a value for each name of a required field. It asserts nothing.
"""

import base64
import json
from typing import Any, get_args, get_type_hints

import msgspec

from minikms import api
from minikms.api import Verb
from minikms.client.calls import make_call


def example(verb: Verb[Any, Any], key_id: str, **members: object) -> Any:
    """A request with the required fields and `members`. Each key is `key_id`; the ciphertexts open under none."""
    return msgspec.convert(_fields(verb.request, key_id) | members, verb.request)


def _fields(kind: type[msgspec.Struct], key_id: str) -> dict[str, object]:
    ciphertext = base64.b64encode(bytes(40)).decode()
    values: dict[str, object] = {
        "key_id": key_id,
        "from_key_id": key_id,
        "to_key_id": key_id,
        "thread_id": "t",
        "plaintext": "dGV4dA==",
        "ciphertext": ciphertext,
        "count": 1,
        "slot_id": "s1",
        "provider": "file",
        "root_hex": "",
        "origin": "example.org/log",
        "log_id": "",
        "seq": 0,
        "mac": "",
        "member_id": "m2",
        "keyring_id": "kr_1",
        "name": "b",
        "fingerprint": "",
        "after": 0,
        "files": [],
        "complete": True,
        "term": 1,
        "number": 0,
        "seals": 0,
        "asked_ns": 0,
        **dict.fromkeys(("commitment", "public_key", "sealed_auth", "tombstones"), ""),
        "tombstones_after": 0,
    }
    if "items" in kind.__struct_fields__:
        (item,) = get_args(get_type_hints(kind)["items"])
        values["items"] = [_fields(item, key_id)]
    return {field.name: values[field.name] for field in msgspec.structs.fields(kind) if field.required}


def examples(key_id: str) -> dict[Verb[Any, Any], Any]:
    """Of every verb."""
    return {verb: example(verb, key_id) for verb in api.VERBS}


def spelt(verb: Verb[Any, Any], key_id: str) -> tuple[str, str, object]:
    """Method, target and body of an example."""
    call = make_call(verb, example(verb, key_id))
    return verb.method, call.target.decode(), None if call.body is None else json.loads(call.body)
