"""The gateway: what it accepts from the network, and what it refuses."""
