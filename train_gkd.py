r"""Distils a teacher into a student with Generalized Knowledge Distillation (arXiv 2306.13649), as `gkd train` does.

    python train_gkd.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name data.json --output_dir runs/supervised --lmbda 0 --beta 0
    accelerate launch --config_file ds_configs/zero2.yaml train_gkd.py --model_name_or_path STUDENT \
        --teacher_model_name_or_path TEACHER --dataset_name data.json --output_dir runs/mixed --lmbda 0.5

`--config FILE.yaml` holds flags too; `--help` shows the ones that matter, `--help_all` every one.
"""

from gkd.cli.start import script

main = script("train", "train_gkd.py", __doc__)

if __name__ == "__main__":
    main()
