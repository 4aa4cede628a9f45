"""OpenAPI: the types that describe an operation, and the document made of the table of operations.

Owns: `description.py`, which each route module uses beside its handlers, and `document.py`, the generator. Invariant:
the document contains exactly the operations of the table that it is given. The room must never name an operation.
"""
