"""The running service.

Owns: its parts (`parts`, `settings`), the mapping of HTTP requests to verbs (`application`, `strictjson`, `keybody`),
and what it reports (`status`, `metrics`, `refusals`). The room `seal` changes between a sealed and an unsealed daemon,
and `minikms_daemon.serve` is the process. Invariants: the peer's uid is known before a byte of its request is parsed;
nothing is served before the epoch of the start is durable; no answer leaves before its audit line is written. The room
must never decide what a key may do: that is `minikms_daemon.service`.
"""
