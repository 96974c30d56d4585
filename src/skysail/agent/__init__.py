"""The host's process: it holds the machine to its document. It has no access to the store."""
