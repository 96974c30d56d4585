"""Ground floor: clock, errors, configuration, child processes. Imports nothing of Skysail above it."""
