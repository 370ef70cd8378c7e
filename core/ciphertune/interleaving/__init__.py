"""Tasks that share a process: one computes while others wait for workers."""
