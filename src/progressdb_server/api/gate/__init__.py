"""The gate of the API: access control, requests, responses.

Owns: what happens to a request before a route sees it, and to a response after the route returned it. Invariants: every
size, count and wait that a client can cause has a bound; a caller is authenticated before a route runs. The room must
never know a route.
"""
