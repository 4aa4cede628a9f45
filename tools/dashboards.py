"""Writes the dashboards for Grafana in deploy/grafana: `python tools/dashboards.py`, which needs `make frameworks`.

Owns: the panels, each of which answers a question of an operator, and their queries. Limits are those of
deploy/prometheus/alerts.yml. One test compares the files with what this makes, another one runs each query.
"""

from __future__ import annotations

import json
import re
import string
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphThresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from minikms.conditions import AUDITOR_LAG_LINES, AUDITOR_SILENT_SECONDS, DISK_LOW_BYTES
from progressdb_server.conditions import BACKUP_OLD_S

DEPLOY: Final = Path(__file__).resolve().parents[1] / "deploy"
DIRECTORY: Final = DEPLOY / "grafana"
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
SELECTOR: Final = re.compile(r"\b(up|(?:progressdb|minikms|process)_[a-z_]+)\b(\{\}?)?")
LIMIT: Final = re.compile(r".*([<>])=? (?:bool )?([0-9.]+)", re.DOTALL)
COLOURS: Final = {"page": "red", "ticket": "orange"}
SIZES: Final = {"yes": (16, 4), "value": (4, 4), "table": (12, 6), "lines": (12, 8)}
"""Columns (of 24) and rows, by kind of panel."""


class Panel(NamedTuple):
    """`kind`: "yes" shows 1 as good and 0 as bad, "value" one number, "lines" a chart, "table" labels. `queries`: by
    legend, in PromQL, where RANGE is that of a rate. `alert`: the rule whose limit is shown; `bad`: the limit
    where no rule, or no comparison in it, says one, and `below` whether what is below it is bad.
    """

    kind: str
    title: str
    question: str
    queries: dict[str, str]
    unit: str = "short"
    alert: str = ""
    bad: float | None = None
    below: bool = False


def p99(histogram: str, labels: str = "", by: str = "le") -> str:
    return f"histogram_quantile(0.99, sum by ({by}) (rate({histogram}_bucket{{{labels}}}[RANGE])))"


def rates(counter: str, by: str, labels: str = "") -> dict[str, str]:
    return {f"{{{{{by}}}}}": f"sum by ({by}) (rate({counter}{{{labels}}}[RANGE]))"}


HTTP: Final = "progressdb_http_request"


# A panel takes two lines instead of nine.
# fmt: off
def opening(alerts: str, yes: dict[str, str], *builds: str) -> list[Panel]:
    """`alerts`: matchers of their names. `yes`: queries that give 1 when all is well. `builds`: metrics."""
    firing = f'count(ALERTS{{{alerts}, alertstate="firing"}}) or vector(0)'
    runs = " or ".join(f"sum by (job, instance, version, commit, python) ({build})" for build in builds)
    return [
        Panel("yes", "Is all well?", "Every value should be yes.", yes),
        Panel("value", "Alerts", "How many alerts fire?", {"firing": firing}, bad=1),
        Panel("value", "Last restart", "How long ago?", {"": "time() - max(process_start_time_seconds)"}, "s"),
        Panel("table", "What is wrong?", "Which alerts fire, or are about to?", {"": f"ALERTS{{{alerts}}}"}),
        Panel("table", "What runs?", "Which versions?", {"": runs}),
    ]


MESSAGE_SERVER: Final = [
    *opening('alertname=~"Progressdb.*"', {
        "answers": 'up{job="progressdb"}',
        "takes writes": "progressdb_store_available",
        "reads every record": "progressdb_store_damaged_files + progressdb_store_unreadable_records == bool 0",
        "key service": "progressdb_kms_up",
    }, "progressdb_build_info"),
    Panel("lines", "Requests", "How many, and how do they end?", rates(f"{HTTP}s_total", "status"), "reqps"),
    Panel("lines", "What is slow?", "99 of 100 take less. The limit is that of writes.", {
        "writes": p99(f"{HTTP}_duration_seconds", 'route=~"/v1/.*", method="POST"'),
        "reads": p99(f"{HTTP}_duration_seconds", 'route=~"/v1/.*", method="GET"'),
        "disk": p99("progressdb_store_commit_seconds"),
        "key service": p99("progressdb_kms_request_duration_seconds", 'verb=~".*crypt.*"'),
    }, "s", "ProgressdbSlow"),
    Panel("lines", "Failed requests", "What share fails?", {
        "failed": f'(sum(rate({HTTP}s_total{{status=~"5.."}}[RANGE])) or vector(0))'
                  f" / sum(rate({HTTP}s_total[RANGE]))",
    }, "percentunit", "ProgressdbFailsRequests"),
    Panel("lines", "Who is refused?", "401 and 403: a wrong key or user. 429: too many requests.",
          rates(f"{HTTP}s_total", "status", 'status=~"401|403|429"'), "reqps", "ProgressdbRefusesCallers"),
    Panel("value", "Newest backup", "Is it young enough?",
          {"age": "time() - max(progressdb_store_backup_timestamp_seconds > 0)"}, "s", "ProgressdbBackupOld",
          BACKUP_OLD_S),
    Panel("value", "Jobs", "Do rotations and purges run?",
          {"running": "sum(progressdb_jobs_running)", "unfinished": "sum(progressdb_jobs_unfinished)"}),
    Panel("value", "To re-encrypt", "How many records are left?", {"": "sum(progressdb_jobs_records_left)"}),
    Panel("lines", "Writes that wait", "Does the disk keep up?", {"{{instance}}": "progressdb_store_queued_writes"}),
]
KEY_SERVICE: Final = [
    *opening('alertname=~"Minikms.*", alertname!~"Minikms(Gateway|Auditor|Sink).*"', {
        "answers": 'up{job="minikms"}',
        "serves": "minikms_up",
        "audit log": "minikms_audit_writable",
        "hardened": "min by (instance) (minikms_hardening)",
        "reads every key": "minikms_keys_unreadable == bool 0",
        "policy is current": "1 - minikms_policy_reload_failed",
    }, "minikms_build_info"),
    Panel("lines", "Requests", "Who asks for what?", rates("minikms_requests_total", "verb"), "reqps"),
    Panel("lines", "What is slow?", "99 of 100 take less. The limit is that of encrypt and decrypt.",
          {"{{verb}}": p99("minikms_request_duration_seconds", by="le, verb")}, "s", "MinikmsSlow"),
    Panel("lines", "Why is something refused?", "By the policy, or because it was no request.",
          rates("minikms_policy_refusals_total", "reason")
          | {"no request": "sum(rate(minikms_http_refused_total[RANGE]))"}, "reqps", "MinikmsPolicyRefuses"),
    Panel("lines", "Is the audit log shipped?", "Lines that the auditor has not taken.",
          {"{{instance}}": "minikms_audit_lag_lines"}, alert="MinikmsAuditorLags", bad=AUDITOR_LAG_LINES),
    Panel("lines", "Keys", "How many, in which state?", {"{{state}}": "sum by (state) (minikms_keys)"}),
    Panel("lines", "Which keys are due?", "Keys under each KEK. A rotation moves all to the newest.",
          {"KEK {{kek_version}}": "sum by (kek_version) (minikms_keys_by_kek)"}),
    Panel("value", "Newest KEK", "When was the last rotation of the KEK?",
          {"age": "time() - max(minikms_kek_created_timestamp_seconds)"}, "s"),
    Panel("value", "Limits used up", "How many hourly budgets refuse requests?",
          {"": "sum(minikms_policy_budgets_exhausted)"}, bad=1),
    Panel("value", "Auditor's report", "How long ago? Without an auditor, since the start.",
          {"": "max(minikms_audit_position_age_seconds)"}, "s", "MinikmsAuditorAway",
          AUDITOR_SILENT_SECONDS),
    Panel("lines", "Free disk", "When is it full?", {"{{instance}}": "minikms_disk_free_bytes"}, "bytes",
          "MinikmsDiskNearlyFull", DISK_LOW_BYTES, below=True),
]
BESIDE: Final = [
    *opening('alertname=~"Minikms(Gateway|Auditor|Sink).*"', {
        "{{job}}": 'up{job=~"minikms-(gateway|auditor)"}',
        "key service": "minikms_gateway_kms_reachable",
        "gateway's files": "1 - minikms_gateway_reload_failed",
        "log and witnesses fit": "1 - minikms_auditor_alarm",
        "sink {{sink}}": "1 - minikms_auditor_sink_waits",
    }, "minikms_gateway_build_info", "minikms_auditor_build_info"),
    Panel("lines", "What ends soon?", "Time left of the gateway's certificate and revocation lists.", {
        "certificate": "min(minikms_gateway_certificate_expiry_timestamp_seconds) - time()",
        "revocation list": "min(minikms_gateway_crl_expiry_timestamp_seconds > 0) - time()",
    }, "s", "MinikmsGatewayCertificateExpires"),
    Panel("lines", "Requests", "What is it asked for?", rates("minikms_gateway_requests_total", "verb"), "reqps"),
    Panel("lines", "Why is something refused?", "Reasons", rates("minikms_gateway_refused_total", "reason"), "reqps"),
    Panel("lines", "Connections", "Does the gateway keep up?", {
        "open": "sum(minikms_gateway_connections)",
        "in their handshake": "sum(minikms_gateway_handshakes)",
        "waiting for the key service": "sum(minikms_gateway_kms_waiting)",
    }),
    Panel("lines", "Is the audit log shipped?", "Lines that are not in the tree, or that a receiver does not have.",
          {"tree": "sum(minikms_auditor_lag_lines)", "{{sink}}": "sum by (sink) (minikms_auditor_sink_lag_lines)"},
          alert="MinikmsAuditorLags", bad=AUDITOR_LAG_LINES),
    Panel("lines", "Receivers that are behind", "How long have they taken nothing, though lines wait?", {
        "{{sink}}": "(time() - minikms_auditor_sink_delivered_timestamp_seconds)"
                    " * (minikms_auditor_sink_lag_lines > bool 0)",
    }, "s", "MinikmsSinkBehind"),
    Panel("lines", "Rejected lines", "What does a receiver refuse for good?",
          {"{{sink}}": "minikms_auditor_sink_rejected_lines"}),
    Panel("value", "Witnessed", "How long ago did a quorum know the whole tree?",
          {"": "time() - max(minikms_auditor_witnessed_timestamp_seconds > 0)"}, "s", "MinikmsAuditorUnwitnessed"),
    Panel("value", "Auditor's errors", "What fails? Its status says more.", {"": "sum(minikms_auditor_errors)"}, bad=1),
    Panel("value", "Last step", "Does it work?", {"": "time() - max(minikms_auditor_step_timestamp_seconds)"}, "s"),
]
DASHBOARDS: Final = {  # by file: title, the metric with the instances, panels
    "message-server": ("ProgressDB message server", "progressdb_build_info", MESSAGE_SERVER),
    "key-service": ("miniKMS key service", "minikms_build_info", KEY_SERVICE),
    "gateway-auditor-sinks": ("miniKMS gateway, auditor and sinks",
                              '{__name__=~"minikms_(gateway|auditor)_build_info"}', BESIDE),
}
# fmt: on


@cache
def rules() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def limits(alert: str, limit: float | None, below: bool) -> dashboard.ThresholdsConfig:
    """The steps of the panel's limit, in the colour of its alert's severity."""
    rule = rules()[alert] if alert else None
    bad = COLOURS[rule["labels"]["severity"]] if rule else "red"
    if rule and limit is None:
        [(sign, text)] = LIMIT.findall(rule["expr"])  # of its last comparison
        limit = float(text)
        below = sign == "<" and " bool " not in rule["expr"]  # with `bool` the rule fires when the comparison fails
    steps = [Threshold(None, bad if below else "green")]
    if limit is not None:
        steps.append(Threshold(limit, "green" if below else bad))
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def scoped(query: str) -> str:
    """The query for the instances that are chosen."""
    ranged = query.replace("RANGE", "$__rate_interval")
    return SELECTOR.sub(lambda found: found[1] + '{instance=~"$instance"' + (", " if found[2] == "{" else "}"), ranged)


def built(number: int, panel: Panel) -> stat.Panel | table.Panel | timeseries.Panel:
    made: stat.Panel | table.Panel | timeseries.Panel
    if panel.kind == "lines":
        mode = GraphThresholdsStyleMode.DASHED if panel.alert else GraphThresholdsStyleMode.OFF
        style = common.GraphThresholdsStyleConfig().mode(mode)
        made = timeseries.Panel().axis_soft_min(0).thresholds_style(style)
    elif panel.kind == "table":
        made = table.Panel()
    else:
        made = stat.Panel()
    if panel.kind == "yes":
        words = {"0": ValueMappingResult("no", "red"), "1": ValueMappingResult("yes", "green")}
        made.mappings([ValueMap(words)])
    for letter, (legend, query) in zip(string.ascii_uppercase, panel.queries.items(), strict=False):
        target = prometheus.Dataquery().ref_id(letter).datasource(SOURCE).expr(scoped(query)).legend_format(legend)
        made.with_target(target.instant().format(PromQueryFormat.TABLE) if panel.kind == "table" else target.range())
    made.id(number).title(panel.title).description(panel.question).datasource(SOURCE).unit(panel.unit)
    columns, rows = SIZES[panel.kind]
    return made.thresholds(limits(panel.alert, panel.bad, panel.below)).no_value("none").span(columns).height(rows)


def page(name: str) -> str:
    """The text of a file of deploy/grafana."""
    title, builds, panels = DASHBOARDS[name]
    instances = dashboard.QueryVariable("instance").datasource(SOURCE).query(f"label_values({builds}, instance)")
    made = (
        dashboard.Dashboard(title)
        .uid(f"progressdb-{name}")
        .tags(["progressdb"])
        .time("now-6h", "now")
        .refresh("1m")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(instances.multi(True).include_all(True).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED))
    )
    for number, panel in enumerate(panels, start=1):
        made.with_panel(built(number, panel))
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for written in DASHBOARDS:
        (DIRECTORY / f"{written}.json").write_text(page(written), "utf-8")
        sys.stdout.write(f"wrote deploy/grafana/{written}.json\n")
