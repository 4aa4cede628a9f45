"""The HTTP API of the message server.

Owns four rooms and `application.py`, which composes them. Imports go down this list, never up:
- `application`: one request from its first check to its response;
- `viewer`: pages for operators;
- `routes`: every operation with its description, and the table that finds it;
- `openapi`: the types of a description, and the document made of them;
- `gate`: access control, bounds, requests, responses.

Invariant: nothing answers a request but an operation of the table or an error response. The room must never touch the
storage engine's files or a key.
"""
