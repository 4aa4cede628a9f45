"""Runs under the interpreter that has the unmodified SDK: a call per line of standard input, its outcome per line of
standard output. It imports nothing of this project.
"""

import json
import sys

from progressdb import ProgressDBClient  # type: ignore[import-not-found]  # the client is installed for one test only
from progressdb.client import ApiError  # type: ignore[import-not-found]  # as above


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        client = ProgressDBClient(base_url=asked["url"], api_key=asked["key"])
        try:
            outcome = {"result": getattr(client, asked["method"])(*asked["args"], **asked["named"])}
        except ApiError as error:
            outcome = {"status": error.status, "body": error.body}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
