"""The data viewer: pages for an operator with an admin key.

Owns: login and sessions, what the pages show, and their operations. Invariants: without a session only the login, its
style and its script are served; a session begins with an admin key only; an operation that changes a session needs its
form token beside the cookie. The room must never change what is stored, and never write private text to a log.
"""
