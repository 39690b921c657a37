"""What a store lists: segments that are mapped, the manifest over them, and what is not listed yet."""
