#!/usr/bin/env bash
# How score maps become what a student learns: features moved towards the words, or the words' mean; forty minutes of one
# CPU core. The teacher is a label method by its refinement: MaskCLIP's windows of stride 40 with PAMR.
#     training/recipes/label-targets.sh [FOLDER]
# Ends with a table: mean IoU on the picture book, 32 validation scenes. Goes on where it was when given again.
set -euo pipefail
folder=${1:-label-targets}
mkdir -p "$folder"
python - > "$folder/words.txt" <<'WORDS'
from spar_hf.picture_book.dataset import CLASSES
print("\n".join(", ".join(names) for names in CLASSES))
WORDS

export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
students=()
for target in moved text; do
    data=(--student tiny --picture-book 240 --long-side-px 512 --short-side-px 512 --scale-range 0.25 1
          --scale-law log-uniform --min-side-px 128 --stride-px 40 --teacher-dtype auto --workers 0
          --teacher-labels maskclip --labels "@$folder/words.txt" --teacher-refine pamr --target $target)
    python training/cache_teacher.py "${data[@]}" --cache "$folder/features-$target" --trunk-blocks 2
    python training/distill.py "${data[@]}" --cache "$folder/features-$target" --trunk-blocks 2 \
        --output "$folder/$target" --resume --tracker none --train last:2 --epochs 4 --accumulate 2 \
        --learning-rate 2.5e-4 --schedule cosine --warmup-steps 30 --clip-norm 1
    students+=("student, $target=$folder/$target/model")
done
python benchmarks/quality.py "single pass=tiny" "teacher, stride 40=tiny,stride=40" "${students[@]}" \
    --split validation --scales 1 2 4 --limit 32 --state "$folder/evaluation" --output "$folder/quality.json"
