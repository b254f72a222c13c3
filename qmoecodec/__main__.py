"""`python -m qmoecodec`: the command line."""

from qmoecodec.cli import main

if __name__ == "__main__":
    main(prog_name="python -m qmoecodec")
