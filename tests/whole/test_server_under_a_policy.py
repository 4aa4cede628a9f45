"""A message server whose key service has a policy file: its own grant is enough, and its limit is a 503."""

import os
from pathlib import Path

from tests.harness.callers import PolicyDaemon
from tests.harness.message_server import ADMIN, server
from tests.harness.waiting import wait_until

SHIPPED = Path(__file__).parents[2] / "deploy" / "policy.toml"


def settings(daemon: PolicyDaemon) -> dict[str, str]:
    return {"KMS_SOCKET": str(daemon.socket), "KMS_SPAWN": "0", "KMS_EXCLUSIVE": "1"}


def test_the_shipped_grant_is_enough_and_its_limit_is_a_503(public: Path) -> None:
    """With the uid of this test in the place of the server's, and fewer decryptions."""
    shipped = SHIPPED.read_text()
    policy = shipped.replace("uid:0", "uid:1").replace("uid:991", "uid:0").replace("version = 1", "")
    limited = policy.replace("decrypts_per_hour = 500000", "decrypts_per_hour = 40")
    assert limited != policy
    with PolicyDaemon(public, limited) as daemon, server(public, settings(daemon)) as progressdb:
        thread = progressdb.ask("POST", "/v1/threads", {"title": "T", "author": "ada"}).body["id"]
        for number in range(5):
            posted = progressdb.ask("POST", "/v1/messages", {"thread": thread, "author": "ada", "body": number})
            assert posted.status == 200, posted
        answers = [progressdb.ask("GET", f"/v1/threads/{thread}/messages")]
        while answers[-1].status == 200:
            answers.append(progressdb.ask("GET", f"/v1/threads/{thread}/messages"))
            assert len(answers) < 40
        assert len(answers) > 3, "some were read"
        refused = answers[-1]
        assert refused.status == 503
        assert "a limit of its policy is used up" in refused.body["error"]
        assert 0 < int(refused.headers["retry-after"]) <= 450, "five of 40 in an hour"
        assert progressdb.ask("POST", "/v1/messages", {"thread": thread, "author": "ada", "body": 6}).status == 200
        wait_until(lambda: progressdb.ask("GET", "/readyz").status == 200)  # writes go on
        daemon.write_policy(policy)
        os.kill(daemon.pid, 1)
        wait_until(lambda: progressdb.ask("GET", f"/v1/threads/{thread}/messages").status == 200)
        rotate = "/admin/rotate_thread_dek?wait=true", {"thread_id": thread}
        rotated = progressdb.ask("POST", *rotate, key=ADMIN)
        assert (rotated.status, rotated.body["status"]) == (200, "ok"), rotated
