"""The expectations of optax and Flax users of every optimizer."""

import functools
import inspect
import itertools

import chex
import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import gum_optax as go

from helpers import AMPLIFIED, CORE_AND_LONG, NEED_PARAMETERS, OPTIMIZERS, run

STATIC = ("rank", "period", "full_rank_fraction", "rounds", "random_after")
# The arguments that inject_hyperparams may trace, for each optimizer.
NUMBERS = {"momentum": 0.8, "consistent_rms": 0.3, "scale": 0.2, "b1": 0.8, "norm_growth": 1.2}
NUMBERS |= {"ratio": 0.3, "radius": 40.0, "edge_radius": 2000.0}


@pytest.fixture(params=CORE_AND_LONG)
def name(request):
    return request.param


@pytest.fixture
def factory(name):
    make, arguments = OPTIMIZERS[name]
    return functools.partial(make, **arguments)


@functools.cache
def optimizer(name):
    """One object for all tests, so that jit compiles the update once for each structure of arguments."""
    make, arguments = OPTIMIZERS[name]
    return make(0.1, **arguments)


@pytest.fixture
def tx(name):
    return optimizer(name)


@functools.cache
def steps_of(name):
    return run(optimizer(name), GRADIENTS, tree())[0]


@pytest.fixture
def expected(name):
    """The optimizer's steps at learning rate 0.1, compiled once."""
    return steps_of(name)


def tree(seed=0, dtype=jnp.float32):
    """A stack of blocks wider than the rank, a separate block, an embedding, a vector."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    layer = {"kernel": normal(7, 4)}
    return {"stack": normal(5, 4, 6), "layer": layer, "embedding": normal(8, 4), "bias": normal(4)}


GRADIENTS = [tree(seed) for seed in range(1, 6)]


def assert_same_steps(a, b, atol=AMPLIFIED):
    for x, y in zip(a, b, strict=True):
        chex.assert_trees_all_close(x, y, atol=atol)


def test_state_keeps_its_structure_shapes_and_dtypes(tx):
    params = tree()
    states = [tx.init(params)]
    for g in GRADIENTS:
        _, state = jax.jit(tx.update)(g, states[-1], params)
        states.append(state)
    for state in states[1:]:
        chex.assert_trees_all_equal_structs(state, states[0])
        chex.assert_trees_all_equal_shapes_and_dtypes(state, states[0])


def test_state_holds_arrays_only_none_empty_none_a_typed_key_and_float32_momentum(tx):
    state = jax.jit(tx.init)(tree(dtype=jnp.bfloat16))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert isinstance(leaf, jax.Array), path
        assert leaf.size, path
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.extended), path
    matrices = state.inner.inner_states["matrices"]
    assert {x.dtype for x in jax.tree.leaves(matrices) if x.ndim > 1} <= {jnp.dtype("float32")}


DTYPES = [
    (jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32),
    *(
        pytest.param(params, gradients, marks=pytest.mark.long)
        for params, gradients in itertools.product((jnp.float32, jnp.bfloat16, jnp.float16), repeat=2)
        if {params, gradients} not in ({jnp.float32}, {jnp.float32, jnp.bfloat16})
    ),
]


@pytest.mark.parametrize(("params_dtype", "gradient_dtype"), DTYPES)
def test_updates_come_back_in_the_dtype_of_the_parameters(tx, params_dtype, gradient_dtype):
    params = tree(dtype=params_dtype)
    gradients = [tree(seed, gradient_dtype) for seed in (1, 2)]
    updates, state = run(tx, gradients, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates[-1], params)
    exact, _ = run(tx, [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in gradients], tree())
    for name, step in exact[0].items():
        # The first step differs only by the gradient's rounding of 2^-8 times Newton-Schulz's slope.
        off = optax.tree.sub(optax.tree.cast(updates[0][name], jnp.float32), step)
        assert float(optax.tree.norm(off)) < 0.2 * float(optax.tree.norm(step)), name
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    assert all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves(state))


def test_it_is_the_same_without_parameters_unless_steps_are_relative_to_them(name, tx, expected):
    state, update, updates = tx.init(tree()), jax.jit(tx.update), []
    if name in NEED_PARAMETERS:
        with pytest.raises(ValueError, match=r"relative to the parameters: call update\(gradients, state, "):
            update(GRADIENTS[0], state)
        return
    for g in GRADIENTS:
        u, state = update(g, state)
        updates.append(u)
    assert_same_steps(updates, expected)


def test_none_leaves_and_extra_arguments_are_fine(tx, expected):
    params, *with_none = [g | {"frozen": None} for g in (tree(), *GRADIENTS)]
    state, update = tx.init(params), jax.jit(tx.update)
    for g, wanted in zip(with_none, expected, strict=True):
        u, state = update(g, state, params, value=1.0, steps=3, unheard_of=jnp.ones(3))
        assert u.pop("frozen") is None
        chex.assert_trees_all_close(u, wanted, atol=AMPLIFIED)


def test_golore_takes_a_tree_without_leaves():
    assert optimizer("golore").init(None)


def test_a_tree_without_matrices_or_without_leaves_is_fine(tx):
    for params in ({"bias": jnp.ones(3)}, {}, {"a": None}):
        updates, _ = run(tx, [params, params])
        chex.assert_trees_all_equal_structs(updates[-1], params)


def test_a_single_array_is_a_tree(tx):
    g = jnp.ones((4, 7))
    updates, _ = run(tx, [g, g])
    assert updates[-1].shape == (4, 7)


def test_scan_is_the_loop(tx, expected):
    params = tree()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)

    def body(state, g):
        u, state = tx.update(g, state, params)
        return state, u

    _, updates = jax.jit(lambda: jax.lax.scan(body, tx.init(params), stacked))()
    for i, u in enumerate(expected):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], updates), u, atol=AMPLIFIED)


def test_donation_and_a_second_compilation_are_not_needed(tx):
    params = tree()
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, g):
        traces.append(1)
        u, state = tx.update(g, state, params)
        return optax.apply_updates(params, u), state

    state = jax.jit(tx.init)(params)
    for g in GRADIENTS:
        params, state = step(params, state, g)
    assert len(traces) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_map_params_reaches_every_leaf_that_mirrors_a_parameter(tx):
    state = tx.init(tree())
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state, transform_non_params=lambda x: x)
    chex.assert_trees_all_equal_structs(mapped, state)
    others = (".count", ".refreshes", ".period", ".key", ".captured", ".index", ".slots", ".skipped")
    after = jax.tree.leaves(mapped)
    for (path, leaf), new in zip(jax.tree_util.tree_leaves_with_path(state), after, strict=True):
        where = jax.tree_util.keystr(path)
        mirrors = not any(name in where for name in others)
        np.testing.assert_array_equal(new, leaf + 1 if mirrors else leaf, err_msg=where)


def test_map_params_gives_what_mirrors_a_parameter_that_parameters_sharding(tx):
    """State with the parameter's shape has the parameter's sharding; `state_shardings` has all others."""
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = tree()
    specs = {"stack": (None, "x", "y"), "layer": {"kernel": ("y",)}}
    specs |= {"embedding": ("x", "y"), "bias": ("y",)}
    where = jax.tree.map(lambda _, spec: NamedSharding(mesh, PartitionSpec(*spec)), params, specs)

    def is_hole(x):
        return isinstance(x, optax.MaskedNode)

    def of(leaf, param, sharding):
        if is_hole(leaf):
            return leaf
        return sharding if leaf.shape == param.shape else everywhere

    state = tx.init(params)

    def not_of_a_parameter(leaves):  # GUM's draws and slots arrive as dicts
        return jax.tree.map(lambda _: everywhere, leaves)

    found = optax.tree.map_params(
        tx, of, state, params, where, transform_non_params=not_of_a_parameter, is_leaf=is_hole
    )
    wanted = {
        jax.tree_util.keystr(path): (x.shape, sharding)
        for (path, x), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(where), strict=True
        )
    }
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(found), strict=True
    ):
        at = jax.tree_util.keystr(path)
        of_its_shape = [s for end, (shape, s) in wanted.items() if at.endswith(end) and shape == leaf.shape]
        assert sharding == (of_its_shape or [everywhere])[0], at
    placed = jax.tree.map(lambda x, s: x.sharding == s, jax.device_put(state, found), found)
    assert all(jax.tree.leaves(placed))


def test_inject_hyperparams_traces_all_but_the_arguments_that_decide_shapes(factory):
    takes = inspect.signature(factory.func).parameters
    numbers = {"learning_rate": 0.1, "weight_decay": 0.01}
    numbers |= {name: value for name, value in NUMBERS.items() if name in takes}
    expected, _ = run(factory(**numbers), GRADIENTS, tree())
    static = [name for name in STATIC if name in factory.keywords]
    injected = optax.inject_hyperparams(factory.func, static_args=static)
    # A schedule is a function of the count, and a new number needs no new compilation.
    tx = injected(**numbers | {"learning_rate": lambda count: 0.1 / (count + 1)}, **factory.keywords)
    updates, state = run(tx, GRADIENTS, tree())
    for count, (u, wanted) in enumerate(zip(updates, expected, strict=True)):
        scaled = jax.tree.map(lambda x, count=count: x / (count + 1), wanted)
        chex.assert_trees_all_close(u, scaled, atol=AMPLIFIED)
    assert set(numbers) <= set(state.hyperparams)


def test_a_schedule_is_a_learning_rate(factory, expected):
    updates, _ = run(factory(lambda count: 0.1 * (count == 1)), GRADIENTS, tree())
    for i, (u, e) in enumerate(zip(updates, expected, strict=True)):
        scaled = jax.tree.map(lambda x, i=i: x * (i == 1), e)
        chex.assert_trees_all_close(u, scaled, atol=AMPLIFIED)


def routed(tx):
    """The optimizer works among other leaves, rules and transformations."""
    masked = optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p))
    part = optax.partition({"all": masked}, lambda p: jax.tree.map(lambda _: "all", p))
    return optax.chain(optax.clip_by_global_norm(1e6), part)


WRAPPERS = {"routed": routed, "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3)}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_of_optax_change_nothing(tx, wrap, expected):
    updates, state = run(wrap(tx), GRADIENTS, tree())
    assert_same_steps(updates, expected, atol=AMPLIFIED)
    assert "skipped_steps" in go.metrics(state)


def test_multi_steps_feeds_the_mean(tx, expected):
    wrapped = optax.MultiSteps(tx, 2).gradient_transformation()
    updates, _ = run(wrapped, [g for g in GRADIENTS for _ in range(2)], tree())
    assert_same_steps(updates[1::2], expected, atol=AMPLIFIED)


@pytest.mark.parametrize("name", ["gum", "dion"])
def test_seeds_can_be_vmapped_through_the_whole_optimizer(name):
    make, arguments = OPTIMIZERS[name]
    factory = functools.partial(make, **arguments)

    def last(seed):
        tx = factory(0.1, key=seed)
        state = tx.init(tree())
        for g in GRADIENTS[:2]:
            u, state = tx.update(g, state)
        return u

    together = jax.jit(jax.vmap(last))(jnp.arange(2))
    for seed in range(2):
        updates, _ = run(factory(0.1, key=seed), GRADIENTS[:2])
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, seed=seed: x[seed], together), updates[-1], atol=AMPLIFIED
        )


def trained(tx, state, gradients):
    update = jax.jit(tx.update)
    for g in gradients:
        u, state = update(g, state, tree())
    return u, state


def test_orbax_flax_and_equinox_bring_the_state_back_to_the_bit(tx, tmp_path):
    _, state = trained(tx, tx.init(tree()), GRADIENTS[:2])
    like = jax.tree.map(jnp.zeros_like, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        from_orbax = checkpointer.restore(tmp_path / "state", like)
    from_flax = flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    from_equinox = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    expected, _ = trained(tx, state, GRADIENTS[2:])  # within a period: the third of three steps
    for restored in (from_orbax, from_flax, from_equinox):
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        u, _ = trained(tx, jax.tree.map(jnp.asarray, restored), GRADIENTS[2:])
        jax.tree.map(np.testing.assert_array_equal, u, expected)


def test_linen_train_state(tx):
    model = nn.Dense(5)
    x = jax.random.normal(jax.random.key(1), (6, 4))
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=tx)

    @jax.jit
    def step(state):
        g = jax.grad(lambda p: jnp.square(state.apply_fn({"params": p}, x)).mean())(state.params)
        return state.apply_gradients(grads=g)

    before = state.params
    for _ in range(2):
        state = step(state)
    assert int(state.step) == 2
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True))


def test_it_descends(tx):
    """The sign convention: adding the update lowers the loss."""
    params = {"kernel": jax.random.normal(jax.random.key(1), (4, 7))}
    updates, _ = run(tx, [params], params)
    assert float(jnp.vdot(updates[0]["kernel"], params["kernel"])) < 0


def test_init_from_shapes_alone(tx):
    state = jax.eval_shape(tx.init, jax.eval_shape(tree))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(tree()))


def test_leaves_of_one_shape_and_several_dtypes_are_one_group():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.bfloat16), "b": jnp.ones((8, 16))}
    params |= {"alone": jnp.ones((5, 7), jnp.bfloat16)}
    tx = go.gum(0.1, rank=2, period=1, full_rank_fraction=0.3)
    state = jax.jit(tx.init)(params)
    for seed in range(3):
        g = jax.tree.map(
            lambda x, seed=seed: jnp.asarray(np.random.default_rng(seed).normal(size=x.shape)), params
        )
        u, after = jax.jit(tx.update)(g | {"a": g["a"].astype(jnp.bfloat16)}, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(u, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        state = after


def test_a_rule_that_keeps_its_own_dtype_keeps_float32_under_low_rank():
    params = {"low": jnp.ones((3, 8, 16), jnp.bfloat16), "full": jnp.ones((5, 2), jnp.bfloat16)}
    rule = go.as_matrices(go.unbiased_low_rank(optax.trace(0.9), 2, 2, 0.4))
    state = rule.init(params)
    for dtype in (jnp.bfloat16, jnp.float32):
        _, after = rule.update(jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params), state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "raw"])
def test_a_donated_state_leaves_the_users_key_alone(key):
    tx = go.gum(0.1, rank=2, key=key)
    params = {"kernel": jnp.ones((3, 4, 7))}
    jax.jit(tx.update, donate_argnums=1)(params, tx.init(params))
    jax.random.split(key)
    tx.init(params)


def test_learning_rate_is_annotated_as_optax_looks_for_it(factory):
    annotation = factory.func.__annotations__["learning_rate"]
    assert annotation == optax.ScalarOrSchedule


def test_lookahead_and_schedule_free_take_gum():
    tx = optax.lookahead(optimizer("gum"), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(tree())
    state = tx.init(params)
    for g in GRADIENTS[:2]:
        updates, state = jax.jit(tx.update)(g, state, params)
        params = optax.apply_updates(params, updates)
    # The second step synchronizes half the way by `fast + (slow - fast)`, which rounds at numbers up to four.
    chex.assert_trees_all_close(params.fast, params.slow, atol=4 * float(jnp.finfo(jnp.float32).eps))
    steps = steps_of("gum")
    half = jax.tree.map(lambda p, a, b: p + (a + b) / 2, tree(), *steps[:2])
    chex.assert_trees_all_close(params.slow, half, atol=AMPLIFIED)

    tx = optax.contrib.schedule_free(optimizer("gum"), learning_rate=0.1)
    params, state = tree(), tx.init(tree())
    updates, state = jax.jit(tx.update)(GRADIENTS[0], state, params)
    first = optax.contrib.schedule_free_eval_params(state, optax.apply_updates(params, updates))
    # The average after one step is the first iterate of the optimizer itself.
    chex.assert_trees_all_close(first, jax.tree.map(jnp.add, params, steps[0]), atol=AMPLIFIED)


def test_a_checkpointed_model_gives_the_same_steps():
    tx, params = optimizer("gum"), {"kernel": GRADIENTS[0]["layer"]["kernel"]}

    def loss(params):
        return jnp.sum(jnp.tanh(params["kernel"] @ params["kernel"].T) ** 2)

    def step(loss):
        return tx.update(jax.grad(loss)(params), tx.init(params), params)[0]

    remade, held = (jax.jit(functools.partial(step, f))() for f in (jax.checkpoint(loss), loss))
    chex.assert_trees_all_close(remade, held, atol=AMPLIFIED)


@pytest.mark.parametrize(
    "tx",
    [
        go.muon(0.1, weight_decay=go.cautious_weight_decay(0.1), others=go.adamw_8bit(0.1)),
        optax.chain(go.scale_by_adam_8bit(), go.cautious_weight_decay(0.1)),
        go.extrapolate(go.muon(0.1), optax.scale(0.5)),
    ],
    ids=["muon", "adamw_8bit", "extrapolate"],
)
def test_a_leaf_may_be_a_number_of_python(tx):
    """As for optax's own rules; not within `jit`, where every number is an array."""
    params = {"kernel": jnp.ones((4, 6)), "temperature": 2.0}
    gradients = {"kernel": jnp.ones((4, 6)), "temperature": 0.5}
    updates, state = tx.update(gradients, tx.init(params), params)
    assert np.isfinite(updates["temperature"])
    if hasattr(state, "extrapolation"):
        assert go.evaluation_parameters(state, params)["temperature"] == 2.25
