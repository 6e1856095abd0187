"""`python -m gkd VERB ...` is the command `gkd VERB ...`."""

from gkd.cli.app import main

if __name__ == "__main__":
    main()
