"""The bench: measures the two programs as a user runs them, in turns with a yardstick where two programs are compared.

Owns no figure: docs/benchmarks.md keeps the last saved table. Everything runs on this machine's loopback and Unix
sockets, under a temporary directory, for a bounded time, and every answer that is counted is checked.
"""
