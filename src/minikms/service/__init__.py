"""The verbs of the key service: authorise, act, audit.

Owns: what each verb does, who may call it, and the audit lines that it leaves. Invariants: every call of a verb leaves
an audit line, including refused and cancelled calls, before its answer leaves; a change of keys is durable, and its
audit line too, before its answer. The room must never put key bytes, plaintext or ciphertext into an audit line.
"""
