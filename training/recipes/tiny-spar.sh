#!/usr/bin/env bash
# Makes `tiny-spar` from `tiny` on two CPU cores: teacher features once, then cheap steps of the last two blocks.
#     training/recipes/tiny-spar.sh [STUDENT [FOLDER]]        more flags of distill.py in DISTILL_FLAGS
set -euo pipefail
student=${1:-tiny}
folder=${2:-.work/tiny-spar}

# Scenes of 1 to 6 times the native side (128 px), half of them cropped.
data=(--student "$student" --picture-book 640 --long-side-px 768 --short-side-px 768 --scale-range 0.17 1
      --min-side-px 128 --stride-px 24 --teacher-dtype bfloat16 --workers 1)

export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
torchrun --standalone --nproc-per-node 2 training/cache_teacher.py "${data[@]}" --cache "$folder/features" --trunk-blocks 2
torchrun --standalone --nproc-per-node 2 training/distill.py "${data[@]}" --cache "$folder/features" --trunk-blocks 2 \
    --output "$folder/run" --resume --train last:2 --epochs 12 --accumulate 2 --learning-rate 5e-4 --schedule cosine \
    --clip-norm 1 --evaluate-scales 1 2 4 6 ${DISTILL_FLAGS:-}
