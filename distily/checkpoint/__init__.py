"""Checks on a model's checkpoint, which both stages make before they load one."""
