"""The systemd units."""
