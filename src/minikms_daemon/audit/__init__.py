"""The audit log of a daemon that serves: the lines of a turn, closed files, and how far an auditor has read."""
