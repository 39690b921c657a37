"""The machine and the process: what it computes fast, its GPUs, how commands are stopped."""
