r"""Converts common dataset formats to the `messages`/`prompt` rows that train_gkd.py reads, as `gkd convert` does.

    python convert_data.py alpaca.json -o data/rows.json
    python convert_data.py pairs.jsonl -o data/rows.json --source-field zh --target-field en --drop-answers \
        --system 帮我把下面中文翻译成英文

Exit codes: 0 done, 1 bad data, 2 wrong usage, 128 + n stopped by signal n.
"""

from gkd.cli.start import script

main = script("convert", "convert_data.py", __doc__)

if __name__ == "__main__":
    main()
