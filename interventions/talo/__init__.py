"""P3: layers that hurt a task, found and cut at test time."""
