#!/usr/bin/env bash
# SPAR, OpenCLIP ViT-B/16, as published (CVPR 2026, section 4): the first 25 000 images of SA-1B, last two blocks,
# AdamW 2e-5 constant, weight decay 1e-4, 10 epochs, one image per device on 2 devices, fp16, mean squared error.
#     training/recipes/spar-openclip-b16.sh SA1B_TARS [FOLDER]
# Teacher and augmentation are the scripts' defaults: windows of the native 224 px, stride 24; one view per image, the
# same in every epoch. With STORE=1 its features are stored first (about 100 GB with the trunk) and a step costs two
# blocks; without, the teacher runs in every epoch. Not as theirs: images are shuffled, and the last epoch is kept (theirs
# reads them in order and keeps the epoch of the lowest training loss).
set -euo pipefail
tars=${1:?give the folder of the SA-1B tars}
folder=${2:-runs/spar-openclip-b16}
launch=(accelerate launch --config_file training/recipes/gpu-1.yaml --num_processes "${PROCESSES:-2}")
[ "${PROCESSES:-2}" -gt 1 ] && launch+=(--multi_gpu)

data=(--student laion/CLIP-ViT-B-16-laion2B-s34B-b88K --tars "$tars" --max-images 25000 --workers 8)
store=()
if [ "${STORE:-0}" = 1 ]; then
    "${launch[@]}" training/cache_teacher.py "${data[@]}" --cache "$folder/features" --trunk-blocks 2
    store=(--cache "$folder/features" --trunk-blocks 2)
fi
"${launch[@]}" training/distill.py "${data[@]}" "${store[@]}" --output "$folder/run" --resume --train last:2 \
    --epochs 10 --draws 1 --learning-rate 2e-5 --weight-decay 1e-4 --loss mse
