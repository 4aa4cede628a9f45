"""Background jobs of the store: the rotation of a thread's key, what it keeps of records, the destruction of old keys;
and the retirement of keys that no thread names.

Owns: what is in the row of a job, and the tasks that do the work. Invariants: a job survives a kill at any point; never
two jobs on one thread; memory is bounded by chunks. How rows and records are stored is the store's.
"""
