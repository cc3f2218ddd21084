"""The sweep engine: N variants of one run, what is read of them, what they cost."""
