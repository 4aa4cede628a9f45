"""What all commands share, whatever program they belong to: usage, exit statuses, and how results are shown."""
