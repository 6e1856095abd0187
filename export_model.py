"""Exports a trained student as a folder that transformers and vLLM load, as `gkd export` does.

    python export_model.py runs/mixed -o exported/mixed
    python export_model.py runs/mixed -o exported/best --checkpoint best --dtype bfloat16

Exit codes: 0 done, 1 nothing exported, 2 wrong usage.
"""

from functools import partial

from gkd.cli.start import answer

if __name__ == "__main__":  # help and wrong flags are answered before the import below, which takes seconds
    answer("export_model.py", __doc__)

from gkd.cli import export

main = partial(export.main, prog="export_model.py")

if __name__ == "__main__":
    main()
