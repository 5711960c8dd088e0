"""`python -m surgery`, and `torchrun -m surgery`: the command line."""

from surgery.cli import main

if __name__ == "__main__":
    main()
