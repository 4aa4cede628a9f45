"""What clients that are not run here send, and what each takes from the answers, read from their sources.

Owns: the recordings. They were read and not captured. The clients that can be run are in
`tests/minikms_gateway/transit/test_hvac.py` and `tests/torture/test_node_vault.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from tests.minikms_gateway.transit.wrong_requests import AAD, CONTEXT, HI

GO: Final = ("Accept-Encoding: gzip", "User-Agent: Go-http-client/1.1", "X-Vault-Request: true")
"""openbao api/client.go NewRequest, and hashicorp/vault api: no Content-Type."""
SPRING: Final = ("Accept: application/json, application/*+json", "Content-Type: application/json")
V1, V2 = r"vault:v1:[^:]+", r"vault:v2:[^:]+"


class Exchange(NamedTuple):
    """`takes`: members of `data` by regular expression, type or value, if the answer is 200. `keep`: the name of its
    ciphertext in later bodies, as `{name}`.
    """

    method: str
    path: str
    body: Any = None
    takes: Mapping[str, Any] = {}
    keep: str = ""
    status: int = 200


class Recording(NamedTuple):
    """`shows`: a client certificate alone, one beside the token `mtls`, a token, or the token that a login answers."""

    shows: Literal["certificate", "mtls", "token", "login"]
    headers: tuple[str, ...]
    exchanges: tuple[Exchange, ...]


def put(path: str, body: Any, keep: str = "", **takes: Any) -> Exchange:
    """The Go client's Logical().Write."""
    return Exchange("PUT", f"transit/{path}", body, takes, keep)


def post(path: str, body: Any = None, keep: str = "", **takes: Any) -> Exchange:
    """VaultTemplate.write; an operator's request before a client starts."""
    return Exchange("POST", f"transit/{path}", body, takes, keep)


def get(path: str, status: int = 200, **takes: Any) -> Exchange:
    return Exchange("GET", path, None, takes, status=status)


def _two(key: str) -> tuple[Exchange, ...]:
    return (
        post(f"keys/{key}"),
        put(f"encrypt/{key}", {"plaintext": HI}, "one", ciphertext=str),
        put(f"decrypt/{key}", {"ciphertext": "{one}"}, plaintext=HI),
    )


_RENEWAL: Final = Exchange("PUT", "auth/token/renew-self", {"increment": 0}, status=400)  # tolerated
_LETTER: Final = {"plaintext": "YQ=="}  # SetConfig and UpgradeKeys encrypt "a"
_ROOT, _RECOVERY, _HEARTBEAT = "WyJyb290Il0=", "cmVjb3Zlcnk=", "SGVhcnRiZWF0IDE3"
_SEAL: Final = "encrypt/autounseal"
_UNSEAL: Final = "decrypt/autounseal"
SEAL_STARTS: Final = (
    post("keys/autounseal"),
    _RENEWAL,
    put(_SEAL, _LETTER, ciphertext=V1),
    put(_SEAL, {"plaintext": _ROOT}, "root", ciphertext=V1),
    put(_SEAL, {"plaintext": _RECOVERY}, "recovery", ciphertext=V1),
)
SEAL_STARTS_AGAIN: Final = (
    _RENEWAL,
    put(_SEAL, _LETTER, ciphertext=V1),
    put(_UNSEAL, {"ciphertext": "{root}"}, plaintext=_ROOT),
    put(_SEAL, {"plaintext": _HEARTBEAT}, "heartbeat", ciphertext=V1),
    put(_UNSEAL, {"ciphertext": "{heartbeat}"}, plaintext=_HEARTBEAT),
)
SEAL_AFTER_A_ROTATION: Final = (
    post("keys/autounseal/rotate"),
    _RENEWAL,
    put(_SEAL, _LETTER, ciphertext=V2),  # another key id, so it encrypts both anew
    put(_UNSEAL, {"ciphertext": "{root}"}, plaintext=_ROOT),
    put(_SEAL, {"plaintext": _ROOT}, "root", ciphertext=V2),
    put(_UNSEAL, {"ciphertext": "{recovery}"}, plaintext=_RECOVERY),
    put(_SEAL, {"plaintext": _RECOVERY}, "recovery", ciphertext=V2),
    put(_UNSEAL, {"ciphertext": "{root}"}, plaintext=_ROOT),
)
"""go-kms-wrapping wrappers/transit/transit.go SetConfig, transit_client.go; openbao vault/seal_autoseal.go."""

_LOOKUP: Final = get("auth/token/lookup-self", ttl=int, creation_ttl=int)
_VERSION: Final = get("transit/keys/kubernetes", latest_version=int)
_SPRING_KEY: Final[dict[str, Any]] = {
    "name": "spring", "type": "aes.*", "deletion_allowed": False, "derived": False, "exportable": False, "keys": dict,
    "min_decryption_version": 1, "min_encryption_version": int, "latest_version": 1, "supports_encryption": True,
    "supports_decryption": True, "supports_derivation": True, "supports_signing": False,
}  # fmt: skip
RECORDINGS: Final = {
    "sops hcvault/keysource.go": Recording("certificate", GO, _two("sops")),
    "Flux kustomize-controller internal/decryptor/decryptor.go vaultLogin, then sops": Recording("login", GO, (
        post("keys/flux"),
        put("encrypt/flux", {"plaintext": HI}, "secret", ciphertext=str),
        put("decrypt/flux", {"ciphertext": "{secret}"}, plaintext=HI),
    )),
    "gocloud secrets/hashivault/vault.go": Recording("certificate", GO, _two("gocloud")),
    "Tink integration/hcvault/hcvault_aead.go": Recording("mtls", GO, (
        post("keys/tink"),
        put("encrypt/tink", {"associated_data": "", "plaintext": HI}, "empty", ciphertext=str),
        put("decrypt/tink", {"associated_data": "", "ciphertext": "{empty}"}, plaintext=HI),
        put("encrypt/tink", {"associated_data": AAD, "plaintext": ""}, "bound", ciphertext=str),
        put("decrypt/tink", {"associated_data": AAD, "ciphertext": "{bound}"}, plaintext=""),
        put("encrypt/tink", {"context": "", "plaintext": HI}, "legacy", ciphertext=str),
        put("decrypt/tink", {"ciphertext": "{legacy}", "context": ""}, plaintext=HI),
    )),
    "vault-kubernetes-kms pkg/vault, pkg/plugin/plugin_v2.go": Recording("token", GO, (
        post("keys/kubernetes"),
        _LOOKUP,
        _VERSION,
        put("encrypt/kubernetes", {"plaintext": "aGVhbHRo"}, "health", ciphertext=str),
        _VERSION,
        put("decrypt/kubernetes", {"ciphertext": "{health}"}, plaintext="aGVhbHRo"),
        _LOOKUP,
    )),
    "spring-vault core/VaultTransitTemplate.java": Recording("token", SPRING, (
        post("keys/spring"),
        get("transit/keys/spring", **_SPRING_KEY),
        get("transit/keys?list=true", keys=list),
        get("transit/keys/nothing", 404),
        post("keys/spring-derived", {"derived": True, "type": "aes256-gcm96", "convergent_encryption": False,
                                     "exportable": False, "allow_plaintext_backup": False}),
        post("encrypt/spring", {"plaintext": HI}, "one", ciphertext=V1),
        post("decrypt/spring", {"ciphertext": "{one}"}, plaintext=HI),
        post("encrypt/spring-derived", {"plaintext": "", "context": CONTEXT}, "two", ciphertext=V1),
        post("decrypt/spring-derived", {"ciphertext": "{two}", "context": CONTEXT}, plaintext=""),
        post("keys/spring/rotate"),
        post("rewrap/spring", {"ciphertext": "{one}"}, "three", ciphertext=V2),
        post("encrypt/spring", {"plaintext": HI, "key_version": "2"}, ciphertext=V2),
        post("decrypt/spring", {"ciphertext": "{three}", "key_version": "2"}, plaintext=HI),
        post("encrypt/spring", {"batch_input": [{"plaintext": HI}, {"plaintext": ""}]}, batch_results=list),
        post("decrypt/spring", {"batch_input": [{"ciphertext": "{one}"}]}, batch_results=list),
        post("keys/spring/config",
             {"deletion_allowed": None, "min_decryption_version": 1, "min_encryption_version": None}),
        post("keys/spring-macs", {"type": "hmac"}),
        post("hmac/spring-macs", {"input": HI}, "mac", hmac=V1),
        post("hmac/spring-macs", {"algorithm": "sha2-256", "key_version": "1", "input": HI}, hmac=V1),
        post("verify/spring-macs", {"input": HI, "hmac": "{mac}", "hash_algorithm": "sha2-256"}, valid=True),
        Exchange("POST", "auth/token/renew-self", status=400),  # so it logs in again
    )),
}  # fmt: skip
