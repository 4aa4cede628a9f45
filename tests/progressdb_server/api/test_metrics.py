"""The metrics of the programs, the page that explains them, and the alerts, held against each other."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from platform import python_version
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import minikms
from minikms import api
from minikms.http.page import metrics_page
from minikms.platform import process_metrics
from minikms_auditor.auditor import Status, WitnessStatus
from minikms_auditor.metrics import AuditorCollector
from minikms_auditor.sinks import SinkStatus
from minikms_daemon.server.metrics import BATCH_SIZES, VerbTimes, WeightedHistogram, _add_replica, _Page, page
from minikms_gateway.metrics import GAUGES, GatewayCollector
from minikms_replicator.metrics import Figures, ReplicatorCollector
from progressdb_server.metrics import KmsMetrics
from tests import needs
from tests.harness.unix_http import unix_request
from tests.progressdb_server.api.asgi_client import ADMIN
from tests.progressdb_server.api.real_server import RealServer, real_server

PROJECT = Path(__file__).resolve().parents[3]


ALERTS = PROJECT / "deploy" / "prometheus" / "alerts.yml"
COMMON = re.compile(r"process_.*|.*_build_info")
"""The metrics of every process."""
PAGE = PROJECT / "docs" / "metrics.md"
RUNBOOK = PROJECT / "docs" / "runbook.md"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with real_server(Path(tmp_path_factory.mktemp("metrics"))) as started:
        thread = started("POST", "/v1/threads", {"title": "T", "author": "alice"}).json["id"]
        for number in range(3):
            started("POST", "/v1/messages", {"thread": thread, "author": "alice", "body": number})
        started("GET", f"/v1/messages?thread={thread}")
        yield started


@pytest.fixture(scope="module")
def pages(server: RealServer) -> dict[str, str]:
    daemon = unix_request(server.db / "run" / "minikms.sock", "/metrics")
    assert daemon.status == 200
    assert daemon.headers["content-type"].startswith("text/plain; version=0.0.4")
    counted = GatewayCollector({"encrypt": 1}, {"expired": 1}, lambda: dict.fromkeys(GAUGES, 0))
    gateway = metrics_page(counted, "minikms_gateway_build_info")
    witnesses = (WitnessStatus("witness.example/w1", "http://w1", 0, ""),)
    seen = Status("kms.example/audit", (), witnesses=witnesses, sinks=(SinkStatus("siem", required=True),))
    auditor = metrics_page(AuditorCollector(lambda: seen), "minikms_auditor_build_info")
    made = _Page()
    _add_replica(made, {"mode": "serving", "term": 1, "lease_seconds": 9.0, "lag_changes": 0, "heard_seconds": None}, 1)
    figures = Figures(serving=True, commits=1, commit_s=0.1, failures=0, confirmed_s=1.0)
    replicator = metrics_page(ReplicatorCollector(lambda: figures), "minikms_replicator_build_info")
    return {
        "progressdb": server("GET", "/metrics").body.decode(),
        "minikms": daemon.body.decode() + made.encode().decode(),
        "minikms-gateway": gateway.page().decode(),
        "minikms-auditor": auditor.page().decode(),
        "minikms-replicator": replicator.page().decode(),
    }


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def explained() -> dict[str, str]:
    """Name → type, from the tables of the page: of a counter the name says it, of a histogram its value."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (histogram: )?", PAGE.read_text(), re.MULTILINE)
    return {
        name: "counter" if name.endswith("_total") else "histogram" if histogram else "gauge"
        for name, histogram in rows
    }


def test_every_metric_is_explained_and_every_explained_one_is_there(pages: dict[str, str]) -> None:
    served = {}
    for text in pages.values():
        for name, family in families(text).items():
            if not COMMON.fullmatch(name) and not name.endswith("_created"):
                served[f"{name}_total" if family.type == "counter" else name] = family.type
    assert explained() == served


def test_every_process_reports_its_build_and_its_use_of_the_machine(pages: dict[str, str]) -> None:
    """Also the key service, which is hardened and opens no file of procfs."""
    built = {"version": minikms.__version__, "commit": process_metrics.build().commit, "python": python_version()}
    for program, text in pages.items():
        read = families(text)
        [build] = read[f"{program.replace('-', '_')}_build_info"].samples
        assert (build.labels, build.value) == (built, 1)
        cpu_s, files_max, files, memory_bytes, started_s = (
            read[f"process_{name}"].samples[0].value
            for name in ("cpu_seconds", "max_fds", "open_fds", "resident_memory_bytes", "start_time_seconds")
        )
        assert cpu_s > 0 and memory_bytes > 2**20 and 2 < files <= files_max
        assert time.time() - 86400 < started_s < time.time()


def test_the_pages_count_what_happened(pages: dict[str, str]) -> None:
    def value(program: str, sample: str, **labels: str) -> float:
        (found,) = [
            float(one.value)
            for family in families(pages[program]).values()
            for one in family.samples
            if one.name == sample and labels.items() <= one.labels.items() and one.labels.get("le", "+Inf") == "+Inf"
        ]
        return found

    assert value("progressdb", "progressdb_http_requests_total", route="/v1/messages", method="POST", status="200") == 3
    assert value("progressdb", "progressdb_kms_up") == 1
    assert value("progressdb", "progressdb_kms_request_duration_seconds_count", verb="create_dek_for_thread") == 1
    assert value("minikms", "minikms_requests_total", verb="create_dek") == 1
    sealed = value("minikms", "minikms_requests_total", verb="encrypt")
    sealed += value("minikms", "minikms_batch_items_sum", verb="encrypt_batch")
    assert sealed >= 4  # a thread's metadata and three messages
    assert value("minikms", "minikms_request_duration_seconds_count", verb="create_dek") == 1
    assert 0 < value("minikms", "minikms_request_duration_seconds_sum", verb="create_dek") < 10
    assert value("minikms", "minikms_keys", state="active") == 1
    assert value("minikms", "minikms_audit_writable") == 1


def test_alerts_are_accepted_and_use_metrics_that_there_are() -> None:
    done = subprocess.run(
        [needs.program("promtool"), "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    used = set(re.findall(r"\b((?:progressdb|minikms)_[a-z_]+)\b(?!\")", ALERTS.read_text()))
    assert used
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} - explained().keys() == set()


@pytest.mark.parametrize(
    ("alert", "series", "values"),
    [
        ("MinikmsGatewayCertificateExpires", "minikms_gateway_certificate_expiry_timestamp_seconds", "90000x100"),
        ("MinikmsGatewayCertificateExpires", "minikms_gateway_crl_expiry_timestamp_seconds", "90000x100"),
        ("MinikmsRootLeaseNotGranted", 'minikms_condition{condition="root_key_lease_ending"}', "0x58 1x40"),
        ("MinikmsGatewayRefusesExpired", 'minikms_gateway_refused_total{reason="expired"}', "0x60 1x40"),
        ("MinikmsRootLeaseEnded", "progressdb_kms_sealed", "0x60 1x40"),
        ("ProgressdbBackupOld", 'progressdb_condition{condition="backup_old"}', "1x100"),
        ("ProgressdbBackupOld", 'progressdb_condition{condition="backups_unknown"}', "1x100"),
    ],
)
def test_an_alert_fires_when_its_time_has_come(tmp_path: Path, alert: str, series: str, values: str) -> None:
    """Not at the start of the series, but 61 minutes later. For half an hour there is a lease."""
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    cases = [("0m", []), ("61m", [{"labels": "{}", "value": 1}])]
    asked = [{"expr": firing, "eval_time": when, "exp_samples": samples} for when, samples in cases]
    inputs = {series: values, "minikms_root_lease_seconds": "300x30"}
    listed = [{"series": name, "values": value} for name, value in inputs.items()]
    given = {"interval": "1m", "input_series": listed, "promql_expr_test": asked}
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "tests": [given]}))
    done = subprocess.run(
        [needs.program("promtool"), "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_leads_to_the_section_that_the_runbook_names_for_it() -> None:
    rules = re.findall(r"- alert: (\w+)\n(.*?)(?=\n      - alert:|\n  - name:|\Z)", ALERTS.read_text(), re.DOTALL)
    assert len(rules) == ALERTS.read_text().count("- alert: ")
    for alert, rule in rules:
        [anchor] = re.findall(r"^ +runbook_url: docs/runbook\.md#([a-z-]+)$", rule, re.MULTILINE)
        [row] = [line for line in RUNBOOK.read_text().splitlines() if f"`{alert}`" in line and line.startswith("|")]
        assert row.endswith(f"](#{anchor}) |"), f"{alert}: {row}"


def test_a_sealed_key_service_is_not_taken_for_one_that_is_away() -> None:
    counted = KmsMetrics()

    def value(name: str) -> float:
        return next(family.samples[0].value for family in counted.collect() if family.name == name)

    counted.seen(api.StatusAnswer(status=api.CODE_SEALED))
    assert (value("progressdb_kms_up"), value("progressdb_kms_sealed")) == (0, 1)
    counted.lost()
    assert (value("progressdb_kms_up"), value("progressdb_kms_sealed")) == (0, 0)


def test_the_time_of_the_newest_backup_is_known(server: RealServer) -> None:
    def began() -> float:
        read = families(server("GET", "/metrics").body.decode())
        return float(read["progressdb_store_backup_timestamp_seconds"].samples[0].value)

    assert began() == 0
    for name in ("one", "two"):
        assert server("POST", "/admin/store_backup", {"name": name}, key=ADMIN).status == 200
    assert 0 <= time.time() - began() < 3600


def test_prometheus_reads_the_pages(pages: dict[str, str]) -> None:
    for program, text in pages.items():
        done = subprocess.run(
            [needs.program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        complaints = [line for line in done.stderr.splitlines() if not line.split(" ")[0].endswith("_created")]
        assert complaints == [], program


def test_a_label_value_can_not_add_a_line() -> None:
    status = {
        "http": {"requests": 0, "refused": 0, "connections": 0, "connections_max": 1, "accept_failures": 0}
        | {"unread_bytes": 0},
        "keys": {"by_state": {}, "by_kek_version": {}, "destroyed": 0, "unreadable": 0, "indexing": False},
        "memory": {
            "keys_in_memory": 0, "cache_hits": 0, "cache_misses": 0, "cache_evictions": 0, "locked_bytes": 0,
        },
        "keks": [],
        "rotation": {"rewrapped": 5, "total": None, "last_error": "the disk"},
        "audit": {
            "head": {"seq": 1}, "writable": False, "synced": True, "events_dropped": 0, "segment_bytes": 0,
            "position": None,
            "reserve_bytes": 0,
        },
        "hardening": [{"measure": 'a"\n\\', "in_force": False}],
        "root": {"slots": []},
        "policy": None,
        "replica": None,
        "disk_free_bytes": 0,
        "epoch": 1,
        "uptime_seconds": 1,
        "warnings": [], "conditions": [],
    }  # fmt: skip
    sizes, times = WeightedHistogram(BATCH_SIZES), VerbTimes(["encrypt", "decrypt"])
    times.asked("encrypt")
    times.end_turn()
    for items in (1, 3, 1024):
        sizes.add(items)
    read = families(page(status, times=times, batches={"encrypt_batch": sizes}, policy_refusals={}).decode())
    assert [sample.labels for sample in read["minikms_hardening"].samples] == [{"measure": 'a"\n\\'}]
    assert read["minikms_kek_rotation_failing"].samples[0].value == 1
    buckets = {sample.labels.get("le"): sample.value for sample in read["minikms_batch_items"].samples}
    assert (buckets["1"], buckets["2"], buckets["4"], buckets["+Inf"]) == (1, 1, 2, 3)
    assert {sample.labels["verb"] for sample in read["minikms_request_duration_seconds"].samples} == {"encrypt"}
