"""A browser's part without a browser: keeps cookies, sends forms, follows nothing."""

import http.client
import re
from typing import NamedTuple
from urllib.parse import urlencode


class PageReply(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str
    set_cookies: list[str]


class ViewerClient:
    def __init__(self, port: int, *, source: str = "127.0.0.1", forwarded_for: str = "") -> None:
        """`source`: the address of this machine from which it connects. `forwarded_for`: whom a proxy names as its
        client."""
        self._port = port
        self._source = source
        self._forwarded_for = forwarded_for
        self.cookies: dict[str, str] = {}
        self.csrf = ""
        """The token in the last form that was seen."""

    def __call__(self, path: str, form: dict[str, str] | None = None) -> PageReply:
        """GET, or with a form POST."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60, source_address=(self._source, 0))
        try:
            cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
            headers = {"Cookie": cookies} if cookies else {}
            if form is not None:
                headers["Content-Type"] = "application/x-www-form-urlencoded"
            if self._forwarded_for:
                headers["X-Forwarded-For"] = self._forwarded_for
            body = None if form is None else urlencode(form)
            connection.request("GET" if form is None else "POST", path, body, headers)
            answered = connection.getresponse()
            set_cookies = [value for name, value in answered.getheaders() if name.lower() == "set-cookie"]
            reply = PageReply(
                answered.status,
                {name.lower(): value for name, value in answered.getheaders()},
                answered.read().decode(),
                set_cookies,
            )
        finally:
            connection.close()
        for cookie in set_cookies:
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
            if "Max-Age=0" in cookie:
                del self.cookies[name]
        if found := re.search(r'name="csrf" value="([^"]+)"', reply.text):
            self.csrf = found[1]
        return reply

    def login(self, key: str) -> PageReply:
        self("/viewer/login")
        return self("/viewer/login", {"csrf": self.csrf, "key": key})
