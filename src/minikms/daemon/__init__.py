"""The daemon: the key service as a process that serves on a Unix socket.

Owns: the process and its order of start and stop (`process`), its parts (`parts`, `settings`), seal and unseal
(`seal`), the socket and its peers (`sockets`, `accepting`, `peer`), the mapping of HTTP requests to verbs
(`application`, `strictjson`, `keybody`), and what it reports (`status`, `metrics`, `refusals`). Invariants: the peer's
uid is known before a byte of its request is parsed; nothing is served before the epoch of the start is durable; no
answer leaves before its audit line is written. The room must never decide what a key may do: that is `minikms.service`.
"""
