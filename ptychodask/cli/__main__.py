"""``python -m ptychodask.cli``: the command line of this very interpreter, for batch scripts."""

from ptychodask.cli import main

if __name__ == "__main__":
    main()
