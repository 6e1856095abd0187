"""Evaluates students against their teacher on held-out rows, as `gkd evaluate` does.

    python eval_gkd.py runs/mixed --dataset_name data/prompts_heldout.json
    accelerate launch --num_processes 2 eval_gkd.py runs/mixed --checkpoints --metrics exact_match chrf

Flags that are not given come from the run (except --scorer), else from the defaults of train_gkd.py.
"""

from gkd.cli.start import script

main = script("evaluate", "eval_gkd.py", __doc__)

if __name__ == "__main__":
    main()
