"""Backup archives: their format, creation and restore."""
