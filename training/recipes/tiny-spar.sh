#!/usr/bin/env bash
# Makes `tiny-spar` from `tiny` on CPU cores: the teacher's features once, then the whole vision tower learns them.
#     training/recipes/tiny-spar.sh [FOLDER]        SEED=1, TRAIN=last:2, EPOCHS=12 for other students of the same features
set -euo pipefail
folder=${1:-.work/tiny-spar}
train=${TRAIN:-all} seed=${SEED:-0}

# Scenes of 1 to 5 times the native side (128 px), half of them cropped.
data=(--student tiny --picture-book 2400 --long-side-px 640 --short-side-px 640 --scale-range 0.2 1
      --scale-law log-uniform --min-side-px 128 --stride-px 40 --teacher-dtype bfloat16 --workers 0)
learn=(--train "$train" --learning-rate 4e-4 --warmup-steps 60)
case $train in last:*) learn=(--train "$train" --learning-rate 1e-3 --warmup-steps 30 --trunk-blocks "${train#last:}") ;; esac

export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
torchrun --standalone --nproc-per-node 2 training/cache_teacher.py "${data[@]}" --cache "$folder/features" --trunk-blocks 2
torchrun --standalone --nproc-per-node 2 training/distill.py "${data[@]}" --cache "$folder/features" "${learn[@]}" \
    --output "$folder/$train-seed$seed" --resume --seed "$seed" --epochs "${EPOCHS:-6}" --accumulate 2 \
    --schedule cosine --clip-norm 1
