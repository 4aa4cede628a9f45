"""The faults of `faulty_server`, each by the word that its file holds."""

from typing import Final

FAULT_FILE: Final = "FAULT_FILE"
"""The variable that names the file. It holds one of these words, or is not there."""
DISK: Final = "the disk fails whatever is asked of it"
STUCK: Final = "the disk does not come back from a sync"
FULL: Final = "as many jobs wait as may"
CROWDED: Final = "a message has as many versions as it may"
DESTROYED: Final = "the key of every thread is destroyed"
DATABASE: Final = "the store is in a database, of which others make backups"
DEFECT: Final = "every handler has a defect"
ROTTEN: Final = "what is copied reads back as something else"
GARBAGE: Final = "the frames in reference cycles are to be told"
"""The server adds their places to the file, a line each (`tests.harness.garbage`). It runs without the collector."""
