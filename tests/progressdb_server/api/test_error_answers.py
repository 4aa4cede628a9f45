"""Which errors of other rooms tell a client to try again later."""

import pytest

from minikms import api
from minikms.api.errors import KmsError, KmsUnavailableError, refusal
from progressdb_server.api.routes.errors import api_error
from progressdb_server.kms.provider import LIMITED, Fault, fault, is_permanent
from progressdb_server.store.model import KeyServiceRefusedError
from progressdb_server.store.sealer import store_error

PERMANENT = [api.CODE_FORBIDDEN, api.CODE_KEY_NOT_FOUND, api.CODE_WRONG_THREAD, api.CODE_TOO_LARGE]
PASSING = [
    api.CODE_UNAUTHORIZED,
    api.CODE_AUDIT_UNAVAILABLE,
    api.CODE_SHUTTING_DOWN,
    api.CODE_KEY_UNREADABLE,
    api.CODE_KEY_RETIRED,
    api.CODE_CONFLICT,
    api.CODE_TOO_MANY,
    "code_of_a_later_version",
]


@pytest.mark.parametrize("code", PERMANENT)
def test_what_the_key_service_always_refuses_is_a_500_with_its_code(code: str) -> None:
    for error in (refusal(code, "private text"), store_error(refusal(code, "private text"))):
        answer = api_error(error)
        assert answer is not None
        assert (answer.status, answer.headers, answer.text) == (500, (), str(KeyServiceRefusedError(code)))


@pytest.mark.parametrize("error", [KmsUnavailableError("away"), *(refusal(code, "private text") for code in PASSING)])
def test_what_may_be_answered_later_is_a_503_that_says_when(error: KmsError) -> None:
    for told in (error, store_error(error)):
        answer = api_error(told)
        assert answer is not None
        assert answer.status == 503
        assert [name for name, _ in answer.headers] == [b"retry-after"]
        assert "private text" not in answer.text


def test_a_write_under_a_destroyed_key_is_a_conflict_with_the_thread() -> None:
    answer = api_error(store_error(refusal(api.CODE_KEY_DESTROYED, "private text")))
    assert answer is not None
    assert (answer.status, answer.headers) == (409, ())


@pytest.mark.parametrize("retry_after_s", [0, 1, 3600])
def test_a_limit_of_the_key_service_is_a_503_that_says_when_to_try_again(retry_after_s: int) -> None:
    """429 would say that the client of this server asks too often."""
    error = refusal(api.CODE_LIMIT_EXCEEDED, "private text", 429, retry_after_s)
    for made in (error, store_error(error)):
        answer = api_error(made)
        assert answer is not None
        assert (answer.status, answer.text) == (503, LIMITED)
        assert dict(answer.headers)[b"retry-after"] in (str(max(1, retry_after_s)).encode(), b"2")
    assert fault(error) is Fault.SERVICE, "jobs wait and go on"
    assert not is_permanent(error)
