"""The OpenAPI document of the message server, and the pages that show it.

Owns: how the document is assembled from the operations. Invariants: the document is built from the table that also
routes requests. The room must never describe an operation that the table does not have.
"""
