"""Durable work: the Operation row is the record that the customer reads and the engine drives."""
