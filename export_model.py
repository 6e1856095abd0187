"""Exports a trained student as a folder that transformers and vLLM load, as `gkd export` does.

    python export_model.py runs/mixed -o exported/mixed
    python export_model.py runs/mixed -o exported/best --checkpoint best --dtype bfloat16

Exit codes: 0 done, 1 nothing exported, 2 wrong usage.
"""

from gkd.cli.start import script

main = script("export", "export_model.py", __doc__)

if __name__ == "__main__":
    main()
