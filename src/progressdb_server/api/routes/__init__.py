"""The operations of the message server: a module for each subject.

Owns: how an HTTP request becomes a call of the store or of the jobs. Each module lists its operations with handler,
roles and description in one place, its function `operations`. `table.py` has the types of that list and finds the
operation of a request; `errors.py` decides the HTTP status of every error. Invariants: a route checks what the caller
may do before it acts. The room must never touch the storage engine or a key.
"""
