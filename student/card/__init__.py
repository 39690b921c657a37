"""A student's model card in the hub's format, from the files of its training alone."""

from student.card.command import card

__all__ = ["card"]
