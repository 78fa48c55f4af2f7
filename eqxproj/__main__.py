"""The command line `python -m eqxproj`. What it can do: `python -m eqxproj --help`."""

import sys

from eqxproj._compare._command import main

if __name__ == "__main__":
    sys.exit(main())
