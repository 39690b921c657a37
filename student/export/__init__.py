"""Exports of a BitNet student to formats that others read, each compared with one integer reference."""
