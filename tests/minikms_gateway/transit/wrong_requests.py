"""Wrong requests to a transit engine: what OpenBao answers, by its sources at df6ce2ceba, and where ours differs.

Owns: the table. `bao` was read, not run: without the frame `1 error occurred:`; a text that ends with `…` goes on.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

KEY, DERIVED, OTHER = "orders", "tenants", "other"
"""`orders` has two versions; `tenants` needs a context; `other` has one version; nobody made `unknown`;
`macs` is of the type hmac.
"""
HI: Final = "aGk="
CONTEXT, AAD = "Y29udGV4dA==", "YWFk"


class Wrong(NamedTuple):
    """`request`: a path below the mount, or from the root, after a method that is not POST. `body`: `{v1}` and the like
    are ciphertexts that the test puts in; bytes are sent as they are. `source`: file and function. `ours`: only what
    differs, with the reason.
    """

    request: str
    body: Any
    bao: tuple[int, str]
    source: str
    ours: tuple[int, str] | None = None
    why: str = ""


_E: Final = "path_encrypt.go pathEncryptWrite"
_D: Final = "path_decrypt.go pathDecryptWrite"
_R: Final = "path_rewrap.go pathRewrapWrite"
_H: Final = "path_hmac.go pathHMACWrite"
_V: Final = "path_hmac.go pathHMACVerify"
_K: Final = "path_datakey.go pathDatakeyWrite"
_N: Final = "path_keys.go pathPolicyWrite"
_C: Final = "path_keys_config.go pathKeysConfigWrite"
_PE: Final = "policy.go EncryptWithFactory"
_PD: Final = "policy.go DecryptWithFactory"
_OPEN: Final = "policy.go SymmetricDecryptRaw"
_DERIVE: Final = "policy.go DeriveKey"
_ITEMS: Final = "path_encrypt.go decodeBatchRequestItems"
_RANDOM: Final = "random_api.go HandleRandomAPI"
_ROUTE: Final = "framework/backend.go HandleRequest"
_HTTP: Final = "http/logical.go buildLogicalRequestNoAuth"

_NO_CONTEXT: Final = (
    "missing 'context' for key derivation; the key was created using a derived key, which means additional, "
    "per-request information must be included in order to perform operations with the key"
)
_FAILED: Final = "cipher: message authentication failed"
_BASE64: Final = "illegal base64 data at input byte 0"
_FORM: Final = (400, "the body is no JSON object of the expected form…")
_FAULT: Final = "the fault is the client's: 400, never 500"
_OWN_TEXT: Final = "its text is that of a Go library"
_BARE: Final = ((400, "illegal base64 data"), "without the place of the wrong letter")
_NO: Final = "not offered"
_ECHO: Final = "what a client sent is not sent back"
_PATH: Final = "no path of ours, like any other"
_ONE_USE: Final = "a key has one use"
_KEEPS: Final = ((403, "no key is destroyed through the gateway…"), "a principal behind a proxy destroys nothing")

WRONG: Final = (
    Wrong("encrypt/unknown", {"plaintext": HI}, (400, "encryption key not found"), _E),
    Wrong("encrypt/orders", {"context": ""}, (400, "missing plaintext to encrypt"), _E),
    Wrong("encrypt/orders", None, (400, "missing plaintext to encrypt"), _E),
    Wrong("encrypt/orders", {"plaintext": "%"}, (400, _BASE64), _E, *_BARE),
    Wrong("encrypt/orders", {"plaintext": "_-8="}, (400, _BASE64), _E, *_BARE),
    Wrong("encrypt/orders", {"plaintext": {}}, (400, "Field validation failed: …"), _ROUTE, _FORM, _OWN_TEXT),
    Wrong("encrypt/tenants", {"plaintext": HI, "context": "%"}, (400, _BASE64), _E, *_BARE),
    Wrong("encrypt/orders", {"plaintext": HI, "associated_data": "%"}, (500, "unable to get associated_data…"), _PE,
          (400, "illegal base64 data"), _FAULT),
    Wrong("encrypt/tenants", {"plaintext": HI}, (400, _NO_CONTEXT), _DERIVE),
    Wrong("encrypt/orders", {"plaintext": HI, "key_version": -1},
          (400, "requested version for encryption is negative"), _PE),
    Wrong("encrypt/orders", {"plaintext": HI, "key_version": 3},
          (400, "requested version for encryption is higher than the latest key version"), _PE),
    Wrong("encrypt/orders", {"plaintext": HI, "key_version": 1}, (200, ""), _PE,
          (400, "requested version for encryption is less than the minimum encryption key version"), "1 is retired"),
    Wrong("encrypt/orders", {"plaintext": HI, "key_version": "new"}, (400, "Field validation failed: …"), _ROUTE,
          _FORM, _OWN_TEXT),
    Wrong("encrypt/orders", {"plaintext": HI, "convergent_encryption": True}, (200, ""), _E, (400, "…convergent…"),
          "not offered; OpenBao ignores it for a key that exists"),
    Wrong("encrypt/orders", {"batch_input": []}, (400, "missing batch input to process"), _E),
    Wrong("encrypt/orders", {"batch_input": "x"}, (500, "failed to parse batch input: …"), _ITEMS, _FORM, _FAULT),
    Wrong("encrypt/orders", {"batch_input": [5]}, (500, "failed to parse batch input: …"), _ITEMS, _FORM, _FAULT),
    Wrong("encrypt/orders", {"batch_input": [{}]}, (500, "failed to parse batch input: …"), _ITEMS,
          (400, "failed to parse batch input: '[0].plaintext' missing plaintext to encrypt"), _FAULT),
    Wrong("encrypt/tenants", {"batch_input": [{"plaintext": HI, "context": CONTEXT}, {"plaintext": HI}]},
          (400, "context should be set either in all the request blocks or in none"), _E),
    Wrong("decrypt/unknown", {"ciphertext": "{v1}"}, (400, "encryption key not found"), _D),
    Wrong("decrypt/orders", {}, (400, "missing ciphertext to decrypt"), _D),
    Wrong("decrypt/orders", {"ciphertext": ""}, (400, "missing ciphertext to decrypt"), _D),
    Wrong("decrypt/orders", {"ciphertext": "abc"}, (400, "invalid ciphertext: no prefix"), _PD),
    Wrong("decrypt/orders", {"ciphertext": "vault:v1"}, (400, "invalid ciphertext: wrong number of fields"), _PD),
    Wrong("decrypt/orders", {"ciphertext": "vault:vx:aGk="},
          (400, "invalid ciphertext: version number could not be decoded"), _PD),
    Wrong("decrypt/orders", {"ciphertext": "vault:v3:aGk="}, (400, "invalid ciphertext: version is too new"), _PD),
    Wrong("decrypt/orders", {"ciphertext": "vault:v-1:aGk="},
          (400, "ciphertext or signature version is disallowed by policy (too old)"), _PD,
          (400, "invalid ciphertext: version number could not be decoded"), "no version is negative"),
    Wrong("decrypt/orders", {"ciphertext": "{as v0}"}, (200, ""), _PD,
          (400, "ciphertext or signature version is disallowed by policy (too old)"), "no record here has version 0"),
    Wrong("decrypt/orders", {"ciphertext": "vault:v1:%"}, (400, "invalid ciphertext: could not decode base64"), _PD),
    Wrong("decrypt/orders", {"ciphertext": "vault:v1:aGk="}, (400, "invalid ciphertext length"), _OPEN),
    Wrong("decrypt/orders", {"ciphertext": "{changed}"}, (400, _FAILED), _OPEN),
    Wrong("decrypt/orders", {"ciphertext": "{other}"}, (400, _FAILED), _OPEN),
    Wrong("decrypt/orders", {"ciphertext": "{relabelled}"}, (400, _FAILED), _OPEN),
    Wrong("decrypt/orders", {"ciphertext": "{aad}"}, (400, _FAILED), _OPEN),
    Wrong("decrypt/orders", {"ciphertext": "{aad}", "associated_data": HI}, (400, _FAILED), _OPEN),
    Wrong("decrypt/orders", {"ciphertext": "{aad}", "context": AAD}, (400, _FAILED), _OPEN),
    Wrong("decrypt/tenants", {"ciphertext": "{derived}", "context": HI}, (400, _FAILED), _OPEN),
    Wrong("decrypt/tenants", {"ciphertext": "{derived}"}, (400, _NO_CONTEXT), _DERIVE),
    Wrong("decrypt/orders", {"ciphertext": "{v1}", "associated_data": "%"}, (500, "unable to get associated_data…"),
          _PD, (400, "illegal base64 data"), _FAULT),
    Wrong("decrypt/orders", {"batch_input": []}, (400, "missing batch input to process"), _D),
    Wrong("rewrap/unknown", {"ciphertext": "{v1}"}, (400, "encryption key not found"), _R),
    Wrong("rewrap/orders", {}, (400, "missing ciphertext to decrypt"), _R),
    Wrong("rewrap/orders", {"ciphertext": "abc"}, (400, "invalid ciphertext: no prefix"), _PD),
    Wrong("rewrap/orders", {"ciphertext": "{changed}"}, (400, _FAILED), _OPEN),
    Wrong("rewrap/orders", {"ciphertext": "{v1}", "key_version": 3},
          (400, "requested version for encryption is higher than the latest key version"), _PE),
    Wrong("datakey/secret/orders", {}, (400, "Invalid path, must be 'plaintext' or 'wrapped'"), _K,
          (404, "unsupported path"), _PATH),
    Wrong("datakey/wrapped/unknown", {}, (400, "encryption key not found"), _K),
    Wrong("datakey/plaintext/orders", {"bits": 100}, (400, "invalid bit length"), _K, (400, "invalid bit length: …"),
          "with the only length that is offered"),
    Wrong("datakey/wrapped/tenants", {"context": "%"}, (400, "failed to base64-decode context"), _K,
          (400, "illegal base64 data"), "one text for all fields"),
    Wrong("datakey/wrapped/tenants", {}, (400, _NO_CONTEXT), _DERIVE),
    Wrong("random", {"bytes": 0}, (400, "'bytes' cannot be less than 1"), _RANDOM),
    Wrong("random", {"bytes": 131_073}, (400, "'bytes' should be less than 131072"), _RANDOM,
          (400, "'bytes' should be less than 4096"), "the bound of the native request"),
    Wrong("random", {"format": "octal"},
          (400, 'unsupported encoding format "octal"; must be "hex" or "base64"'), _RANDOM,
          (400, 'unsupported encoding format; must be "hex" or "base64"'), _ECHO),
    Wrong("keys/new", {"type": "rot13"}, (400, "unknown key type rot13"), _N, (400, "unknown key type: …"), _ECHO),
    Wrong("keys/new", {"type": "rsa-2048"}, (200, ""), _N, (400, "…"), _NO),
    Wrong("keys/new", {"convergent_encryption": True, "derived": True}, (200, ""), _N, (400, "…"), _NO),
    Wrong("keys/new", {"exportable": True}, (200, ""), _N, (400, "…exportable…"), "no key leaves the service"),
    Wrong("GET keys/unknown", None, (404, ""), "response_util.go RespondErrorCommon"),
    Wrong("keys/unknown/rotate", None, (400, "key not found"), "path_rotate.go pathRotateWrite"),
    Wrong("keys/unknown/config", {"min_decryption_version": 1},
          (400, "no existing key named unknown could be found"), _C,
          (400, "no existing key of this name could be found"), _ECHO),
    Wrong("keys/orders/config", {"min_decryption_version": -1}, (400, "min decryption version cannot be negative"), _C,
          (400, "min decryption and encryption version cannot be negative"), "one text for both"),
    Wrong("keys/orders/config", {"min_decryption_version": 3},
          (400, "cannot set min decryption version of 3, latest key version is 2"), _C,
          (400, "cannot set a min version above the latest key version, 2"), "one text for both"),
    Wrong("keys/orders/config", {"min_decryption_version": 2}, (200, ""), _C,
          (400, "min_decryption_version is not offered…"), "it would be another kind of state"),
    Wrong("keys/orders/config", {"deletion_allowed": True}, (200, ""), _C, *_KEEPS),
    Wrong("DELETE keys/orders", None, (400, "error deleting policy orders: deletion is not allowed for this key"),
          "path_keys.go pathPolicyDelete", *_KEEPS),
    Wrong("keys/orders/trim", {}, (400, "missing min_available_version"), "path_trim.go pathTrimUpdate",
          *_KEEPS),
    Wrong("GET export/encryption-key/orders", None, (400, "private key material is not exportable"),
          "path_export.go pathPolicyExportRead", (404, "unsupported path"), _PATH),
    Wrong("hmac/unknown", {"input": HI}, (400, "encryption key not found"), _H),
    Wrong("hmac/orders", {"input": HI}, (200, ""), _H, (400, "MACs need a key of the type hmac…"), _ONE_USE),
    Wrong("hmac/macs", {}, (400, "missing input for HMAC"), _H),
    Wrong("hmac/macs", {"input": "%"}, (400, "unable to decode input as base64: …"), _H, *_BARE),
    Wrong("hmac/macs", {"batch_input": []}, (400, "missing batch input to process"), _H),
    Wrong("hmac/macs", {"input": HI, "algorithm": "sha2-512"}, (200, ""), _H, (400, "unsupported algorithm…"), _NO),
    Wrong("hmac/macs/sha2-512", {"input": HI}, (200, ""), _H, (404, "unsupported path"), _PATH),
    Wrong("verify/macs", {"input": HI, "hmac": "abc"}, (400, "invalid HMAC to verify: no prefix"), _V,
          (400, "invalid HMAC: no prefix"), "the text of the other forms"),
    Wrong("verify/macs", {"input": HI, "hmac": "vault:v1"}, (400, "invalid HMAC: wrong number of fields"), _V),
    Wrong("verify/macs", {"input": HI, "hmac": "vault:vx:aGk="},
          (400, "invalid HMAC: version number could not be decoded"), _V),
    Wrong("verify/macs", {"input": HI, "hmac": "vault:v2:aGk="}, (400, "invalid HMAC: version is too new"), _V),
    Wrong("verify/macs", {"input": HI, "hmac": "vault:v0:aGk="},
          (400, "cannot verify HMAC: version is too old (disallowed by policy)"), _V),
    Wrong("encrypt/macs", {"plaintext": HI}, (400, "message encryption not supported for key type hmac"), _PE,
          (400, "message encryption and decryption are not supported for key type hmac…"), "one text for both"),
    Wrong("encrypt/orders", {"associated_data": AAD, "batch_input": [{"plaintext": HI}]}, (200, ""), _E,
          (400, "context and associated_data stand in each item…"), "nothing that binds is dropped"),
    Wrong("GET encrypt/orders", None, (405, "unsupported operation"), _ROUTE),
    Wrong("encrypt/", {}, (400, "cannot write to a path ending in '/'"), "request_handling.go handleCancelableRequest",
          (404, "unsupported path"), _PATH),
    Wrong("encrypt/a%20b", {}, (404, "unsupported path"), _ROUTE),
    Wrong("nothing/orders", {}, (404, "unsupported path"), _ROUTE),
    Wrong("/v1/elsewhere/encrypt/orders", {"plaintext": HI},
          (404, 'no handler for route "elsewhere/encrypt/orders". route entry not found.'), "router.go routeCommon",
          (404, "…"), _ECHO),
    Wrong("encrypt/orders", b"{", (400, "failed to decode JSON input: …"), _HTTP, _FORM, _OWN_TEXT),
    Wrong("encrypt/orders", b"[]", (400, "failed to decode JSON input: …"), _HTTP, _FORM, _OWN_TEXT),
)  # fmt: skip
