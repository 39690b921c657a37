"""`python -m student.cli`, for `accelerate launch -m`."""

from student.cli import main

main()
