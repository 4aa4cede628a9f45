"""Which entry of a table serves a path and a method."""

import json

import pytest

from minikms.http import Routes, no_route, path_id

ROUTES = Routes(
    [
        ("GET", "/keys", "list"),
        ("GET", "/keys/{key_id}", "show"),
        ("POST", "/keys/{key_id}/destroy", "destroy"),
        ("GET", "/unseal", "state"),
        ("POST", "/unseal", "unseal"),
    ]
)


@pytest.mark.parametrize(
    ("method", "path", "entry"),
    [
        ("GET", "/keys", "list"),
        ("GET", "/keys/k_1", "show"),
        ("POST", "/keys/k_1/destroy", "destroy"),
        ("GET", "/unseal", "state"),
        ("POST", "/unseal", "unseal"),
        ("POST", "/keys", None),
        ("GET", "/keys/", None),
        ("GET", "/keys//destroy", None),
        ("POST", "//k_1/destroy", None),
        ("POST", "/keys/k_1/destroy/", None),
        ("POST", "/keys/k_1/other", None),
        ("GET", "keys", None),
        ("GET", "", None),
    ],
)
def test_the_entry_of_a_request_is_that_of_its_path_and_method(method: str, path: str, entry: str | None) -> None:
    assert ROUTES[path].get(method) == entry


def test_the_id_is_the_second_segment() -> None:
    assert path_id("/keys/k_1") == path_id("/keys/k_1/destroy") == "k_1"


def test_a_path_without_the_method_lists_the_others_and_no_path_is_404() -> None:
    answer = no_route(ROUTES["/unseal"])
    assert (answer.status, answer.headers) == (405, (("allow", "GET, POST"),))
    assert json.loads(answer.body) == {"error": "use GET or POST here", "code": "method_not_allowed"}
    answer = no_route(ROUTES["/nowhere"])
    assert (answer.status, answer.headers, json.loads(answer.body)["code"]) == (404, (), "not_found")


def test_a_path_of_its_own_is_not_the_id_of_another() -> None:
    routes = Routes([("GET", "/keys/{key_id}", "show"), ("POST", "/keys/all", "all")])
    assert (routes["/keys/all"], routes["/keys/other"]) == ({"POST": "all"}, {"GET": "show"})
