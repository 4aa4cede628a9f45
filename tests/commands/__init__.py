"""Transcripts and help pages of both commands."""
