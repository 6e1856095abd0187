"""`python -m gkd VERB ...` is the command `gkd VERB ...`. Accelerate's launcher starts this file."""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__" and sys.path[:1] == [_HERE]:
    # For a script, this folder comes first on the path, and has modules named `io` and `data`; for DeepSpeed, accelerate
    # adds the current folder. Neither may serve imports, so both are dropped, and gkd's parent folder is appended.
    sys.path[:] = [path for path in sys.path[1:] if path != os.getcwd()] + [os.path.dirname(_HERE)]

from gkd.cli.start import main  # noqa: E402

if __name__ == "__main__":
    main()
