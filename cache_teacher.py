r"""Stores the teacher's output for each scored token, for train_gkd.py --teacher_cache, as `gkd cache` does.

    python cache_teacher.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name data/sample_answers.json --output_dir caches/answers
    accelerate launch --num_processes 2 cache_teacher.py --model_name_or_path STUDENT \
        --teacher_model_name_or_path TEACHER --dataset_name data/prompts_train.json --output_dir caches/written --seq_kd True
"""

from gkd.cli.start import script

main = script("cache", "cache_teacher.py", __doc__)

if __name__ == "__main__":
    main()
