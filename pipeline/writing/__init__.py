"""Texts written by the teacher or by a student, before the teacher's features of them are captured."""
