"""The daemon of a key service on several hosts: when it follows, takes over, serves and stands by.

`state` has the moves between these, and `verbs` what a replicator and an operator ask.
"""
