"""The student: its shape, where its weights come from, how it is saved and loaded."""
