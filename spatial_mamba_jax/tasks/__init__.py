"""Training tasks, one folder each, behind the interface in `base`."""
