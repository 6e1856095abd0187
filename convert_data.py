"""Converts what people have to the `messages`/`prompt` rows that train_gkd.py reads, as `gkd convert` does.

python convert_data.py alpaca.json -o data/rows.json
python convert_data.py sharegpt.json.gz folder/ -o rows.jsonl --dedupe --split 0.02 --on-bad collect bad.jsonl
cat prompts.txt | python convert_data.py - -o rows.json
"""

from functools import partial

from gkd.cli import convert

main = partial(convert.main, prog="convert_data.py", doc=__doc__)

if __name__ == "__main__":
    main()
