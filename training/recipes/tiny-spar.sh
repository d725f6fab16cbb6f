#!/usr/bin/env bash
# Makes `tiny-spar` from `tiny` on CPU cores: the teacher's features once, then the last two blocks learn them.
#     training/recipes/tiny-spar.sh [FOLDER]    SEED=1, TRAIN=all for other students of the same features; PROCESSES=1
# Ends with FOLDER/TRAIN-seedSEED/model. docs/experiments.md says how this recipe was found.
set -euo pipefail
folder=${1:-.work/tiny-spar}
train=${TRAIN:-last:2} seed=${SEED:-0} processes=${PROCESSES:-2}

# Scenes of 1 to 6 times the native side (128 px), half of them cropped. Student and teacher attend as far as the native
# window reaches (not in SPAR); so one pass of the teacher is better than its sliding window, and it sees each picture
# twice, at its own size and at 384 px.
data=(--student tiny --student-reach window --picture-book 4000 --long-side-px 768 --short-side-px 768
      --scale-range 0.167 1 --scale-law equal-pixels --min-side-px 128 --workers 0
      --teacher-reach window --window-px 0 --teacher-short-side-px 0 384 --teacher-dtype bfloat16)
# SPAR's loss, through a linear head (not in SPAR). A step of the whole tower costs several times as much as one of the
# last two blocks: it takes half of the views.
learn=(--max-steps 500)
case $train in last:*) learn=(--trunk-blocks "${train#last:}") ;; esac

export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
launch=(torchrun --standalone --nproc-per-node "$processes")
"${launch[@]}" training/cache_teacher.py "${data[@]}" --cache "$folder/features" --trunk-blocks 2
"${launch[@]}" training/distill.py "${data[@]}" --cache "$folder/features" --train "$train" "${learn[@]}" \
    --output "$folder/$train-seed$seed" --resume --seed "$seed" --epochs 1 --accumulate $((4 / processes)) \
    --head linear --learning-rate 1e-4 --schedule cosine --warmup-steps 50 --clip-norm 1 --mixed-precision bf16
