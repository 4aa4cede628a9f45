"""The HTTP side of the message server: protocol, bounds, access, requests, responses.

Owns: what happens to a request before a route sees it and to a response after it. Invariants: every size, count and
wait of a peer has a bound; a caller is authenticated before a route runs. The room must never know what a thread or a
message is.
"""
