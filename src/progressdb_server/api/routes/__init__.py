"""The routes of the message server: one module per subject, and the table of all operations.

Owns: how an HTTP request becomes a call of the store or of the jobs. Invariants: every operation has one entry in the
table; a route checks what the caller may do before it acts. The room must never touch the engine or its keys.
"""
