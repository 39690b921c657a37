"""`distily-train eval`: a student, and its teacher beside it, on the cache, on texts and on tasks."""
