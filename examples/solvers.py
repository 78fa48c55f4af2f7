"""The seven solvers on one small network, then one problem, looked at and solved by hand.

    python examples/solvers.py                                # all of them: about a minute and a half on two cores
    python examples/solvers.py --solvers DifferenceMap        # one of them, beside the defaults and Adam
    python examples/solvers.py --steps 60                     # longer

Handwritten digits, an `equinox.nn.MLP`, cross-entropy. `train(..., solver=X())` sets all else by the solver and the
depth of the network. Prints accuracy on held-out images, seconds of training and seconds of compilation. Then writes
two pictures: the graph of a problem, and gap and violation over the steps of its solution. One seed each: small
differences mean nothing. What to expect: on a network that has gradients, they are as accurate and far faster.
"""

import argparse
import pathlib
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxproj

# A loss becomes a list of constraints: each operation's output is the function of its inputs, copies of a variable are
# equal, and the objective wants predictions near the labels. The nodes have two colors, so that no two of one color
# touch. P_A projects onto all constraints of the color with the objective in it, P_B onto the others; R = 2P - 1
# reflects there. What differs between the solvers is in which order they do so, and what they remember.

SOLVERS: dict[str, eqxproj.AbstractSolver] = {
    # One projection after another, from the objective back to the data, as backpropagation goes. This is what `train`
    # takes by default: in the default metric one such sweep gives the gradient, at about its cost, and goes on through
    # signs, roundings and other steps that have none. Take it to train: of these seven it is by far the fastest.
    "CyclicProjections": eqxproj.CyclicProjections(),
    # x <- P_B P_A x. All nodes of a color at once, and no memory: before each projection all copies are made equal. A
    # step brings a signal only two nodes farther, so that `train` makes about as many of them for each minibatch as the
    # graph has layers. Take it as the plain one to compare others with, and where memory is short.
    "AlternatingProjections": eqxproj.AlternatingProjections(),
    # x <- R_B R_A x. A reflection goes on as far behind a constraint as the state was before it. So it is bold: nothing
    # damps it, and it need not come to rest. Take it for a few quick steps on each minibatch, not for a point that
    # meets every constraint.
    "AlternatingReflections": eqxproj.AlternatingReflections(),
    # x <- (x + R_B R_A x) / 2. The mean of where it is and where two reflections lead, which damps them. Its memory are
    # the copies that differ; its gap, the distance of the two projections in a step, says how far the colors are from
    # agreement, and `tol` is a bound of it. Take it first where you want a point that satisfies all constraints.
    "DouglasRachford": eqxproj.DouglasRachford(),
    # x <- x + P_A(2 P_B x - x) - P_B x. With `beta` one, as here, that is Douglas-Rachford with its colors exchanged;
    # any other `beta` takes both orders in one step, and twice the time. It is known from hard puzzles with discrete
    # solutions. Take it where Douglas-Rachford is stuck, and try several values of `beta`.
    "DifferenceMap": eqxproj.DifferenceMap(),
    # x <- x + beta (P_B(2 P_A x - x) - P_A x). The same idea in small steps: slow and steady, and constraints that lag
    # behind may be made stiffer on the way (`reweight`). Take it for networks of thresholds and other discrete
    # problems, with `beta` 0.2 and 10,000 steps or more. On a minibatch, with few steps, it goes the shortest way.
    "RelaxedReflectReflect": eqxproj.RelaxedReflectReflect(),
    # Douglas-Rachford on one pair of neighbouring layers after another, from the objective back. One step goes through
    # the whole network, and yet it has a memory; but layers wait for each other, and it takes long to compile. Take it
    # where two colors pass signals on too slowly. In this table nothing speaks for it.
    "CyclicDouglasRachford": eqxproj.CyclicDouglasRachford(),
}


def loss(model, x, y):
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def margin(model, x, y):
    """Each label's score is to exceed every other by one: a constraint that a few images can satisfy exactly."""
    return jnp.mean(eqxproj.losses.margin(jax.vmap(model)(x), y))


@eqx.filter_jit
def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=-1) == y)


def compare(model: eqx.nn.MLP, data: eqxproj.datasets.Dataset, names: Sequence[str], steps: int) -> dict[str, float]:
    """Trains the model by each solver, and prints a table."""
    longer = 20 * steps  # their steps take a fiftieth of the time of most others, or less
    runs = {
        "Adam": lambda: eqxproj.train(model, data.train, loss, steps=longer, method="gradient"),
        "defaults": lambda: eqxproj.train(model, data.train, loss, steps=longer),
        **{name: lambda name=name: eqxproj.train(model, data.train, loss, steps=steps, solver=SOLVERS[name])
           for name in names},
    }  # fmt: skip
    x, y = map(jnp.asarray, data.test)
    reached = {}
    print(f"{'':24}{'steps':>6}{'accuracy':>10}{'seconds':>9}{'compilation':>13}")
    for name, run in runs.items():
        result = run()
        reached[name] = float(accuracy(result.model, x, y))
        history = result.history
        seconds, compilation = history["seconds"][-1], history["compile_seconds"]
        print(f"{name:24}{history['step'][-1]:6}{reached[name]:10.3f}{seconds:9.2f}{compilation:13.2f}", flush=True)
    return reached


def look_inside(model: eqx.nn.MLP, data: eqxproj.datasets.Dataset, figure: pathlib.Path) -> float:
    """One problem by hand: what is in it, how a solver gets on, and what the found model does."""
    x, y = (jnp.asarray(part[:32]) for part in data.train)

    # The whole batch is one problem. `explain` lists its nodes from the objective back: operation, rule, shapes, color.
    problem = eqxproj.feasibility_problem(margin, model, x, y)
    print(problem.explain())

    # The loop is one compiled program. It measures every 20 steps, and stops where the gap is below `tol`.
    solution = eqxproj.solve(problem, eqxproj.DouglasRachford(), steps=400, every=20, tol=1e-3)
    print(solution)

    # The gap is the distance between the two projections of a step: whether the two colors agree. The violation is the
    # worst of all constraints, and falls later.
    print(f"{'step':>6}{'gap':>10}{'violation':>11}")
    measures = (solution.stats[name] for name in ("step", "gap", "violation"))
    for step, gap, violation in list(zip(*map(np.asarray, measures), strict=True))[::4]:
        print(f"{step:6}{gap:10.2g}{violation:11.2g}")

    # The parameters that the copies agree on make a model like any other.
    before, after = (float(accuracy(one, x, y)) for one in (model, solution.model))
    print(f"of its 32 images the model knew {before:.0%} before, and knows {after:.0%}")

    graph = figure.with_stem(f"{figure.stem}_graph")
    try:
        problem.draw(graph)
        solution.plot(figure, problem=problem)
    except ImportError as error:  # matplotlib and networkx are optional
        print(f"no picture was drawn: {error}")
    else:
        print(f"wrote {graph} and {figure}")
    return after


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="steps of each solver (default: %(default)s)")
    parser.add_argument("--solvers", nargs="*", choices=SOLVERS, default=list(SOLVERS), help="all by default")
    parser.add_argument("--figure", metavar="FILE", type=pathlib.Path, default=pathlib.Path("solvers.png"))
    options = parser.parse_args(argv)

    data = eqxproj.datasets.load("digits").flatten()
    model = eqx.nn.MLP(data.input_shape[0], data.n_classes, width_size=32, depth=1, key=jax.random.key(0))
    reached = compare(model, data, options.solvers, options.steps)
    return reached | {"by hand": look_inside(model, data, options.figure)}


if __name__ == "__main__":
    main()
