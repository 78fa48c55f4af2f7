"""How much memory does an evaluation take, whole or batch by batch?

Run it as `python benchmarks/evaluation.py [--images 60000] [--eval-batch-size 500]`. Printed is the largest memory that
the whole process has held (its peak resident set), before training and after two steps that evaluate a convolutional
network on so many images of 28x28. One number a process: run it again for another size.
"""

from __future__ import annotations

import argparse
import resource
import sys

import jax
import numpy as np
from accuracy_tasks import StridedCnn, accuracy
from shared import classification

import eqxproj


def peak() -> float:
    """The peak resident set of this process in GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--eval-batch-size", type=int, default=500)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.random((args.images, 1, 28, 28), np.float32)
    labels = rng.integers(0, 10, args.images).astype(np.int32)
    before = peak()
    eqxproj.train(
        StridedCnn(jax.random.key(0)),
        (images[:64], labels[:64]),
        classification,
        steps=2,
        batch_size=64,
        eval_data=(images, labels),
        eval_batch_size=args.eval_batch_size,
        evaluate={"accuracy": accuracy},
    )
    print(
        f"{args.images} images, {args.eval_batch_size} at a time: {before:.2f} GB before, {peak():.2f} GB at the peak"
    )


if __name__ == "__main__":
    main()
