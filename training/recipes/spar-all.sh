#!/usr/bin/env bash
# SPAR-ALL (CVPR 2026): the whole vision tower learns; holds above 1.5k x 1.5k pixels, where two blocks do not.
#     training/recipes/spar-all.sh SA1B_TARS [FOLDER]          EXTENDED=1: sizes of 512 to 2560 px
set -euo pipefail
tars=${1:?give the folder of the SA-1B tars}
folder=${2:-runs/spar-all}
extended=()
[ "${EXTENDED:-0}" = 1 ] && extended=(--extended)
accelerate launch --config_file training/recipes/gpu-8.yaml training/distill.py \
    --student laion/CLIP-ViT-B-16-laion2B-s34B-b88K --tars "$tars" --max-images 25000 --workers 8 "${extended[@]}" \
    --output "$folder" --resume --train all --epochs 10 --draws 1 --learning-rate 2e-5 --weight-decay 1e-4 --loss mse
