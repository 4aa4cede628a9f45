"""The checks in front of every route, and their order."""

import json
from typing import Any

import pytest

from progressdb_server.api.gate import limits
from progressdb_server.api.gate.access import AllowList, Proxies
from progressdb_server.api.gate.errors import MISSING_SIGNATURE, UNAUTHORIZED
from progressdb_server.api.gate.keys import KeyTable
from progressdb_server.config import ApiKeys, Cors, RateLimit
from tests.harness.logged import capture_logs
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, KEYS, OTHER_BACKEND, Api, signed

CORS_HEADERS = {
    "vary": "Origin",
    "access-control-allow-methods": "GET,POST,PUT,DELETE,PATCH,OPTIONS",
    "access-control-max-age": "600",
    "access-control-allow-headers": (
        "Authorization,Content-Type,X-API-Key,X-User-ID,X-User-Signature,Idempotency-Key,X-Identity,X-Request-Id,"
        "If-None-Match"
    ),
    "access-control-expose-headers": "X-Role-Name,Retry-After,ETag",
}
NOWHERE = ("203.0.113.0/24",)


def cors_of(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name == "vary" or name.startswith("access-control")}


# --- 1. CORS ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("allowed", "origin", "matches"),
    [
        (("https://a.example",), "https://a.example", True),
        (("https://a.example",), "HTTPS://A.Example", True),
        (("https://A.example",), "https://a.example", True),
        (("*",), "https://anything.example", True),
        (("https://a.example",), "https://b.example", False),
        (("https://a.example",), "https://a.example.evil", False),
        (("https://a.example",), "null", False),
        ((), "https://a.example", False),
    ],
)
def test_cors_headers_are_sent_for_an_allowed_origin_and_for_no_other(
    allowed: tuple[str, ...], origin: str, matches: bool
) -> None:
    reply = Api(cors=Cors(allowed_origins=allowed))("GET", "/healthz", key=None, headers={"Origin": origin})
    expected = {"access-control-allow-origin": origin, **CORS_HEADERS} if matches else {}
    assert cors_of(reply.headers) == expected


def test_a_request_without_an_origin_gets_no_cors_headers() -> None:
    assert cors_of(Api(cors=Cors(allowed_origins=("*",)))("GET", "/healthz", key=None).headers) == {}


def test_an_origin_that_is_sent_twice_matches_nothing() -> None:
    twice = [("Origin", "https://a.example"), ("Origin", "https://a.example")]
    reply = Api(cors=Cors(allowed_origins=("*",)))("GET", "/healthz", key=None, headers=twice)
    assert (reply.status, cors_of(reply.headers)) == (200, {})


@pytest.mark.parametrize(("key", "status"), [(None, 401), (BACKEND, 404)])
def test_refusals_carry_cors_headers_too(key: str | None, status: int) -> None:
    api = Api(cors=Cors(allowed_origins=("*",)))
    reply = api("GET", "/nowhere", key=key, headers={"Origin": "https://a.example"})
    assert reply.status == status
    assert reply.headers["access-control-allow-origin"] == "https://a.example"


# --- 2. OPTIONS -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/v1/messages", "/admin/keys", "/healthz", "/nowhere"])
def test_options_is_answered_before_address_key_and_rate(path: str) -> None:
    api = Api(ip_whitelist=NOWHERE, rate_limit=RateLimit(rps=1, burst=1), cors=Cors(allowed_origins=("*",)))
    for _ in range(3):
        reply = api("OPTIONS", path, key=None, headers={"Origin": "https://a.example"})
        assert (reply.status, reply.body) == (204, b"")
        assert reply.headers["access-control-allow-origin"] == "https://a.example"


# --- 3. client address ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("entries", "address", "admitted"),
    [
        ((), "198.51.100.7", True),
        (("198.51.100.7",), "198.51.100.7", True),
        (("198.51.100.7",), "198.51.100.8", False),
        (("198.51.100.0/24",), "198.51.100.200", True),
        (("198.51.100.0/24",), "198.51.101.1", False),
        (("198.51.100.0/24",), "::ffff:198.51.100.9", True),
        (("2001:db8::/32",), "2001:db8:1::5", True),
        (("2001:db8::/32",), "2001:db9::1", False),
        (("2001:db8::/32",), "198.51.100.7", False),
        (("198.51.100.7", "2001:db8::1"), "2001:db8::1", True),
        (("198.51.100.7",), "", False),
        (("198.51.100.7",), "not an address", False),
    ],
)
def test_the_allow_list_takes_addresses_and_networks(entries: tuple[str, ...], address: str, admitted: bool) -> None:
    allowed = AllowList(entries)
    assert [allowed.admits(address), allowed.admits(address)] == [admitted, admitted]


def test_the_allow_list_remembers_a_bounded_number_of_addresses() -> None:
    allowed = AllowList(("10.0.0.0/8",))
    assert all(allowed.admits("10.0.0.1") for _ in range(2))
    seen = allowed.is_listed.cache_info()
    assert (seen.hits, seen.currsize, seen.maxsize) == (1, 1, limits.ADDRESSES_COUNT_MAX)


@pytest.mark.parametrize("path", ["/healthz", "/v1/messages", "/nowhere"])
def test_an_address_outside_the_list_is_refused_whatever_its_key(path: str) -> None:
    for key in (None, "unknown", BACKEND, ADMIN):
        reply = Api(ip_whitelist=NOWHERE)("GET", path, key=key, client="198.51.100.7")
        assert (reply.status, reply.error) == (403, "forbidden")


def test_a_forwarded_address_is_not_believed() -> None:
    reply = Api(ip_whitelist=NOWHERE)("GET", "/healthz", headers={"X-Forwarded-For": "203.0.113.5"})
    assert reply.status == 403


# --- 4. API key -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"X-API-Key": BACKEND}, 200),
        ({"Authorization": f"Bearer {BACKEND}"}, 200),
        ({"Authorization": f"bearer {BACKEND}"}, 200),
        ({"Authorization": f"BEARER   {BACKEND}"}, 200),
        ({"Authorization": BACKEND}, 401),
        ({"Authorization": f"Basic {BACKEND}"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"X-API-Key": ""}, 401),
        ({"X-API-Key": "unknown"}, 401),
        ({"X-API-Key": BACKEND[:-1]}, 401),
        ({"X-API-Key": BACKEND + "x"}, 401),
        ({"X-API-Key": BACKEND.upper()}, 401),
        ({"X-API-Key": BACKEND, "Authorization": f"Bearer {BACKEND}"}, 200),
        ({"X-API-Key": BACKEND, "Authorization": f"Bearer {ADMIN}"}, 401),
        ({"X-API-Key": BACKEND, "Authorization": "Basic dXNlcjpwYXNz"}, 200),
        ({"X-API-Key": "kéy"}, 401),
    ],
)
def test_a_key_comes_as_bearer_or_as_x_api_key(headers: dict[str, str], status: int) -> None:
    reply = Api()("GET", "/admin/health", key=None, headers=headers)
    assert reply.status == status
    if status == 401:
        assert reply.error == UNAUTHORIZED
        assert reply.headers["www-authenticate"] == "Bearer"


def test_a_key_that_was_replaced_is_unknown() -> None:
    after = Api(api_keys=ApiKeys(backend=(OTHER_BACKEND,)))
    assert after("GET", "/admin/health", key=BACKEND).status == 401
    assert after("GET", "/admin/health", key=OTHER_BACKEND).status == 200


def test_every_configured_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[bytes] = []
    real = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return real(one, other)

    keys = KeyTable(backend=("a", "b"), frontend=("c",), admin=("d",))
    monkeypatch.setattr(hmac, "compare_digest", counting)
    for presented in (b"a", b"d", b"unknown"):
        compared.clear()
        keys.find(presented)
        assert len(compared) == 4


def test_no_key_is_in_a_repr() -> None:
    caller = KeyTable(backend=("s3cret-key",)).find(b"s3cret-key")
    assert "s3cret" not in repr(caller)
    assert "s3cret" not in repr(ApiKeys(backend=("s3cret-key",)))
    assert "s3cret" not in str(ApiKeys(admin=("s3cret-key",)))


def test_health_needs_no_key_and_nothing_else_does_without() -> None:
    assert Api()("GET", "/healthz", key=None).json == {"status": "ok"}
    for path in ("/healthz/", "/readyz/", "/v1/messages", "/admin/health", "/metrics", "/nowhere"):
        assert Api()("GET", path, key=None).status == 401, path


# --- unauthenticated access -------------------------------------------------------------------------------------
OPEN = ApiKeys(backend=(BACKEND,), admin=(ADMIN,), allow_unauth=True)


@pytest.mark.parametrize("key", [None, "unknown"])
def test_a_caller_allowed_without_a_key_needs_a_signature_and_is_no_admin(key: str | None) -> None:
    api = Api(api_keys=OPEN)
    unsigned = api("GET", "/v1/threads", key=key)
    assert (unsigned.status, unsigned.error) == (401, MISSING_SIGNATURE)
    assert api("GET", "/v1/threads", key=key, headers=signed("alice")).status == 200
    for path in ("/admin/health", "/admin/keys", "/metrics", "/v1/_sign", "/nowhere"):
        refused = api("GET", path, key=key, headers=signed("alice"))
        assert (refused.status, refused.error) == (403, "forbidden"), path


# --- 5. front-end keys ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/health"),
        ("GET", "/admin/keys"),
        ("POST", "/v1/_sign"),
        ("GET", "/metrics"),
        ("GET", "/nowhere"),
        ("GET", "/v1/messagesx"),
        ("GET", "/v1"),
        ("GET", "/v1/threadsx/1"),
    ],
)
def test_a_signed_front_end_key_reaches_messages_and_threads_only(method: str, path: str) -> None:
    reply = Api()(method, path, key=FRONTEND, headers=signed("alice"))
    assert (reply.status, reply.error) == (403, "forbidden")


def test_a_front_end_key_needs_a_signed_user() -> None:
    for headers in ({}, {"X-User-ID": "alice"}, {"X-User-Signature": "00"}, {"X-User-ID": "", "X-User-Signature": ""}):
        reply = Api()("GET", "/v1/threads", key=FRONTEND, headers=headers)
        assert (reply.status, reply.error) == (401, MISSING_SIGNATURE)


# --- 6. rate ----------------------------------------------------------------------------------------------------
def limited(rps: float = 2, burst: int = 3, **more: Any) -> Api:
    return Api(rate_limit=RateLimit(rps=rps, burst=burst), **more)


def test_a_key_may_call_burst_times_at_once_and_then_as_its_rate_allows() -> None:
    api = limited()
    assert [api("GET", "/admin/health").status for _ in range(4)] == [200, 200, 200, 429]
    api.now_s += 0.5
    assert [api("GET", "/admin/health").status for _ in range(2)] == [200, 429]
    api.now_s += 3600
    assert [api("GET", "/admin/health").status for _ in range(4)] == [200, 200, 200, 429]


def test_the_answer_to_a_limited_caller_says_when_to_retry() -> None:
    api = limited(rps=0.1, burst=1)
    api("GET", "/admin/health")
    reply = api("GET", "/admin/health")
    assert (reply.status, reply.error, reply.headers["retry-after"]) == (
        429,
        "rate limit exceeded (PROGRESSDB_RATE_RPS)",
        "10",
    )


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_long_body_of_a_user_costs_more_than_a_short_one(chunks: int) -> None:
    api = limited(rps=1, burst=3)
    body = json.dumps({"thread": "t", "body": "x" * 40_000}).encode()
    parts = {} if chunks == 1 else {"chunks": [body[:20_000], body[20_000:30_000], body[30_000:]]}

    def posts(user: str, raw: bytes, **more: Any) -> int:
        return api("POST", "/v1/messages", raw=raw, key=FRONTEND, headers=signed(user), **more).status

    assert [posts("ann", body, **parts) for _ in range(2)] == [200, 429], "three tokens each"
    short = b'{"body": "x"}'
    assert [posts("ben", short) for _ in range(4)] == [200, 200, 200, 429]
    headers = {"X-User-ID": "eve"}
    assert [api("POST", "/v1/messages", raw=body, headers=headers).status for _ in range(2)] == [200, 200], "a backend"


def test_each_key_has_a_bucket_of_its_own_from_wherever_it_calls() -> None:
    api = limited(burst=1)
    assert api("GET", "/admin/health", key=BACKEND).status == 200
    assert api("GET", "/admin/health", key=BACKEND, client="198.51.100.7").status == 429
    assert api("GET", "/admin/health", key=OTHER_BACKEND).status == 200
    assert api("GET", "/admin/health", key=ADMIN).status == 200


def test_without_a_key_the_address_is_what_is_limited() -> None:
    api = limited(burst=1)
    assert api("GET", "/docs/", key=None, client="198.51.100.7").status == 200
    assert api("GET", "/docs/", key=None, client="198.51.100.7").status == 429
    assert api("GET", "/docs/", key=None, client="198.51.100.8").status == 200
    assert api("GET", "/docs/", key=None, client="2001:db8::1").status == 200
    assert api("GET", "/docs/", key=None, client="2001:db8::2").status == 429  # of the same /64


def test_probes_take_no_token_and_are_answered_when_there_is_none() -> None:
    api = limited(burst=1)
    for _ in range(3):
        api("GET", "/admin/health", key="unknown")
        assert api("GET", "/healthz", key=None).status == 200
        assert api("GET", "/healthz", key="unknown").status == 200
    assert api("GET", "/docs/", key=None).status == 200
    assert api("GET", "/docs/", key=None).status == 429
    assert Api(ip_whitelist=NOWHERE)("GET", "/healthz", key=None).status == 403


# --- proxies ----------------------------------------------------------------------------------------------------
NAMED = ("10.0.0.0/8", "2001:db8:aaaa::/48")
FORWARDED: list[tuple[str, list[str], str]] = [
    ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
    ("::ffff:10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
    ("2001:db8:aaaa::1", ["2001:db8:bbbb::7"], "2001:db8:bbbb::7"),
    ("10.0.0.1", ["198.51.100.7:4711"], "198.51.100.7"),
    ("10.0.0.1", ["[2001:db8:bbbb::7]:443"], "2001:db8:bbbb::7"),
    ("10.0.0.1", ["\t 198.51.100.7 "], "198.51.100.7"),
    # what the client itself wrote
    ("10.0.0.1", ["203.0.113.1, 198.51.100.7"], "198.51.100.7"),
    ("10.0.0.1", ["203.0.113.1", "198.51.100.7"], "198.51.100.7"),
    ("10.0.0.1", ["10.0.0.9, 198.51.100.7"], "198.51.100.7"),
    # a chain of named proxies
    ("10.0.0.1", ["203.0.113.1, 198.51.100.7, 10.0.0.3, 10.0.0.2"], "198.51.100.7"),
    ("10.0.0.1", ["198.51.100.7", "10.0.0.2"], "198.51.100.7"),
    ("10.0.0.1", [", ".join(["198.51.100.7", *["10.0.0.2"] * 15])], "198.51.100.7"),
    # nothing that can be believed: the proxy itself
    ("10.0.0.1", [], "10.0.0.1"),
    ("10.0.0.1", [""], "10.0.0.1"),
    ("10.0.0.1", ["198.51.100.7, unknown"], "10.0.0.1"),
    ("10.0.0.1", ["198.51.100.7, "], "10.0.0.1"),
    ("10.0.0.1", ["fe80::1%eth0"], "10.0.0.1"),
    ("10.0.0.1", ["\udcff"], "10.0.0.1"),
    ("10.0.0.1", ["198.51.100.7, 10.0.0.2x, 10.0.0.3"], "10.0.0.3"),
    ("10.0.0.1", [", ".join(["198.51.100.7", *["10.0.0.2"] * 16])], "10.0.0.2"),
    # no named proxy
    ("198.51.100.9", ["203.0.113.1"], "198.51.100.9"),
    ("", ["203.0.113.1"], ""),
]


@pytest.mark.parametrize(("peer", "values", "client"), FORWARDED)
def test_a_named_proxy_says_for_whom_it_speaks(peer: str, values: list[str], client: str) -> None:
    headers = [(b"x-forwarded-for", value.encode("utf-8", "surrogateescape")) for value in values]
    assert Proxies(NAMED).client(peer, [(b"host", b"x"), *headers]) == client
    assert Proxies().client(peer, headers) == peer


def test_each_client_of_a_named_proxy_has_the_rates_of_its_own_address() -> None:
    """One that guesses keys, or reads the documentation, refuses nothing to another one."""
    api = limited(burst=1, proxies=NAMED)

    def ask(path: str, client: str, peer: str = "10.0.0.1") -> int:
        return api("GET", path, key="unknown", headers={"X-Forwarded-For": client}, client=peer).status

    assert [ask("/admin/health", "198.51.100.7") for _ in range(3)] == [401, 429, 429]
    assert [ask("/docs/", "198.51.100.7") for _ in range(2)] == [200, 429]
    assert [ask(path, "198.51.100.8") for path in ("/admin/health", "/docs/")] == [401, 200]
    assert ask("/docs/", "198.51.100.7", "10.9.9.9") == 429  # through another proxy
    assert [ask("/docs/", f"198.51.100.{number}", "203.0.113.1") for number in (1, 2)] == [200, 429]  # not a named one


def test_the_allow_list_judges_the_proxy_and_not_whom_it_speaks_for() -> None:
    for allowed, status in ((("10.0.0.1",), 401), (("198.51.100.7",), 403)):
        api = Api(ip_whitelist=allowed, proxies=NAMED)
        headers = {"X-Forwarded-For": "198.51.100.7"}
        assert api("GET", "/admin/health", key=None, headers=headers, client="10.0.0.1").status == status


def test_a_rate_of_zero_turns_the_limit_off() -> None:
    api = limited(rps=0, burst=1)
    assert {api("GET", "/admin/health").status for _ in range(50)} == {200}


WRONG: list[tuple[str, str, dict[str, str], int]] = [
    ("/admin/health", "unknown", {}, 401),
    ("/admin/health", FRONTEND, {}, 403),
    ("/v1/threads", FRONTEND, {}, 401),
    ("/v1/threads", FRONTEND, {"X-User-ID": "alice", "X-User-Signature": "0"}, 401),
    ("/v1/threads", BACKEND, {"X-User-ID": "alice", "X-User-Signature": "0"}, 401),
]


@pytest.mark.parametrize(("path", "key", "headers", "status"), WRONG)
def test_refused_callers_are_limited_by_address_and_starve_nobody(
    path: str, key: str, headers: dict[str, str], status: int
) -> None:
    api = limited(burst=2)
    assert [api("GET", path, key=key, headers=headers).status for _ in range(4)] == [status, status, 429, 429]
    assert api("GET", path, key=key, headers=headers, client="198.51.100.7").status == status
    for user in ("alice", "bob"):
        assert api("GET", "/v1/threads", key=FRONTEND, headers=signed(user)).status == 200
    assert api("GET", "/admin/health").status == 200
    assert api("GET", "/healthz", key=None).status == 200


def test_each_user_of_a_front_end_key_has_a_bucket() -> None:
    api = limited(burst=2)
    statuses = [api("GET", "/v1/threads", key=FRONTEND, headers=signed("alice")).status for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    assert api("GET", "/v1/threads", key=FRONTEND, headers=signed("bob")).status == 200
    elsewhere = api("GET", "/v1/threads", key=FRONTEND, headers=signed("alice"), client="198.51.100.7")
    assert elsewhere.status == 429


def test_refused_callers_are_one_log_line_a_second_with_their_count(caplog: pytest.LogCaptureFixture) -> None:
    api = Api()
    with capture_logs() as lines:
        for _ in range(50):
            api("GET", "/admin/health", key="unknown")
        api.now_s += 1
        api("GET", "/v1/threads", key=FRONTEND)
    refused = [line for line in lines if line["event"] == "callers refused"]
    assert [line["count"] for line in refused] == [1, 50]
    assert all(line["log_level"] == "debug" for line in lines if line["event"] == "request")


# --- request ids ------------------------------------------------------------------------------------------------
def test_every_answer_has_a_request_id_and_keeps_a_valid_one_sent() -> None:
    api = Api(ip_whitelist=())
    for key, path in ((None, "/healthz"), (None, "/nowhere"), (BACKEND, "/nowhere"), (BACKEND, "/v1/threads")):
        assert api("GET", path, key=key).headers["x-request-id"].startswith("r-")
    assert api("GET", "/healthz", headers={"X-Request-Id": "abc-123"}).headers["x-request-id"] == "abc-123"
    assert api("OPTIONS", "/healthz", headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", 'a"b', "a\\b"])
def test_an_invalid_request_id_is_replaced(given: str) -> None:
    assert Api()("GET", "/healthz", headers={"X-Request-Id": given}).headers["x-request-id"].startswith("r-")


def test_two_requests_never_share_a_made_request_id() -> None:
    api = Api()
    made = {api("GET", "/healthz").headers["x-request-id"] for _ in range(50)}
    assert len(made) == 50


def test_the_keys_of_the_tests_are_of_each_role() -> None:
    assert (len(KEYS.backend), len(KEYS.frontend), len(KEYS.admin)) == (2, 1, 1)
