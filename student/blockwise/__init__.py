"""Ternary students block by block: each block against the teacher's cached output of it, before all of them
are trained together.
"""
