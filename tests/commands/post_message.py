"""`post-message TEXT` of the transcripts: stores a message on the server at $PORT, as a backend does."""

import json
import os
import sys
import urllib.request

body = json.dumps({"author": "ada", "body": {"text": sys.argv[1]}}).encode()
headers = {"X-API-Key": os.environ["PROGRESSDB_API_BACKEND_KEYS"]}
request = urllib.request.Request(f"http://127.0.0.1:{os.environ['PORT']}/v1/messages", body, headers)
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with direct.open(request, timeout=60) as answer:
    print(json.load(answer)["body"]["text"])
