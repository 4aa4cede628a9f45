"""The transit API of Vault and OpenBao, for their clients: docs/spec/transit.md.

Rules of the package:
1. A request here becomes requests of the same principal to the key service, under the same policy, limits and audit
   log. Nothing here decides who may use a key.
2. A path is compared as it was sent; of it only the name of a key, which matches a pattern, reaches the key service.
3. A body is read leniently, as Vault does. A field that would change the meaning and is not offered is refused.
4. What binds a record, context and associated data, is never dropped, and has one encoding.

Modules, each importing only earlier ones: `wire`, `keyring`, `encryption`, `keys`, `generated`, `system`, `table`.
"""
