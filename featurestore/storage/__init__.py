"""Where a store lies: a directory, or object storage with a local mirror."""
