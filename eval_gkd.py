"""Evaluates students against their teacher on held-out rows, as `gkd evaluate` does.

    python eval_gkd.py runs/mixed --dataset_name data/prompts_heldout.json
    accelerate launch --num_processes 2 eval_gkd.py runs/mixed --checkpoints --metrics exact_match chrf

Flags that are not given come from the run (except --scorer), else from the defaults of train_gkd.py.
"""

from functools import partial

from gkd.cli.start import answer

if __name__ == "__main__":  # help and wrong flags are answered before the import below, which takes seconds
    answer("eval_gkd.py", __doc__)

from gkd.cli import evaluate

main = partial(evaluate.main, prog="eval_gkd.py")

if __name__ == "__main__":
    main()
