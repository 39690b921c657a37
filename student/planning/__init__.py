"""`distily-train plan`: what a training would take, before anything is built: memory, steps, FLOPs, time."""
