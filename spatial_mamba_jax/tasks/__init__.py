"""What networks are trained for: a folder a task, behind one interface."""
