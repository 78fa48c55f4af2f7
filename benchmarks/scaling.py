"""Steps per second of data parallel training, by the number of devices.

Run it as `python benchmarks/scaling.py`. On a CPU, `--virtual 4` makes four devices of it, which share its cores: that
says what dividing costs, not what it gains. The batch grows with the devices, so that each has the same work.
"""

from __future__ import annotations

import argparse
import os

PARSER = argparse.ArgumentParser(description=__doc__)
PARSER.add_argument("--steps", type=int, default=200)
PARSER.add_argument("--width", type=int, default=512)
PARSER.add_argument("--batch-size", type=int, default=256, help="of one device")
PARSER.add_argument("--repeats", type=int, default=3)
PARSER.add_argument("--virtual", type=int, help="how many devices a CPU counts as")


def main(options: argparse.Namespace) -> None:
    import equinox as eqx
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from shared import classification

    import eqxproj

    rng = np.random.default_rng(0)
    model = eqx.nn.MLP(784, 10, options.width, 2, key=jax.random.key(0))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= jax.device_count()]
    print(f"{jax.devices()[0].device_kind}: samples per second, mean (deviation) of {options.repeats} runs")
    for count in counts:
        size = options.batch_size * count
        x = rng.normal(size=(4 * size, 784)).astype(np.float32)
        y = rng.integers(0, 10, 4 * size)
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        rates = []
        for _ in range(options.repeats):
            history = eqxproj.train(
                model, (x, y), classification, steps=options.steps, batch_size=size, sharding=sharding
            ).history
            rates.append(options.steps * size / history["seconds"][-1])
        print(f"{count:3} devices  {np.mean(rates):10.0f} ({np.std(rates):.0f})")


if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.virtual:  # before JAX is imported
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={OPTIONS.virtual}"
    main(OPTIONS)
