#!/usr/bin/env bash
# The method in a quarter of an hour on two CPU cores: store the teacher's features, train two blocks, compare.
#     training/recipes/quickstart.sh [FOLDER]
# Ends with a table: mean IoU on the picture book, 40 test scenes, of one pass before (also with the student's reach, but
# untrained), of the teacher, and of one pass after. Every step goes on where it was when the command is given again.
set -euo pipefail
folder=${1:-quickstart}

# Scenes of 1 to 5 times the native side (128 px), half of them cropped; a window of stride 40, which the paper finds
# nearly as good as 24 at a third of the windows. The student attends as far as that window reaches (docs/reach.md).
data=(--student tiny --student-reach window --picture-book 480 --long-side-px 640 --short-side-px 640
      --scale-range 0.2 1 --scale-law log-uniform --min-side-px 128 --stride-px 40 --teacher-dtype auto --workers 0)

export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
torchrun --standalone --nproc-per-node 2 training/cache_teacher.py "${data[@]}" --cache "$folder/features" --trunk-blocks 2
torchrun --standalone --nproc-per-node 2 training/distill.py "${data[@]}" --cache "$folder/features" --trunk-blocks 2 \
    --output "$folder/run" --resume --tracker none --train last:2 --epochs 4 --accumulate 2 --learning-rate 2.5e-4 \
    --schedule cosine --warmup-steps 30 --clip-norm 1
OMP_NUM_THREADS=2 python benchmarks/quality.py "single pass=tiny" "the same, window's reach=tiny,reach=window" \
    "teacher, stride 40=tiny,stride=40" "student=$folder/run/model" --scales 1 4 6 --limit 40 \
    --state "$folder/evaluation" --output "$folder/quality.json"
