"""The format on disk, without knowing where a store lies: schema, codecs, tables, records."""
