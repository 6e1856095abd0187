"""`python -m gkd VERB ...` is the command `gkd VERB ...`. Accelerate's launcher starts this file."""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__" and sys.path[:1] == [_HERE]:
    # As a script: its own folder, which has modules named `io` and `data`, stands first, and accelerate puts the current
    # folder behind it for DeepSpeed. Neither is a place for modules; gkd itself is found behind all others.
    sys.path[:] = [path for path in sys.path[1:] if path != os.getcwd()] + [os.path.dirname(_HERE)]

from gkd.cli.start import main  # noqa: E402

if __name__ == "__main__":
    main()
