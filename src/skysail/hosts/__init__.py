"""Hosts as the controller sees them: their desired documents, placement, and the watch that talks to their agents."""
