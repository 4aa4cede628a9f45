"""A real Prometheus with the shipped configuration, beside all four programs, and the queries of the dashboards."""

import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import needs
from tests.deploy import restricted
from tests.harness import message_server
from tests.harness.audited_daemon import ORIGIN, POLICY, AuditedDaemon
from tests.harness.callers import NOBODY, USER
from tests.harness.certificates import HOUR
from tests.harness.gateways import GATEWAY, Gateway
from tests.harness.message_server import Answer, Server
from tests.harness.ports import free_ports
from tests.harness.waiting import wait_until

PROJECT = Path(__file__).parents[2]
DASHBOARDS = sorted((PROJECT / "deploy" / "grafana").glob("*.json"))
PROMETHEUS = PROJECT / "deploy" / "prometheus"
PROXY_UNIT = PROJECT / "deploy" / "systemd" / "minikms-metrics.service"
[GRANT] = re.findall(r"^```sh\n(.*?)^systemctl .*```$", (PROJECT / "docs" / "metrics.md").read_text(), re.M | re.S)
OTHERS = f"""
[[grant]]
principals = ["spiffe://prod/chat"]
roles = ["create"]
threads = ["*"]
[[proxy]]
principals = ["uid:{GATEWAY}"]
on_behalf_of = ["spiffe://prod/*"]
"""
AUDITOR = """
version = 1
origin = "{origin}"
kms_socket = "{socket}"
log_dir = "{log_dir}"
state_dir = "{base}/state"
signers = ["file:{base}/signer.key"]
metrics = "127.0.0.1:{port}"
public_keys = ["{public_key}"]
sink = [{{ type = "file", name = "copy", path = "{base}/copies/copy" }}]
"""
WITHOUT_SERIES = {"minikms_auditor_witnessed_timestamp_seconds": "no witnesses are configured"}
OFTEN = "global: {scrape_interval: 500ms, evaluation_interval: 500ms}\n"
WINDOW = "1m"
REFUSALS = 20
"""Of each round: more than an alert takes for an accident."""


class Host(NamedTuple):
    """What runs, and the port that leads to the key service."""

    daemon: AuditedDaemon
    gateway: Gateway
    server: Server
    proxy_port: int
    auditor_port: int

    def ask_at_port(self, method: str, path: str, body: object = None) -> Answer:
        return Server(self.proxy_port, {}).ask(method, path, body)

    def use(self) -> None:
        """Each program serves something, and refuses something."""
        message = {"thread": "t", "author": "ada", "body": 1}
        assert self.server.ask("POST", "/v1/messages", message).status == 200
        for key, status in ((message_server.BACKEND, 200), ("wrong", 401)):
            assert self.server.ask("GET", "/v1/messages?thread=t", key=key).status == status
        issue = self.gateway.authority.issue
        with self.gateway.caller(issue(uris=["spiffe://prod/chat"])) as caller:
            assert caller.post("/create_dek_for_thread", {"thread_id": "u"}).status == 200
        expired = issue(uris=["spiffe://prod/chat"], starts=-2 * HOUR, ends=-HOUR)
        with contextlib.suppress(OSError), self.gateway.caller(expired) as caller:
            caller.get("/ready")
        for _ in range(REFUSALS):
            assert self.ask_at_port("POST", "/create_dek_for_thread", {"thread_id": "t"}).status == 403


class Prometheus:
    def __init__(self, port: int) -> None:
        self._server = Server(port, {})

    def api(self, path: str, **asked: str) -> Any:
        got = self._server.ask("GET", f"/api/v1/{path}?{urllib.parse.urlencode(asked)}")
        assert got.status == 200, (asked, got)
        return got.body["data"]

    def finds(self, query: str) -> bool:
        """Whether there is a series with a number. A query that can't be read fails the test."""
        return any(not math.isnan(float(found["value"][1])) for found in self.api("query", query=query)["result"])


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file, subprocess.Popen(command, cwd="/", stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.kill()


def as_user(uid: int, *command: str) -> list[str]:
    return [needs.program("setpriv"), f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command]


def auditor(base: Path, daemon: AuditedDaemon, port: int) -> list[str]:
    """The command of one that copies the log to a file. It has a user of its own."""
    (base / "signer.key").write_text("5a" * 32)
    for name in ("state", "copies"):
        (base / name).mkdir()
    for name in ("state", "copies", "signer.key"):
        (base / name).chmod(0o700)
        os.chown(base / name, USER, USER)
    places = {"base": base, "origin": ORIGIN, "socket": daemon.socket, "log_dir": daemon.log_dir, "port": port}
    (base / "auditor.toml").write_text(AUDITOR.format(public_key=daemon.shipped()["public_key"], **places))
    return as_user(USER, sys.executable, "-P", "-m", "minikms_auditor", f"--config={base}/auditor.toml")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    for uid in (GATEWAY, USER):
        needs.interpreter_for(uid)
    activate = needs.program("systemd-socket-activate")
    *proxy, _ = shlex.split(dict(restricted.directives(str(PROXY_UNIT)))["ExecStart"])
    proxy_port, auditor_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name, contextlib.ExitStack() as started:
        base = Path(name)
        daemon = started.enter_context(AuditedDaemon(base, policy=POLICY + OTHERS))
        grant = GRANT.replace("/etc/progressdb/policy/policy.toml", str(daemon.policy))
        subprocess.run(["sh", "-euc", grant.replace("$(id -u minikms-metrics)", str(NOBODY))], check=True)
        daemon.use_policy(daemon.policy.read_text().removeprefix("version = 1\n"))
        gateway = started.enter_context(Gateway(base, daemon.socket, crl=True))
        command = [activate, f"--listen=127.0.0.1:{proxy_port}", *as_user(NOBODY, *proxy, str(daemon.socket))]
        started.enter_context(running(command, base / "proxy.log"))
        started.enter_context(running(auditor(base, daemon, auditor_port), base / "auditor.log"))
        (base / "server").mkdir()
        settings = {"KMS_SOCKET": str(daemon.socket), "KMS_SPAWN": "0"}
        server = started.enter_context(message_server.server(base / "server", settings))
        yield Host(daemon, gateway, server, proxy_port, auditor_port)


@pytest.fixture
def prometheus(host: Host, tmp_path: Path) -> Iterator[Prometheus]:
    program, [port] = needs.program("prometheus"), free_ports(1)
    text = (PROMETHEUS / "prometheus.yml").read_text()
    scraped = (host.server.port, host.proxy_port, host.gateway.metrics_port, host.auditor_port)
    for there, here in zip((8080, 9102, 9103, 9104), scraped, strict=True):
        text = text.replace(f"127.0.0.1:{there}", f"127.0.0.1:{here}")
    (tmp_path / "prometheus.yml").write_text(OFTEN + text)
    (tmp_path / "progressdb.key").write_text(message_server.BACKEND)
    (tmp_path / "alerts.yml").symlink_to(PROMETHEUS / "alerts.yml")
    command = [program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with running([*command, f"--web.listen-address=127.0.0.1:{port}"], tmp_path / "log") as process:
        wait_until(lambda: process.poll() is not None or "ready to receive" in (tmp_path / "log").read_text())
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield Prometheus(port)


def queries() -> Iterator[str]:
    """Those of all panels and variables, for all instances."""
    for path in DASHBOARDS:
        page = json.loads(path.read_text())
        found = [target["expr"] for panel in page["panels"] for target in panel["targets"]]
        for variable in page["templating"]["list"]:
            found += re.findall(r"^label_values\((.*), instance\)$", variable["query"])
        yield from (query.replace("$instance", ".+").replace("$__rate_interval", WINDOW) for query in found)


def test_each_query_of_the_dashboards_finds_series(host: Host, prometheus: Prometheus) -> None:
    """With the configuration and the alerts that are shipped, of which each has been evaluated."""
    missing = set(queries())
    assert len(missing) > 50

    def are_found(*excepted: str) -> bool:
        host.use()
        missing.difference_update([query for query in missing if prometheus.finds(query)])
        return all(any(name in query for name in (*excepted, *WITHOUT_SERIES)) for query in missing)

    try:
        wait_until(lambda: are_found("backup"))  # without a backup an alert is pending
        assert host.server.ask("POST", "/admin/store_backup", {"name": "b"}, key=message_server.ADMIN).status == 200
        wait_until(are_found)
    finally:
        print("no series:", *sorted(missing), sep="\n")  # pytest shows it if the test fails
    rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 20 and {rule["health"] for rule in rules} == {"ok"}


def test_the_port_gives_the_roles_of_its_user_and_no_other(host: Host) -> None:
    assert b"\nminikms_up 1\n" in host.ask_at_port("GET", "/metrics").body
    assert host.ask_at_port("POST", "/create_dek_for_thread", {"thread_id": "t"}).status == 403
    logged = [
        event for event in (line["event"] for line in host.daemon.lines()) if event["actor"] == f"peer_uid:{NOBODY}"
    ]
    assert [(event["type"], event["outcome"]) for event in logged[-2:]] == [
        ("metrics", "ok"),
        ("create_dek", "forbidden"),
    ]


def test_the_dashboards_are_those_that_their_script_makes() -> None:
    needs.library("grafana_foundation_sdk")
    from tools import dashboards

    made = {name: dashboards.page(name) for name in dashboards.DASHBOARDS}
    assert {path.stem: path.read_text() for path in DASHBOARDS} == made
