"""Versions of keys, what is remembered of them, and which path is which operation."""

from __future__ import annotations

import pytest

from minikms.http import LIMITS
from minikms.http.head import parse_head
from minikms_gateway.transit import keyring
from minikms_gateway.transit.keyring import NAME, VERSIONS_MAX, Remembered, TransitCaller, TransitKey, Version
from minikms_gateway.transit.keys import rotate
from minikms_gateway.transit.table import OPERATIONS, find
from minikms_gateway.transit.wire import TransitBody, VaultError


def key(name: str = "k", *numbers: int) -> TransitKey:
    return TransitKey(name, "data", {number: Version(f"id-{number}", 0) for number in numbers or (1,)})


def test_only_the_latest_version_encrypts() -> None:
    for number in (0, 3):
        key("k", 1, 2, 3).encrypts(number)
    for number, why in ((-1, "negative"), (2, "less than the minimum"), (4, "higher than the latest")):
        with pytest.raises(VaultError, match=why):
            key("k", 1, 2, 3).encrypts(number)


def test_a_destroyed_version_is_too_old_and_an_unknown_one_too_new() -> None:
    of = key("k", 2, 3)
    assert of.decrypting(2) == "id-2"
    for number, why in ((0, "too old"), (1, "too old"), (4, "too new")):
        with pytest.raises(VaultError, match=why):
            of.decrypting(number)


def test_what_one_principal_found_is_not_told_to_another() -> None:
    remembered = Remembered()
    remembered.put("a", key())
    assert remembered.get("a", "k") is not None
    assert remembered.get("b", "k") is None and remembered.get("a", "other") is None
    remembered.forget("a", "k")
    assert remembered.get("a", "k") is None


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "REMEMBERED_VERSIONS_MAX", 4)
    remembered = Remembered()
    for number in range(10):
        remembered.put("a", key(f"k{number}", 1, 2))
        remembered.put("a", key(f"k{number}", 1, 2))
    assert [number for number in range(10) if remembered.get("a", f"k{number}")] == [8, 9]
    remembered.put("a", key("large", 1, 2, 3, 4, 5))
    assert remembered.get("a", "large") is None


class Full(TransitCaller):
    """Of a key that has every version it may have."""

    def __init__(self) -> None:
        pass

    async def lookup(self, name: str) -> TransitKey | None:
        return key(name, *range(1, VERSIONS_MAX + 1))


async def test_a_key_gets_no_version_that_would_not_be_listed() -> None:
    """With one more, no request could find any of its versions."""
    with pytest.raises(VaultError, match="at most 8000 versions"):
        await rotate(Full(), "k", TransitBody())


@pytest.mark.parametrize("name", ["a", "A-b_c.d", "_", "0", "a" * 120])
def test_a_name_is_one_of_vault(name: str) -> None:
    assert NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a-", "a.", "a/b", "a b", "é", "a\n", "a" * 121])
def test_any_other_text_is_no_name(name: str) -> None:
    assert NAME.fullmatch(name) is None


def found(method: str, target: str, mount: str = "transit") -> tuple[str, str]:
    raw = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
    operation, name = find(parse_head(raw, LIMITS), mount)
    return operation.path, name


def test_every_operation_is_found_by_its_path_and_methods() -> None:
    for operation in OPERATIONS:
        path = operation.path.replace("{mount}", "m-1").replace("{count}", "7").replace("{}", "keys")
        wanted = "keys" if "{}" in operation.path else "7" if "{count}" in operation.path else ""
        for method in operation.methods:
            assert found(method, f"/v1/{path}", "m-1") == (operation.path, wanted)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "/v1/transit/encrypt", 404),
        ("POST", "/v1/transit/encrypt/a/b", 404),
        ("POST", "/v1/transit/datakey/other/a", 404),
        ("POST", "/v1/sys/seal", 404),
        ("POST", "/v1/transit/sys/health", 404),
        ("GET", "/v1/{mount}/keys/a", 404),
        ("GET", "/v1/transit/keys", 405),
        ("GET", "/v1/transit/keys/a?list=true", 405),
        ("PATCH", "/v1/transit/keys/a", 405),
        ("GET", "/v1/transit/keys/a?list", 400),
    ],
)
def test_anything_else_is_refused(method: str, target: str, status: int) -> None:
    with pytest.raises(VaultError) as refused:
        found(method, target.replace("{mount}", "%7Bmount%7D"))
    assert refused.value.status == status
