"""Background jobs over the store: the rotation of a thread's key, the backups it leaves, the end of old keys.

Owns: the job table (`job:<id>`), the backups of jobs (`backup:migrate:<job>:<key>`), and the tasks that do the work.
Invariants: a job survives a kill at any point; never two jobs on one thread; memory is bounded by chunks.
"""
