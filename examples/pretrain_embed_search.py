"""Pre-trains on a folder of images without labels, embeds them all, and finds the images nearest to one of them.

    python examples/pretrain_embed_search.py photos --query 1.jpg --out runs/photos

A folder of a few thousand small images takes minutes on two cores (the preset own_tiny, docs/recipes.md). A run that was
stopped is continued by the same command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import fastbyol
from fastbyol.train import main as train


def nearest(features: fastbyol.FeatureFile, query: str, *, count: int) -> list[tuple[str, float]]:
    """Returns the names of the images whose features have the largest cosine with the query's, and these cosines."""
    unit = features.read().astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    names = list(features.names)
    own = names.index(query)
    cosine = unit @ unit[own]
    return [(names[row], float(cosine[row])) for row in np.argsort(-cosine) if row != own][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of images")
    parser.add_argument("--query", required=True, help="an image of the folder, by its path in it")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--count", type=int, default=5, help="images to find (%(default)s)")
    options, training = parser.parse_known_args()  # the rest are options of the training
    if not (options.photos / options.query).is_file():  # checked before the training, which takes minutes
        parser.error(f"--query {options.query}: {options.photos} has no such image; give its path in that folder")
    train(["--preset", "own_tiny", "--data.train", str(options.photos), "--out", str(options.out), *training])
    features = fastbyol.embed(str(options.out), str(options.photos), out=str(options.out / "features.npz"))
    for name, cosine in nearest(features, options.query, count=options.count):
        print(f"{cosine:.3f}  {name}")


if __name__ == "__main__":
    main()
