"""The normal form: what it inlines, what it makes explicit, and that it computes what the function computes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from eqxproj._program._affine import affine_terms
from eqxproj._program._equations import dependents, live
from eqxproj._program._fragment import forward
from eqxproj._program._normal_form import normal_form

CALLS = {"jit", "pjit", "custom_jvp_call", "remat2", "checkpoint"}
CALLS |= {"closed_call", "core_call"}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def program_of(f, *args):
    return normal_form(jax.make_jaxpr(f)(*args))


def names(program):
    return [e.name for e in program.equations]


def static_of(program, index=0):
    return program.static[program.outputs[index].index]


def assert_same_function(f, *args):
    """The normal form of `f` computes what `f` does; returns the normal form."""
    program = program_of(f, *args)
    leaves = jax.tree_util.tree_leaves(args)
    env = forward(program, leaves)
    got = [env[v.index] for v in program.outputs]
    want = jax.tree_util.tree_leaves(f(*args))
    assert len(got) == len(want)
    for a, b, v in zip(got, want, program.outputs, strict=True):
        assert v.shape == jnp.shape(b) and v.dtype == jnp.result_type(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    return program


@jax.custom_jvp
def doubled(x):
    return 2 * x


@doubled.defjvp
def _doubled_jvp(primals, tangents):
    return doubled(*primals), 2 * tangents[0]


@jax.custom_vjp
def tripled(x):
    return 3 * x


tripled.defvjp(lambda x: (tripled(x), None), lambda _, g: (3 * g,))


@jax.checkpoint
def rematerialized(x):
    return jnp.sin(x) * x


@jax.jit
def jitted(x):
    return jnp.tanh(x) + x


LIFTED = np.linspace(-1, 1, 8, dtype=np.float32)


@jax.jit
def with_constant(x):
    return x * LIFTED + jnp.arange(8.0)


@jax.jit
def nested(x):
    return jitted(doubled(jitted(x))) + rematerialized(tripled(x))


@jax.custom_jvp
def halved_in_a_loop(x):
    return jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] * 0.5, c[1] + 1), (x, 0))[0]


@halved_in_a_loop.defjvp
def _halved_jvp(primals, tangents):
    return halved_in_a_loop(*primals), tangents[0] / 8


COEFFICIENTS = np.linspace(-1, 2, 7, dtype=np.float32)


def horner(x, reverse=False, coefficients=COEFFICIENTS):
    return jax.lax.scan(lambda c, a: (c * x + a, None), jnp.zeros_like(x), coefficients, reverse=reverse)[0]


def scanned(x):
    return jax.lax.scan(lambda c, row: (jitted(c) * 0.5 + row, c.sum()), jnp.zeros(x.shape[1:]), x)


def branched(x):
    return jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)


def softmax_attention(x):
    scores = jax.nn.softmax(x @ x.T / jnp.sqrt(8.0), -1)
    return jnp.einsum("st,td->sd", scores, x)


FUNCTIONS = {
    "identity": lambda x: x,
    "constant": lambda x: jnp.ones(3),
    "jit": jitted,
    "custom_jvp": doubled,
    "custom_vjp": tripled,
    "checkpoint": rematerialized,
    "nested": nested,
    "constants": with_constant,
    "repeated": lambda x: jitted(x) - jitted(x * 2) + jitted(jitted(x)),
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "leaky": jax.nn.leaky_relu,
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "where": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "logsumexp": lambda x: jax.nn.logsumexp(x, -1),
    "softmax": jax.nn.softmax,
    "attention": softmax_attention,
    "norm": lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5),
    "outer": lambda x: x[:, None, :] * x[None],
    "vmapped": jax.vmap(lambda row: jnp.outer(row, row) + row),
    "inner_vmap": lambda x: jax.vmap(jax.vmap(jitted, 0), 1)(x),
    "scan": scanned,
    "polyval": lambda x: jnp.polyval(COEFFICIENTS, x),
    "horner": horner,
    "horner backward": lambda x: horner(x, reverse=True),
    "cond": branched,
    "while": lambda x: jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] * 0.5, c[1] + 1), (x, 0))[0],
    "stop_gradient": lambda x: x * jax.lax.stop_gradient(jitted(x)),
    "several_outputs": lambda x: (x + 1, x.sum(), (x > 0).astype(jnp.int32)),
    "same_output_twice": lambda x: (jitted(x),) * 2,
    "integers": lambda x: jnp.round(x).astype(jnp.int32) % 3 + jnp.argmax(x, -1)[:, None],
    "half": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) * 2,
    "gather": lambda x: x[jnp.array([0, 2, 2])] @ x.T,
    "split": lambda x: jnp.concatenate(jnp.split(x, 2, 1)[::-1], 1),
    "pad": lambda x: jnp.pad(x, 1, constant_values=2.0)[::-1],
    "sort": lambda x: jnp.sort(x, 0)[:2],
    "derivative": jax.grad(lambda x: nested(x).sum()),
    "dead": lambda x: (jnp.sort(x), x * 2)[1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_computes_the_same(name, rng):
    program = assert_same_function(FUNCTIONS[name], random(rng, 4, 8))
    assert not CALLS & set(names(program))


@pytest.mark.parametrize("f", [jitted, doubled, rematerialized, nested], ids=lambda f: f.__name__)
def test_calls_are_inlined(f, rng):
    outer = jax.make_jaxpr(lambda x: f(x) + 1)(random(rng, 8))
    assert {e.primitive.name for e in outer.jaxpr.eqns} & CALLS
    assert not {e.name for e in normal_form(outer).equations} & CALLS


def test_repeated_calls_get_fresh_variables(rng):
    """An inner jaxpr that is called several times gives as many sets of variables."""
    program = program_of(lambda x: jitted(jitted(x)) + jitted(x), random(rng, 8))
    assert names(program).count("tanh") == 3
    made = [v.index for e in program.equations for v in e.outputs]
    assert len(made) == len(set(made))
    assert not set(made) & ({v.index for v in program.inputs} | set(program.constants))


def test_every_variable_is_made_before_it_is_read(rng):
    program = program_of(nested, random(rng, 8))
    made = {v.index for v in program.inputs} | set(program.constants)
    for equation in program.equations:
        assert {v.index for v in equation.inputs} <= made
        made |= {v.index for v in equation.outputs}


def test_inner_constants_are_lifted(rng):
    program = program_of(lambda x: with_constant(x) * with_constant(x + 1), random(rng, 8))
    lifted = [c for c in program.constants.values() if np.shape(c) == (8,)]
    assert any(np.array_equal(c, LIFTED) for c in lifted)
    env = forward(program, [jnp.ones(8)])
    want = with_constant(jnp.ones(8)) * with_constant(jnp.full(8, 2.0))
    np.testing.assert_allclose(env[program.outputs[0].index], want, rtol=1e-6)


def test_implicit_broadcasting_becomes_explicit(rng):
    """A vmapped addition may have operands of shapes (4, 8) and (1, 8); it is no elementwise operation as it stands."""
    f = jax.vmap(lambda a, b: a + b, in_axes=(0, None))
    a, b = random(rng, 4, 8), random(rng, 8)
    raw = jax.make_jaxpr(f)(a, b)
    shapes = {v.aval.shape for e in raw.jaxpr.eqns if e.primitive.name == "add" for v in e.invars}
    assert (1, 8) in shapes, "this version of JAX broadcasts explicitly: the test no longer shows anything"
    program = assert_same_function(f, a, b)
    (add,) = [e for e in program.equations if e.name == "add"]
    assert {v.shape for v in (*add.inputs, *add.outputs)} == {(4, 8)}


def test_elementwise_operands_have_the_shape_of_the_output(rng):
    f = jax.vmap(lambda a, b: jnp.where(a > b, jnp.clip(a * b, -1, 1), b - a), in_axes=(0, None))
    program = assert_same_function(f, random(rng, 4, 8), random(rng, 8))
    for equation in program.equations:
        if equation.name in ("gt", "mul", "sub", "select_n"):
            assert {v.shape for v in equation.inputs} == {equation.outputs[0].shape}


def test_scalars_known_while_tracing_stay_scalars(rng):
    program = program_of(lambda x: 2.0 * x, random(rng, 4, 8))
    assert names(program) == ["mul"]
    assert sorted(v.shape for v in program.equations[0].inputs) == [(), (4, 8)]


def test_dead_code_is_dropped(rng):
    def f(x):
        jnp.sort(x)
        jitted(x)
        return jnp.sin(x)

    assert names(program_of(f, random(rng, 8))) == ["sin"]


def test_live_keeps_order_and_what_is_needed(rng):
    program = program_of(lambda x: (jnp.sin(jnp.cos(x)), jnp.exp(jnp.abs(x))), random(rng, 8))
    assert [e.name for e in live(program.equations, [program.outputs[0]])] == ["cos", "sin"]
    assert [e.name for e in live(program.equations, [program.outputs[1]])] == ["abs", "exp"]
    assert live(program.equations, []) == ()


def test_aliases_leave_no_equation(rng):
    """A copy, a name for checkpoint policies and an optimization barrier are the value that they are given."""

    def f(x):
        x = checkpoint_name(jnp.array(x, copy=True), "x")
        return jax.lax.optimization_barrier((jnp.sin(x), x))[0]

    program = assert_same_function(f, random(rng, 8))
    assert names(program) == ["sin"]
    assert program.equations[0].inputs == program.inputs


def test_outputs_may_be_inputs_and_constants(rng):
    program = assert_same_function(lambda x, y: (y, x, 3.0 + jnp.zeros(2)), random(rng, 8), random(rng, 2))
    assert program.outputs[:2] == program.inputs[::-1]


def test_control_flow_stays_one_equation(rng):
    assert names(program_of(branched, random(rng, 8))).count("cond") == 1
    assert names(program_of(scanned, random(rng, 4, 8))).count("scan") == 1


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap], ids=["plain", "jit", "vmap"])
def test_polynomials_are_unrolled(wrap, rng):
    """A scan over a few constants is elementwise operations, and their coefficients are known by value."""
    program = assert_same_function(wrap(horner), random(rng, 3, 8))
    assert set(names(program)) <= {"mul", "add", "broadcast_in_dim"}
    found = [program.static.get(e.inputs[1].index) for e in program.equations if e.name == "add"]
    np.testing.assert_allclose(found, COEFFICIENTS)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: horner(x, coefficients=np.ones(33, np.float32)),
        lambda x: horner(x[0], coefficients=x.sum(-1)),
        lambda x: jax.lax.scan(lambda c, a: (c * x + a, c), x, COEFFICIENTS)[1],
        lambda x: jax.lax.scan(lambda c, a: (jnp.sort(c) + a, None), x, COEFFICIENTS)[0],
        lambda x: jax.lax.fori_loop(0, 3, lambda i, c: c * x, x),
    ],
    ids=["long", "not over constants", "every step is kept", "not elementwise", "over nothing"],
)
def test_other_scans_stay_one_equation(f, rng):
    assert names(assert_same_function(f, random(rng, 4, 8))).count("scan") == 1


def test_constants_are_known_by_value_inside_of_a_jit():
    found = []

    @jax.jit
    def outer(x):
        program = program_of(lambda x: jnp.maximum(x, np.float32(0.25)) + np.full(8, 2.0, np.float32), x)
        (maximum,) = [e for e in program.equations if e.name == "max"]
        found.append(program.static.get(maximum.inputs[1].index))
        assert all(isinstance(c, np.ndarray) for c in program.constants.values())
        return forward(program, [x])[program.outputs[0].index]

    np.testing.assert_allclose(outer(jnp.zeros(8)), 2.25)
    assert found == [0.25]


@jax.custom_jvp
def with_position(x, k):
    return x[k] * jnp.max(x), jnp.argmax(x)


@with_position.defjvp
def _with_position_jvp(primals, tangents):
    y, k = with_position(*primals)
    return (y, k), (tangents[0][primals[1]], np.zeros((), jax.dtypes.float0))


def test_a_derivative_of_ones_own_is_kept_beside_integers(rng):
    """The integers that the call returns pass no derivative on."""
    program = assert_same_function(lambda x: with_position(x, jnp.asarray(2)), random(rng, 8))
    assert names(program) == ["custom_jvp_call", "stop_gradient"]


def test_a_function_with_no_derivative_but_its_own_stays_one_equation(rng):
    program = assert_same_function(lambda x: halved_in_a_loop(x) + doubled(x), random(rng, 8))
    assert names(program).count("custom_jvp_call") == 1 and "while" not in names(program)


@pytest.mark.parametrize(
    "f, value",
    [
        (lambda x: jnp.asarray(2.5), 2.5),
        (lambda x: -jnp.full(3, 2.5), -2.5),
        (lambda x: jnp.broadcast_to(jnp.asarray(-3.0), (4, 8)), -3.0),
        (lambda x: jnp.full((2, 2), 7, jnp.int32).astype(jnp.float32), 7.0),
        (lambda x: jnp.full((2, 2), 2.75).astype(jnp.int32), 2.0),
        (lambda x: jnp.full((2, 2), -2.75).astype(jnp.int32), -2.0),
        (lambda x: jnp.ones((4, 8)).reshape(8, 4), 1.0),
        (lambda x: jax.lax.stop_gradient(jnp.full(3, 0.5)), 0.5),
        (lambda x: jax.jit(lambda c: c * x.sum(), inline=False)(2.0) * 0 + 1, None),
    ],
    ids=["literal", "negated", "broadcast", "converted", "truncated", "negative", "reshaped", "stopped", "computed"],
)
def test_static_values(f, value):
    program = program_of(f, jnp.ones(2))
    if value is None:
        assert program.outputs[0].index not in program.static
    else:
        assert static_of(program) == value


def test_static_values_pass_into_inner_calls(rng):
    """The zero of `relu`, a literal of an inner call, is known by value where it is used."""
    program = program_of(lambda x: jax.nn.relu(x), random(rng, 8))
    (maximum,) = [e for e in program.equations if e.name == "max"]
    assert [program.static.get(v.index) for v in maximum.inputs] == [None, 0.0]


def test_an_array_is_not_static(rng):
    program = program_of(lambda x: x + jnp.arange(8.0), random(rng, 8))
    add = program.equations[-1]
    assert not {v.index for v in add.inputs} & set(program.static)


def line_of(f, offset=1):
    return f"{__file__.rsplit('/', 1)[-1]}:{f.__code__.co_firstlineno + offset} ({f.__name__})"


def user_layer(x):
    return jnp.sort(x)


def user_relu(x):
    return jax.nn.relu(x)


def user_softmax(x):
    return jax.nn.softmax(x)


@pytest.mark.parametrize("f", [user_layer, user_relu, user_softmax], ids=lambda f: f.__name__)
def test_source_is_the_line_of_the_user(f, rng):
    program = program_of(jax.vmap(f), random(rng, 4, 8))
    assert {e.source for e in program.equations} == {line_of(f)}


def test_source_of_each_call_of_a_library_function(rng):
    """The trace of `relu` is made once and used twice; each use is at its own line."""

    def f(x):
        x = jax.nn.relu(x)
        return jax.nn.relu(x - 1)

    found = [e.source for e in program_of(f, random(rng, 8)).equations if e.name == "max"]
    assert found == [line_of(f, 1), line_of(f, 2)]


@pytest.mark.parametrize("wrap", [jax.jit, eqx.filter_jit, jax.checkpoint], ids=["jit", "filter_jit", "checkpoint"])
def test_source_within_the_users_own_jitted_functions(wrap, rng):
    """A jitted loss keeps the lines of its layers: not all of them are at the call of the loss."""

    def layer(x):
        return jnp.sort(x)

    def loss(x):
        y = wrap(layer)(x)
        return jax.nn.relu(y)

    program = program_of(lambda x: wrap(loss)(x), random(rng, 8))
    found = {e.name: e.source for e in program.equations}
    assert found["sort"] == line_of(layer)
    assert found["max"] == line_of(loss, 2)


def dot(contract, batch=((), ()), **options):
    return lambda a, b: jax.lax.dot_general(a, b, (contract, batch), **options)


TURNED = {
    "vmap": lambda a, b: jax.vmap(lambda x: b[0] @ x)(a[0]),
    "batch": lambda a, b: jnp.swapaxes(dot(((2,), (2,)), ((0,), (0,)))(a, b), 1, 2),
    "several axes": lambda a, b: jnp.transpose(dot(((2,), (2,)))(a, b), (2, 3, 0, 1)),
    "of a vector": lambda a, b: jnp.transpose(dot(((0,), (2,)))(a[0, 0], b), (0, 1)),
    "precision": lambda a, b: (
        dot(((1,), (1,)), precision=(jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGH))(a[0], b[0]).T
    ),
    "type": lambda a, b: (
        dot(((1,), (1,)), preferred_element_type=jnp.float32)(a[0].astype(jnp.bfloat16), b[0].astype(jnp.bfloat16)).T
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_product_that_is_read_transposed_exchanges_its_operands(name, rng):
    a, b = random(rng, 2, 3, 4), random(rng, 2, 5, 4)
    found = names(assert_same_function(TURNED[name], a, b))
    assert "dot_general" in found and "transpose" not in found


KEPT = {
    "read twice": lambda a, b: (y := a[0] @ b[0].T).T + y.sum(),
    "returned": lambda a, b: ((y := dot(((1,), (1,)))(a[0], b[0])), y.T),
    "other axes": lambda a, b: jnp.transpose(dot(((2,), (2,)), ((0,), (0,)))(a, b), (1, 2, 0)),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_transposes_stay(name, rng):
    assert "transpose" in names(assert_same_function(KEPT[name], random(rng, 2, 3, 4), random(rng, 2, 5, 4)))


def test_precision_goes_with_the_operands(rng):
    program = program_of(TURNED["precision"], random(rng, 2, 3, 4), random(rng, 2, 5, 4))
    (product,) = [e for e in program.equations if e.name == "dot_general"]
    assert product.params["precision"] == (jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT)


def test_dependents():
    program = normal_form(jax.make_jaxpr(lambda a, b: (a + 1, b * 2, jax.lax.stop_gradient(a) * 3, a * b))(1.0, 2.0))
    found = dependents(program.equations, [program.inputs[0]])
    assert [v.index in found for v in program.outputs] == [True, False, False, True]


AFFINE = {
    "add": (lambda x, y, k: x + y, [(1.0, None), (1.0, None)]),
    "sub": (lambda x, y, k: x - y, [(1.0, None), (-1.0, None)]),
    "sub known": (lambda x, y, k: k - x, [(-1.0, None)]),
    "neg": (lambda x, y, k: -x, [(-1.0, None)]),
    "mul number": (lambda x, y, k: 3.0 * x, [(3.0, None)]),
    "mul zero": (lambda x, y, k: 0.0 * x, [(0.0, None)]),
    "div number": (lambda x, y, k: x / 4.0, [(0.25, None)]),
    "mul known": (lambda x, y, k: x * k, [(1.0, 1)]),
    "div known": (lambda x, y, k: x / k, [(1.0, -1)]),
    "convert": (lambda x, y, k: x.astype(jnp.bfloat16), [(1.0, None)]),
    "div zero": (lambda x, y, k: x / 0.0, None),
    "by unknown": (lambda x, y, k: k / x, None),
    "product": (lambda x, y, k: x * y, None),
    "to integers": (lambda x, y, k: x.astype(jnp.int32), None),
    "function": (lambda x, y, k: jnp.exp(x), None),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_terms(name):
    f, want = AFFINE[name]
    program = normal_form(jax.make_jaxpr(f)(*jnp.ones((3, 4))))
    unknown = dependents(program.equations, program.inputs[:2])
    found = affine_terms(program.equations[-1], unknown, program.static)
    if want is None:
        assert found is None
        return
    assert [(t.scale, t.factors[0][1] if t.factors else None) for t in found] == want
    assert all(t.axes == () and t.variable in program.inputs[:2] for t in found)
    assert all(v == program.inputs[2] for t in found for v, _ in t.factors)
