"""Steps added to weights in bfloat16: a NumPy oracle, the mean, and bits that depend on nothing else."""

import functools
import json
import os
import subprocess
import sys

import chex
import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import gum_optax as go
from gum_optax._linalg.counter_bits import threefry
from gum_optax._linalg.rounding import noise_of_rows, round_by

DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
apply_updates = jax.jit(go.apply_updates)


def weights(dtype=jnp.bfloat16, seed=0):
    """A stack, a matrix, a vector and a number in `dtype`, and a float32 leaf; their steps in float32."""
    rng = np.random.default_rng(seed)
    shapes = {"stack": (3, 2, 5, 4), "matrix": (6, 7), "vector": (9,), "number": ()}
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    params["wide"] = jnp.float32(rng.normal(size=(4,)))
    return params, jax.tree.map(lambda x: jnp.float32(1e-3 * rng.normal(size=x.shape)), params)


def neighbours(x, dtype):
    """The largest number of `dtype` up to each `x`, and the smallest one from `x` on, in float64."""
    near = x.astype(dtype)
    below = np.where(near.astype(np.float64) <= x, near, np.nextafter(near, dtype(-np.inf)))
    above = np.where(near.astype(np.float64) >= x, near, np.nextafter(near, dtype(np.inf)))
    return below.astype(np.float64), above.astype(np.float64)


def expected(x, noise, dtype):
    """Rounded by `noise`: away from zero if the dropped part of the magnitude and the noise make a whole."""
    below, above = neighbours(np.abs(x), dtype)
    share = (np.abs(x).astype(np.float64) - below) / np.where(above > below, above - below, 1)
    return np.copysign(np.where(share + noise / 2**16 >= 1, above, below), x)


@DTYPES
def test_rounding_is_the_oracle(dtype):
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=4000) * 10.0 ** rng.uniform(-4, 4, size=4000))
    noise = rng.integers(0, 2**16, size=4000).astype(np.uint16)
    # Float16 reads the upper 13 bits.
    read = noise & 0xFFF8 if dtype == jnp.float16 else noise
    rounded = np.asarray(round_by(jnp.asarray(noise), jnp.asarray(x), dtype), np.float64)
    numpy_dtype = {jnp.bfloat16: ml_dtypes.bfloat16, jnp.float16: np.float16}[dtype]
    normal = np.abs(x) >= 2.0**-14
    np.testing.assert_array_equal(rounded[normal], expected(x, read, numpy_dtype)[normal])


@DTYPES
def test_a_leaf_is_rounded_by_the_bits_of_its_index_and_of_its_rows(dtype):
    params, updates = weights(dtype)
    new = apply_updates(params, updates, 7, 5)
    # By JAX's own threefry, whose counter is a number's row and column.
    own = jax.random.fold_in(jax.random.key(7), go._core.keys._OWN)
    own = jax.random.fold_in(own, go._transforms.apply_updates._STREAM)
    for leaf_index, name in enumerate(sorted(params)):
        if name == "wide":
            continue
        p = np.atleast_2d(np.asarray(params[name]).T).T  # a vector is a stack of numbers
        key = jax.random.fold_in(jax.random.fold_in(own, 5), leaf_index)
        row, column = np.divmod(np.arange(p.size, dtype=np.uint32), np.uint32(p.shape[-1]))
        x = jnp.asarray(params[name], jnp.float32) + updates[name]
        oracle = round_by(bits_of_jax(key, row, column).reshape(x.shape), x, dtype)
        np.testing.assert_array_equal(new[name], oracle, err_msg=name)


def bits_of_jax(key, high, low):
    """Threefry's bits for each counter, by JAX's own function; a pair of 32 bits gives 16."""
    pairs = jax.extend.random.threefry_2x32(jax.random.key_data(key), jnp.concatenate([high, low]))
    return (pairs[: len(high)] ^ pairs[len(high) :]).astype(jnp.uint16)


def test_bits_by_counter_are_those_of_jax():
    key, (high, low) = jax.random.key(3), jax.random.bits(jax.random.key(4), (2, 50))
    a, b = threefry(jax.random.key_data(key), high, low)
    np.testing.assert_array_equal((a ^ b).astype(jnp.uint16), bits_of_jax(key, high, low))


def test_a_tree_without_leaves_stays():
    assert go.apply_updates({"a": None}, {"a": None}, 0, 1) == {"a": None}


def test_any_part_of_a_leaf_draws_its_own_bits():
    key, shape = jax.random.key(3), (4, 2, 3, 5)
    whole = noise_of_rows(key, 0, shape)
    np.testing.assert_array_equal(whole[1:3], noise_of_rows(key, jnp.int32(1), (2, *shape[1:])))
    assert len(np.unique(whole)) > 100  # of 120 numbers


@DTYPES
def test_the_mean_of_the_result_is_the_sum(dtype):
    """Over 4000 steps, with numbers of all sizes, subnormal ones of float16 among them."""
    numbers = [1.001, -3.1415927, 1e-5, -3e-6, 300.1, 1.25e-7]
    p = jnp.asarray(numbers, dtype)
    u = jnp.float32(numbers) - p.astype(jnp.float32)
    rounded = jax.vmap(lambda step: go.apply_updates(p, u, 0, step))(jnp.arange(4000))
    rounded = np.asarray(rounded, np.float64)
    exact = np.float64(np.float32(numbers))
    spread = rounded.std(0) / np.sqrt(len(rounded))
    assert (spread > 0).all()
    assert (np.abs(rounded.mean(0) - exact) / spread).max() < 4


def test_steps_too_small_for_rounding_to_nearest_add_up():
    """A thousand steps of a tenth of the spacing move a weight by a hundred spacings on average."""
    p = jnp.ones((32, 32), jnp.bfloat16)
    u = jnp.full_like(p, 2.0**-7 / 10, jnp.float32)

    def step(p, i):
        return go.apply_updates(p, u, 0, i), None

    end = jax.jit(lambda p: jax.lax.scan(step, p, jnp.arange(1000))[0])(p).astype(jnp.float32)
    assert abs(float(end.mean()) - (1 + 100 * 2.0**-7)) < 4 * float(end.std()) / 32
    assert (optax.apply_updates(p, u) == 1).all()


@DTYPES
def test_a_number_that_can_be_represented_is_exact(dtype):
    p = jnp.asarray([1.0, -2.5, 0.0, -0.0, 2.0**-14, 2.0**-20, jnp.finfo(dtype).max], dtype)
    u = jnp.float32([0.25, 0.5, 0.0, -0.0, 2.0**-14, 0.0, 0.0])
    for step in range(8):
        new = go.apply_updates(p, u, 0, step)
        np.testing.assert_array_equal(new, optax.apply_updates(p, u))
        np.testing.assert_array_equal(np.signbit(new), np.signbit(np.asarray(p)))


@DTYPES
def test_what_is_not_finite_and_what_is_too_large_are_those_of_optax(dtype):
    largest = float(jnp.finfo(dtype).max)
    p = jnp.asarray([1.0, 1.0, 1.0, largest, -largest, largest], dtype)
    half = largest * 2.0 ** -(jnp.finfo(dtype).nmant + 2)  # of the spacing
    u = jnp.float32([jnp.inf, -jnp.inf, jnp.nan, largest / 2, -largest / 2, half / 2])
    for step in range(8):
        new, plain = (
            x.astype(jnp.float32) for x in (go.apply_updates(p, u, 0, step), optax.apply_updates(p, u))
        )
        np.testing.assert_array_equal(new, plain)


def test_leaves_of_other_dtypes_get_the_result_of_optax():
    params = {"a": jnp.ones(3), "b": None, "c": jnp.arange(3), "d": jnp.ones(2, jnp.complex64)}
    updates = {"a": jnp.full(3, 0.1), "b": None, "c": jnp.ones(3, jnp.int32), "d": jnp.full(2, 1j)}
    new, plain = go.apply_updates(params, updates, 0, 0), optax.apply_updates(params, updates)
    assert new["b"] is None
    jax.tree.map(np.testing.assert_array_equal, new, plain)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, plain)


def test_bits_differ_between_keys_steps_leaves_and_from_those_of_a_momentum():
    shape = (64, 64)
    p, u = {"a": jnp.ones(shape, jnp.bfloat16), "b": jnp.ones(shape, jnp.bfloat16)}, 2.0**-8
    u = jax.tree.map(lambda x: jnp.full_like(x, u, jnp.float32), p)
    drawn = [apply_updates(p, u, key, step) for key, step in ((0, 0), (0, 1), (1, 0))]
    ups = [np.asarray(x == 1).ravel() for new in drawn for x in new.values()]
    rounding = functools.partial(go._transforms.storage.round_stochastically, x=p["a"] + u["a"])
    own = go._core.keys.streams(go._core.keys.key_data(0), jnp.int32(0), jnp.arange(2))
    ups += [np.asarray(rounding(key) == 1).ravel() for key in own]
    # Half of 4096 numbers go up in each, and any two draws agree in half of them.
    agreement = np.corrcoef(ups)
    assert np.abs(agreement - np.eye(len(ups))).max() < 5 / 64


def test_compiled_op_by_op_resumed_and_vmapped_runs_draw_the_same_bits():
    params, updates = weights()
    new = apply_updates(params, updates, 7, 5)
    for other in (
        go.apply_updates(params, updates, 7, 5),
        apply_updates(params, updates, jax.random.key(7), jnp.uint32(5)),
        jax.tree.map(lambda x: x[0], jax.vmap(go.apply_updates, (None, None, 0, None))(
            params, updates, jax.random.split(jax.random.key(1), 2).at[0].set(jax.random.key(7)), 5)
        ),
    ):  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, new, other)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_step_layer_by_layer_draws_the_bits_of_the_whole_model(stacked):
    """Equal updates for every layer, whatever its gradient."""
    rng = np.random.default_rng(0)
    shapes = {"scale": (4,), "norm": (4, 6), "kernel": (4, 6, 5), "heads": (4, 6, 2, 3)}
    layers = {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, shape in shapes.items()}
    if not stacked:
        layers = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(4)]
    params = {"embed": jnp.ones(6, jnp.bfloat16), "layers": layers, "head": jnp.ones((6, 5), jnp.bfloat16)}

    def equal(tree):
        return jax.tree.map(lambda x: jnp.full_like(x, 1e-3, jnp.float32), tree)

    tx = optax.stateless(lambda updates, _: equal(updates))
    apply = functools.partial(go.apply_updates, key=3, step=11)

    @jax.jit
    def by_layer(params):
        return go.layerwise_update(
            tx,
            lambda own, batch: own * batch,
            lambda own, x: x + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(own)),
            lambda own, x, batch: jnp.sum(x @ own) * batch,
            jnp.bfloat16(2),
            optax.EmptyState(),
            params,
            apply=apply,
        )[1]

    jax.tree.map(np.testing.assert_array_equal, by_layer(params), jax.jit(apply)(params, equal(params)))


def test_no_float32_copy_of_the_weights_is_made():
    """Temporaries of the compiled step beside arguments, some of which the result overwrites."""
    shapes = {"stack": (8, 64, 96), "table": (1000, 64), "other": (64, 96)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    updates = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    compiled = jax.jit(go.apply_updates, donate_argnums=0).lower(params, updates, 0, 0).compile()
    analysis = compiled.memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert analysis.alias_size_in_bytes == size
    # Two keys of 32 bits for each row, which has 64 numbers at least.
    assert analysis.temp_size_in_bytes < 0.3 * size


def test_float32_steps_are_those_of_float32_weights():
    """In bfloat16, a step of one and a decay of a 500th are a step of one."""
    gradients = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.bfloat16)}
    params = jax.tree.map(jnp.ones_like, gradients)
    float32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    decay = optax.chain(optax.scale_by_sign(), optax.add_decayed_weights(0.002), optax.scale(-1.0))
    for tx in (decay, optax.adamw(0.1), go.muon(0.1, weight_decay=0.002)):
        wide = go.float32_steps(tx)
        state, expected = wide.init(params), tx.init(float32)
        chex.assert_trees_all_equal(state, expected)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(wide.init, params))
        update, state = wide.update(gradients, state, params)
        chex.assert_trees_all_equal((update, state), tx.update(gradients, expected, float32))
        assert update["kernel"].dtype == jnp.float32
    rounded, _ = decay.update(gradients, decay.init(params), params)
    exact, _ = go.float32_steps(decay).update(gradients, decay.init(params), params)
    signs = jnp.sign(gradients["kernel"]).astype(jnp.float32)
    np.testing.assert_allclose(exact["kernel"], -(signs + 0.002), rtol=1e-6)
    np.testing.assert_array_equal(rounded["kernel"][signs > 0], -1)
    # Without parameters the gradients decide.
    update, _ = go.float32_steps(optax.scale(-0.1)).update(gradients, optax.EmptyState())
    assert update["kernel"].dtype == jnp.float32


STRICT = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_check_tracer_leaks": True,
    "jax_debug_key_reuse": True,
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_enable_x64": True,
}


def test_no_flag_of_jax_changes_the_bits_or_refuses_a_step():
    params, updates = weights()
    expected = apply_updates(params, updates, 7, 5)
    before = {name: getattr(jax.config, name) for name in STRICT}
    try:
        for name, value in STRICT.items():
            jax.config.update(name, value)
        found = jax.jit(lambda p, u, step: go.apply_updates(p, u, 7, step))(params, updates, np.int64(5))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bad_arguments_are_refused():
    p = jnp.ones(3, jnp.bfloat16)
    with pytest.raises(TypeError, match="key must be an integer seed"):
        go.apply_updates(p, p, 0.5, 0)
    with pytest.raises(TypeError, match="step must be an integer"):
        go.apply_updates(p, p, 0, 0.5)
    with pytest.raises(ValueError, match="broadcast"):
        go.apply_updates(p, jnp.ones((2, 3)), 0, 0)


# In a process of its own, because the number of host devices is fixed when JAX starts.
SCRIPT = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import gum_optax as go

rng = np.random.default_rng(0)
specs = {"kernel": P("x", "y"), "stack": P(None, ("x", "y"), None)}
shapes = {"kernel": (8, 6), "stack": (3, 4, 6)}
params = {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, shape in shapes.items()}
updates = {name: jnp.float32(1e-3 * rng.normal(size=shape)) for name, shape in shapes.items()}
alone = jax.jit(go.apply_updates)(params, updates, 7, 5)

def equal(new):
    return all(bool((np.asarray(new[name]) == np.asarray(alone[name])).all()) for name in alone)

found = {}
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    arguments = jax.device_put((params, updates), (shardings, shardings))
    compiled = jax.jit(go.apply_updates, out_shardings=shardings).lower(*arguments, 7, 5).compile()
    text = compiled.as_text()
    collectives = [word for word in ("all-", "collective-", "reduce-scatter") if word in text]
    found[kind.name] = equal(compiled(*arguments, 7, 5)), collectives
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
mapped = jax.shard_map(lambda p, u: go.apply_updates(p, u, 7, 5), mesh=mesh, in_specs=P(), out_specs=P())
found["replicated in shard_map"] = equal(jax.jit(mapped)(params, updates)), []
print(json.dumps(found))
"""


def test_a_sharded_step_draws_the_bits_of_a_single_device_and_exchanges_nothing():
    flags = "--xla_force_host_platform_device_count=4 " + os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3
    for kind, (equal, collectives) in found.items():
        assert equal, kind
        assert collectives == [], kind
