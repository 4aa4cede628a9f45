"""Seal and unseal of the daemon.

Owns: the states and the moves between them (`state`, without I/O), what each move takes (`seal`, which also has the
HTTP server of the process), attempts to unseal and the shares of a root key (`unseal`), opening the data directory
(`opening`), what a sealed daemon answers (`application`), and the files of the sealed state (`files`). Invariants:
between a seal and the end of an unseal no verb is served; a seal waits for no disk before the keys are zeroed; a seal
during an unseal wins. The room must never keep a root key.
"""
