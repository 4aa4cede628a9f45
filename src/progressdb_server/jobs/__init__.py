"""Background jobs of the store: rotations of threads' keys, destruction of retired keys, retirement of keys that no
thread names.

Owns: the kinds of jobs, what is in the row of a job, and the tasks that do the work. Invariants: a job survives a kill
at any point; never two jobs on one thread; memory is bounded by chunks. How rows and records are stored is the store's.
"""
