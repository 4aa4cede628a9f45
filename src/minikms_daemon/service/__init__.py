"""The verbs of the key service: one method for each entry of `minikms.api.VERBS`.

Owns: what each verb does. `base` wraps a method: it authorises the caller, lets the method act, and audits the outcome.
Invariants: every request that reaches a verb leaves an audit line, including refused and cancelled requests, before its
answer leaves, but for an auditor's report about the audit log; a change of keys and its audit line are durable before
the answer. The room must never put key bytes, plaintext or ciphertext into an audit line.
"""
