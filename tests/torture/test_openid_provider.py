"""The gateway with tokens of a real OpenID provider: npm's oidc-provider, on loopback."""

import base64
import contextlib
import http.client
import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.harness.certificates import SERVER, Authority, Issued
from tests.harness.gateways import POLICY, Pair
from tests.harness.ports import free_port
from tests.harness.waiting import wait_until

VERSION = "9.13.3"
NPM_S_MAX = 300.0


class Provider:
    def __init__(self, directory: Path, clients: Authority) -> None:
        self.port = free_port()
        self.url = f"https://localhost:{self.port}"
        self.authority = Authority("provider root")
        self._clients = clients
        self._directory = directory
        node, npm = (needs.program(name) for name in ("node", "npm"))  # not of .ci/run, which runs no torture
        install = [npm, "install", "--no-audit", "--no-fund", f"oidc-provider@{VERSION}"]
        if subprocess.run(install, cwd=directory, capture_output=True, timeout=NPM_S_MAX, check=False).returncode:
            pytest.skip("needs a registry of npm packages")
        script = shutil.copy(Path(__file__).with_name("openid_provider.mjs"), directory)
        (directory / "clients.pem").write_bytes(clients.pem)
        files = self.authority.issue(dns=["localhost"], extended=[SERVER]).write(directory, "provider")
        command = [node, script, str(self.port), *map(str, files), str(directory / "clients.pem")]
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
        try:
            wait_until(self._answers)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self._directory / "log").read_text()
        with contextlib.suppress(OSError):
            return bool(self.token("chat"))
        return False

    def token(self, client: str, shown: Issued | None = None) -> str:
        context = ssl.create_default_context(cadata=self.authority.pem.decode())
        if shown is not None:
            context.load_cert_chain(*shown.write(self._directory))
        connection = http.client.HTTPSConnection("localhost", self.port, context=context, timeout=60)
        with contextlib.closing(connection):
            basic = base64.b64encode(f"{client}:secret".encode()).decode()
            form = "grant_type=client_credentials&scope=kms"
            headers = {"Authorization": f"Basic {basic}", "Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", "/token", form, headers)
            answer = json.loads(connection.getresponse().read())
        return str(answer["access_token"])


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Provider, Pair]]:
    needs.root()
    clients = Authority("clients of the provider")
    provider = Provider(tmp_path, clients)
    table = (
        f'[[issuer]]\nkind = "oidc"\nissuer = "{provider.url}"\naudience = "minikms"\nalgorithms = ["ES256"]\n'
        'ca = "issuer-ca.pem"\n'
    )
    policy = POLICY.replace("https://issuer.example", provider.url)
    try:
        with Pair(policy=policy, tables=table, files={"issuer-ca.pem": provider.authority.pem}) as pair:
            yield provider, pair
    finally:
        provider.stop()


@pytest.mark.torture
def test_tokens_of_a_real_provider_are_accepted_bound_and_unbound(both: tuple[Provider, Pair]) -> None:
    provider, pair = both
    header = (f"Authorization: Bearer {provider.token('chat')}",)
    with pair.gateway.caller() as caller:
        assert caller.ask("GET", "/status", headers=header).status == 200
    assert pair.audited()[-1]["actor"] == f"oidc:{provider.url}|chat"
    shown = pair.client()
    bound = (f"Authorization: Bearer {provider.token('bound', shown)}",)
    with pair.gateway.caller(shown) as caller:
        assert caller.ask("GET", "/status", headers=bound).status == 200
    assert pair.audited()[-1]["actor"] == f"oidc:{provider.url}|bound"
    for other, reason in ((None, "token_binding"), (pair.client(), "token_binding")):
        before = pair.gateway.refused(reason)
        with pair.gateway.caller(other) as caller:
            assert caller.ask("GET", "/status", headers=bound).status == 401
        assert pair.gateway.refused(reason) == before + 1
    before = pair.gateway.refused("token_unbound")
    with pair.gateway.caller(shown) as caller:
        assert caller.ask("GET", "/status", headers=header).status == 401
    assert pair.gateway.refused("token_unbound") == before + 1
