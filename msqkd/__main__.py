"""`python -m msqkd`."""

from msqkd.cli import main

main()
