#!/usr/bin/env bash
# The method in a quarter of an hour on two CPU cores: store the teacher's features, train two blocks, compare.
#     training/recipes/quickstart.sh [FOLDER]
# Ends with mean IoU on the picture book in one pass, before and after, at 1 and 4 times the native side.
set -euo pipefail
folder=${1:-quickstart}

data=(--student tiny --picture-book 240 --long-side-px 640 --short-side-px 640 --scale-range 0.2 1 --min-side-px 128
      --stride-px 24 --teacher-dtype bfloat16 --workers 1)

export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
torchrun --standalone --nproc-per-node 2 training/cache_teacher.py "${data[@]}" --cache "$folder/features" --trunk-blocks 2
torchrun --standalone --nproc-per-node 2 training/distill.py "${data[@]}" --cache "$folder/features" --trunk-blocks 2 \
    --output "$folder/run" --resume --tracker none --epochs 8 --accumulate 2 --learning-rate 5e-4 --schedule cosine \
    --clip-norm 1 --evaluate-scales 1 4 --evaluate-limit 40
