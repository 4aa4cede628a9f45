"""node-vault from npm, unmodified, at a real gateway over TLS."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.minikms_gateway.transit.vault import ISSUER, transit_pair

VERSION = "0.12.0"
NPM_S_MAX = 300.0


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    _, npm = (needs.program(name) for name in ("node", "npm"))  # not of .ci/run, which runs no torture
    install = [npm, "install", "--no-audit", "--no-fund", f"node-vault@{VERSION}"]
    if subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=NPM_S_MAX, check=False).returncode:
        pytest.skip("needs a registry of npm packages")
    yield Path(shutil.copy(Path(__file__).with_name("node_vault.mjs"), tmp_path))


@pytest.mark.torture
def test_node_vault_works_with_a_certificate_and_with_a_token(script: Path, tmp_path: Path) -> None:
    needs.root()
    with transit_pair() as pair:
        url = f"https://localhost:{pair.gateway.port}"
        for shown in (("mtls", *map(str, pair.client().write(tmp_path))), (ISSUER.token(),)):
            command = ["node", str(script), url, str(pair.gateway.ca_file), *shown]
            run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
            assert run.returncode == 0, run.stderr
            seen = json.loads(run.stdout)
            assert (seen["health"]["initialized"], seen["sealed"]) == (True, False)
            assert seen["prefixes"] == ["vault:v1:", "vault:v2:"]
            assert seen["opened"] and seen["listed"] and seen["listedByGet"] and seen["batch"] == 2
            assert (seen["read"]["latest_version"], sorted(seen["read"]["keys"])) == (2, ["1", "2"])
            assert seen["dataKey"] == 44 and type(seen["ttl"]) is int
            assert seen["macs"] == [True, False]
            assert seen["deleted"][0] == 403
            assert seen["unknown"] == [400, "encryption key not found"]
            assert seen["renewed"][0] in (400, 403)
            assert seen.get("login", True)
