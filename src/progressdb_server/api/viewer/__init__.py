"""The data viewer: pages for an operator with an admin key.

Owns: login and its sessions, what the pages show, and their routes. Invariants: no page but the login, its style and
its script is answered without a session; a session begins with an admin key only; whatever changes something needs the
session's own token beside its cookie. It must never change what is stored, and never put private text in a log.
"""
