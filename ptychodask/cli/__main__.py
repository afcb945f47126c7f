"""Command line of this interpreter, ``python -m ptychodask.cli``, for batch scripts."""

from ptychodask.cli import main

if __name__ == "__main__":
    main()
