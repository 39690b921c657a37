"""`distily-train sweep`: many trainings over one cache, each a process of its own."""
