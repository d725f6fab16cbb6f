"""Segments a folder of pictures, or a column of Parquet files, on a Ray cluster; writes Parquet.

pip install "spar-hf[ray]"
python examples/ray_data.py photos/ found/
python examples/ray_data.py s3://bucket/photos.parquet s3://bucket/found --column photo --actors 8 --gpus 1 \
    --model openai/clip-vit-base-patch16 --labels "road; car, automobile; sky"
"""

import argparse

import ray

from spar_hf.ray import Segment

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="a folder of pictures, or Parquet")
parser.add_argument("target", help="a folder for the results")
parser.add_argument("--column", default="bytes", help="of Parquet: that of the pictures, encoded or paths (bytes)")
parser.add_argument("--model", default="tiny")
parser.add_argument("--labels", default="cake; car, automobile; tree; apple; star; sea; sky; sand")
parser.add_argument("--actors", type=int, default=2, help="each loads the model once (2)")
parser.add_argument("--gpus", type=float, default=0, help="of each actor (0)")
args = parser.parse_args()

if "parquet" in args.source:
    pictures = ray.data.read_parquet(args.source)
else:
    pictures = ray.data.read_binary_files(args.source, include_paths=True)  # columns `bytes` and `path`
found = pictures.map_batches(
    Segment,
    fn_constructor_kwargs={"model": args.model, "labels": args.labels, "column": args.column},
    batch_size=16,
    concurrency=args.actors,
    num_gpus=args.gpus or None,
)
found.write_parquet(args.target)
print(f"{ray.data.read_parquet(args.target).count()} pictures in {args.target}")
