"""Roles: who may do what, in the table and against the real daemon."""

import os
from pathlib import Path
from typing import get_args

import pytest

from minikms import Client, api
from minikms.api import ROLES, Role
from minikms.api.errors import ForbiddenError, KmsError, StartError
from minikms.policy.policy import ADMIN_ONLY, FILE_ONLY, UIDS_COUNT_MAX, Policy, parse_uids
from tests import needs
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_daemon.server import foreign
from tests.minikms_daemon.service.asking import NO_KEY, post


def test_without_admins_an_allowed_uid_has_each_role_but_of_helpers() -> None:
    policy = Policy([1000, 1001])
    for uid in (1000, 1001):
        principal = policy.principal(uid, 7)
        assert principal is not None
        assert principal.roles == ROLES - FILE_ONLY == set(get_args(Role)) - {"ship", "replicate"}
        assert (principal.uid, principal.pid, principal.actor) == (uid, 7, f"peer_uid:{uid}")


def test_only_admins_may_rotate_destroy_audit_and_unseal() -> None:
    policy = Policy([1000], [1001])
    user, admin = policy.principal(1000, 0), policy.principal(1001, 0)
    assert user is not None and admin is not None
    assert admin.roles == ROLES - FILE_ONLY
    assert admin.roles - user.roles == ADMIN_ONLY == {"rotate", "destroy", "audit", "unseal"}
    for role in ADMIN_ONLY:
        admin.require(role)
        with pytest.raises(ForbiddenError, match=role):
            user.require(role)


@pytest.mark.parametrize("uid", [0, 999, 1002, 2**32 - 1])
def test_a_uid_that_is_not_named_has_no_role_not_even_root(uid: int) -> None:
    assert Policy([1000], [1001]).principal(uid, 1) is None


@pytest.mark.parametrize("text", ["", "x", "1000,", "-1", "1000 1001", "٣", "1" * 11, "0x10", "root"])
def test_a_malformed_list_of_uids_is_refused_with_its_source(text: str) -> None:
    with pytest.raises(StartError, match="THE_SOURCE"):
        parse_uids(text, source="THE_SOURCE")


def test_lists_of_uids_may_have_spaces_and_are_bounded() -> None:
    assert parse_uids("1000, 1001 ,0", source="s") == {0, 1000, 1001}
    uids = list(map(str, range(2**32 - 1 - UIDS_COUNT_MAX, 2**32)))
    assert len(parse_uids(",".join(uids[1:]), source="s")) == UIDS_COUNT_MAX
    with pytest.raises(StartError, match=str(UIDS_COUNT_MAX)):
        parse_uids(",".join(uids), source="s")


def versions_and_roots(status: api.StatusAnswer) -> object:
    return [(kek.version, kek.state) for kek in status.keks], status.root


def test_without_the_role_nothing_is_rotated_or_destroyed(public: Path) -> None:
    """The ransom attempt: rotate to a root key of one's own. Creating, encrypting and decrypting go on."""
    needs.root()
    flags = ("--socket-mode", "0666", "--allowed-uids", str(foreign.UID), "--admin-uids", str(os.geteuid()))
    with LiveDaemon(public, "file", *flags) as daemon, daemon.client() as admin:
        before = versions_and_roots(admin.status())

        def attempt() -> list[str]:
            codes = []
            with Client(daemon.socket, server_uids=[0]) as client:
                key_id = client.create_dek_for_thread("thread").key_id
                assert client.decrypt(key_id, client.encrypt(key_id, b"text")) == b"text"
                for forbidden in (
                    client.rotate_kek,
                    lambda: client.rotate_kek(new_kek_hex="ab" * 32),
                    lambda: client.destroy_key(key_id),
                    client.prune_kek,
                ):
                    try:
                        forbidden()
                        codes.append("done")
                    except KmsError as error:
                        codes.append(type(error).__name__)
            return codes

        assert foreign.run_as(foreign.UID, attempt) == ["ForbiddenError"] * 4
        assert versions_and_roots(admin.status()) == before
        assert admin.rotate_kek().status == "ok"


def test_the_role_is_checked_before_the_repeated_id_of_a_destruction(public: Path) -> None:
    """An attempt without the role is audited as one, not as a mistyped request. A body without an id is malformed."""
    needs.root()
    flags = ("--socket-mode", "0666", "--allowed-uids", str(foreign.UID), "--admin-uids", str(os.geteuid()))
    with LiveDaemon(public, "file", *flags) as daemon:

        def attempt() -> list[str]:
            return [post(daemon, f"/keys/{NO_KEY}/destroy", body).code for body in ({"key_id": "another"}, {})]

        assert foreign.run_as(foreign.UID, attempt) == ["forbidden", "invalid_request"]
