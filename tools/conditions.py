"""What follows from the lists of conditions: docs/conditions.md, and the alerts of conditions in deploy/prometheus.

`python tools/conditions.py` rewrites both. An alert is of the condition that its label `condition` names: its
expression, summary, action and entry of the runbook are those of the list; name, `for` and severity stay.
"""

import re
from pathlib import Path
from typing import Final

from minikms.api import Condition
from minikms.conditions import KEY_SERVICE
from progressdb_server.conditions import DOCTOR, SERVER

PROJECT: Final = Path(__file__).parents[1]
PAGE: Final = PROJECT / "docs" / "conditions.md"
ALERTS: Final = PROJECT / "deploy" / "prometheus" / "alerts.yml"
LISTS: Final = {
    "The key service": ("minikms_condition", KEY_SERVICE),
    "The message server": ("progressdb_condition", SERVER),
    "What only `progressdb doctor` looks for": ("", DOCTOR),
}
WORDS: Final = {
    "sealed": "the key service is sealed",
    "audit_unavailable": "the audit log can't be written, so every verb but status and metrics answers 503",
    "standby": "another host of the key service serves",
    "audit_lagging": "more lines of the audit log wait for the auditor than `--refuse-when-unshipped` allows",
    "root_key_source": "the root key lies beside the data that it protects",
    "root_key_replaced": "a root key that was replaced still opens the keyring",
    "connections_few": "the limit of open files admits fewer connections than the key service promises",
    "seal_not_written": "the seal could not be written, so a restart would not stay sealed",
    "store_damaged": "files or records of the store are damaged",
    "store_notice": "the store was empty beside keys in use, or clocks differ, or the database says something",
    "settings_ignored": "a variable of the environment sets nothing",
}
"""For a sentence that is a reason alone."""
PLACE: Final = r"\{\w+\}"
UNSEEN: Final = frozenset({"sealed"})
"""Conditions in which the key service answers no `/metrics`: the message server names them."""
INTRODUCTION: Final = """# Conditions

What can be wrong, by name. `minikms status` and `doctor`, `progressdb status` and `doctor`, the viewer, `/status`,
`/admin/readiness` and the gauges of `/metrics` name the same ones, but for the last two. This page is written by
`tools/conditions.py`.

- **failing**: requests are refused. Commands end with 1, `/readyz` answers 503.
- **degraded**: something is lost, or soon refused: somebody has to act.
- **notice**: look at it when you have time. What could not be looked at is a condition too.
"""


def words(condition: Condition) -> str:
    """The sentence without facts of a moment."""
    return re.sub(PLACE, "…", WORDS.get(condition.name, condition.sentence))


def page() -> str:
    lines = [INTRODUCTION]
    for title, (_, conditions) in LISTS.items():
        lines += [f"## {title}\n", "| name | severity | what it says | what to do |", "|---|---|---|---|"]
        for one in conditions.values():
            said, action = words(one), re.sub(PLACE, "…", one.action)
            where = f"[{action or 'runbook'}](runbook.md#{one.runbook})" if one.runbook else action
            lines.append(f"| `{one.name}` | {one.severity} | {said} | {where} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def alerts(text: str) -> str:
    """The file with the words of the lists."""
    head, *rules = re.split(r"(?m)^(?=      - alert: )", text)
    return head + "".join(_rule(rule) for rule in rules)


def _rule(rule: str) -> str:
    named = re.search(r"condition: (\w+)", rule)
    if named is None:
        return rule
    name = named[1]
    metric, condition = next((metric, known[name]) for metric, known in LISTS.values() if name in known)
    if name in UNSEEN:
        metric = "progressdb_condition"
    summary = words(condition)
    lines = {
        "expr": f'{metric}{{condition="{name}"}} == 1',
        "summary": f'"{summary[0].upper()}{summary[1:]}."',
        "action": f'"{re.sub(PLACE, "…", condition.action)}"',
        "runbook_url": f"docs/runbook.md#{condition.runbook}",
    }
    for key, value in lines.items():
        rule = _with(rule, key, value)
    return rule


def _with(rule: str, key: str, value: str) -> str:
    found = re.search(rf"(?m)^( +{key}: ).*\n(?:            .*\n)*", rule)
    if found is None:
        raise SystemExit(f"no {key} in the rule {rule}")
    return f"{rule[: found.end(1)]}{value}\n{rule[found.end() :]}"


if __name__ == "__main__":
    PAGE.write_text(page())
    ALERTS.write_text(alerts(ALERTS.read_text()))
