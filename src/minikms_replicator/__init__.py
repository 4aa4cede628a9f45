"""The replicator: takes the changes of one member of a key service to PostgreSQL, and those of the others from there.

A process and a user of its own, which holds no key of the key service: the daemon has no network. Rules of the package:
1. A commit counts once the database's standbys have confirmed it, and only as that of the head's member in its term.
2. The time of a lease is noted before the commit that renews it begins.
3. A head is taken over only after it has not changed for longer than a lease, or was released; and only on a node of
   the database that has confirmed the reports of this replicator for so long.
4. A lease is renewed only after the daemon has answered.

Modules, each importing only earlier ones: `config`, `tables`, `deciding`, `following`, `serving`, `fetching`,
`metrics`, `process`, `command`.
"""
