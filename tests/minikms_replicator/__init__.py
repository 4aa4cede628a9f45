"""Tests of the replicator."""
