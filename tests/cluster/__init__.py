"""Three message servers on a database that Patroni keeps available, on one machine: made, loaded, broken and checked.

`machines` makes the hosts and their programs. `load` uses the service and records a history. `faults` break a part.
`history` has the rules that a history obeys, as a pure function. `mutants` are versions of the project that break one
of the rules. `kms_hosts`, `kms_load`, `kms_faults` and `kms_history` are the same for a key service on three hosts.
`python -m tests.cluster` runs them, in namespaces that end with it.
"""
