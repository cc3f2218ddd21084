"""What a command does around its work: start-up, processes, run folders, logs."""
