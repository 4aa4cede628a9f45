"""The HTTP engine of the message server: from bytes of connections to requests of an ASGI application, and back.

Owns: listening, TLS, framing, deadlines, the shares of what all connections use, and a graceful stop. Invariant: every
size, count and wait that a client can cause has a bound. The room must never know an API key, a user or a route: the
application says who pays for a body.
"""
