"""`python -m sliplm` is `slip`."""

from sliplm.cli import main

if __name__ == "__main__":
    main()
