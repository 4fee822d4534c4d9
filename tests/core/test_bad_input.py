"""Bad input raises an error at construction or `init` with the argument or leaf, the value and the remedy."""

import functools
import inspect
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

import gum_optax as go

from helpers import OPTIMIZERS, run

ARGUMENTS = [
    ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    ({"rank": -3}, ValueError, "rank must be at least 1, got -3"),
    ({"rank": 2.0}, TypeError, "rank must be an integer, got 2.0 of type float"),
    ({"rank": "8"}, TypeError, "rank must be an integer, got '8' of type str"),
    ({"rank": True}, TypeError, "rank must be an integer, got True"),
    ({"rank": None}, TypeError, "rank must be an integer, got None"),
    ({"period": 0}, ValueError, "period must be at least 1, got 0"),
    ({"period": 1.5}, TypeError, "period must be an integer, got 1.5"),
    ({"full_rank_fraction": -0.1}, ValueError, "full_rank_fraction must be between 0 and 1, got -0.1"),
    ({"full_rank_fraction": 1.5}, ValueError, "full_rank_fraction must be between 0 and 1, got 1.5"),
    ({"full_rank_fraction": float("nan")}, ValueError, "full_rank_fraction must be between 0 and 1"),
    ({"full_rank_fraction": "1/16"}, TypeError, "full_rank_fraction must be a number, got '1/16'"),
    ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
    ({"momentum": -0.5}, ValueError, "momentum must be at least 0 and below 1, got -0.5"),
    ({"momentum": float("nan")}, ValueError, "momentum must be at least 0 and below 1, got nan"),
    ({"momentum": "0.9"}, TypeError, "momentum must be a number, got '0.9'"),
    ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0, got -1.0"),
    ({"consistent_rms": -0.2}, ValueError, "consistent_rms must be at least 0, got -0.2"),
    ({"learning_rate": -1e-3}, ValueError, "learning_rate must be at least 0, got -0.001"),
    ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got 'fast'"),
    ({"find_subspace": "svd"}, TypeError, "find_subspace must be a function such as gum_optax.svd_subspace"),
    (
        {"orthogonalizer": "polar"},
        TypeError,
        "orthogonalizer must be a function such as gum_optax.polar, got 'polar'",
    ),
    ({"compensation": 1}, TypeError, "compensation must be a function such as gum_optax.complement, got 1"),
    ({"key": 0.5}, TypeError, "key must be an integer seed or a JAX key such as jax.random.key"),
    (
        {"key": jax.random.key(0, impl="rbg")},
        TypeError,
        "key must be a threefry2x32 key, got one of rbg; its draws are the same on every platform. Whatever"
        " jax_default_prng_impl is, pass an integer seed, or jax.random.key(seed, impl='threefry2x32').",
    ),
    (
        {"key": jax.random.key(0, impl="unsafe_rbg")},
        TypeError,
        "got one of unsafe_rbg; its draws are the same",
    ),
    (
        {"key": jax.random.PRNGKey(0, impl="rbg")},
        TypeError,
        "a raw rbg key; its draws are the same on every platform",
    ),
    ({"key": jax.random.split(jax.random.key(0))}, TypeError, "key must be one key"),
    ({"key": [0, 1]}, TypeError, "key must be an integer seed or a JAX key such as jax.random.key"),
    ({"key": 2**70}, TypeError, "key must be an integer seed or a JAX key such as jax.random.key"),
    ({"orthogonalizer": 0}, TypeError, "orthogonalizer must be a function such as gum_optax.polar, got 0"),
    (
        {"others": "adamw"},
        TypeError,
        "others must be an optax.GradientTransformation such as optax.adamw(1e-3)",
    ),
    ({"others": optax.adamw}, TypeError, "; call it with its arguments."),
    (
        {"weight_decay_mask": "kernel"},
        TypeError,
        "must be a tree of booleans, or a function from the parameters",
    ),
    ({"weight_decay_mask": {"kernel": 1}}, TypeError, "to one, got {'kernel': 1}."),
    (
        {"weight_dimension_numbers": "*/kernel"},
        TypeError,
        "such as {'*/NAME/kernel': gum_optax.LAST_TWO}, got",
    ),
    ({"weight_dimension_numbers": 2}, TypeError, "or patterns such as"),
]


def short(x):
    """The name of a case, the same in every process."""
    return re.sub(r" at 0x\w+", "", str(x))[:40]


@pytest.mark.parametrize(("change", "error", "message"), ARGUMENTS, ids=short)
def test_an_argument_out_of_range_or_of_the_wrong_type_is_refused_at_construction(change, error, message):
    with pytest.raises(error) as caught:
        go.gum(**({"learning_rate": 1e-3} | change))
    assert message in str(caught.value)


@pytest.mark.parametrize("make", [go.muon, go.galore_muon, go.gum])
def test_every_optimizer_checks_what_it_takes(make):
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1, got 2"):
        make(1e-3, momentum=2)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        make(1e-3, ranks=3)


@pytest.mark.parametrize("name", ["rank", "period", "full_rank_fraction"])
def test_a_traced_argument_that_decides_shapes_names_the_remedy(name):
    others = {"rank", "period", "full_rank_fraction"} - {name}
    tx = optax.inject_hyperparams(go.gum, static_args=others)(learning_rate=1e-3, **{name: 1})
    with pytest.raises(TypeError, match=f"static_args='{name}'"):
        jax.jit(tx.init)({"w": jnp.ones((3, 4))})


LEAVES = [
    (jnp.ones((3, 4), jnp.int32), Dims(-2, -1), TypeError, "dtype int32; matrices must be real floating"),
    (jnp.ones((3, 4), jnp.complex64), Dims(-2, -1), TypeError, "dtype complex64; matrices must be real"),
    (jnp.ones(3), Dims(0, 0), ValueError, "shape (3,) is not a matrix"),
    (jnp.ones((3, 4)), Dims(0, 0), ValueError, "overlap: reduction axes (0,), output axes (0,)"),
    (jnp.ones((3, 4, 5)), Dims((0, 1), (1, 2)), ValueError, "overlap"),
    (jnp.ones((3, 4, 5)), Dims((0, -3), 2), ValueError, "overlap"),
    (jnp.ones((3, 4)), Dims((), 1), ValueError, "without two matrix axes"),
    (jnp.ones((3, 4)), Dims(0, ()), ValueError, "without two matrix axes"),
    (jnp.ones((3, 4)), Dims(0, 2), ValueError, "name axes (2,), but it has 2 axes"),
    (jnp.ones((3, 4)), Dims(-3, 1), ValueError, "name axes (-3,), but it has 2 axes"),
    (jnp.ones((3, 4)), Dims(None, 1), TypeError, "must be an axis or a tuple of axes, got None"),
    (jnp.ones((3, 4)), Dims(0, 0.5), TypeError, "must be an axis or a tuple of axes, got 0.5"),
    (jnp.ones((3, 4, 5)), Dims((0, 1.7), 2), TypeError, "must be an axis or a tuple of axes, got (0, 1.7)"),
    (jnp.ones((3, 4)), "last two", TypeError, "must be optax.contrib.MuonDimensionNumbers or None"),
]


@pytest.mark.parametrize(("leaf", "entry", "error", "message"), LEAVES, ids=lambda x: str(x)[:30])
@pytest.mark.parametrize("make", [go.muon, go.gum], ids=["muon", "gum"])
def test_a_leaf_that_is_no_matrix_is_refused_at_init_with_its_path(make, leaf, entry, error, message):
    params = {"layer": {"kernel": leaf}, "other": jnp.ones((3, 4))}
    tx = make(1e-3, weight_dimension_numbers={"layer": {"kernel": entry}, "other": None})
    with pytest.raises(error) as caught:
        tx.init(params)
    assert message in str(caught.value)
    assert "['layer']['kernel']" in str(caught.value)


def test_integer_matrices_found_by_path_are_refused_too():
    with pytest.raises(TypeError, match=r"\['layer'\]\['kernel'\] has dtype int8"):
        go.gum(1e-3).init({"layer": {"kernel": jnp.ones((3, 4), jnp.int8)}})


def test_a_tree_of_dimension_numbers_must_have_every_leaf():
    tx = go.gum(1e-3, weight_dimension_numbers={"a": Dims(0, 1)})
    with pytest.raises(ValueError, match=r"no entry for leaf \['b'\].*None if it is not a matrix"):
        tx.init({"a": jnp.ones((3, 4)), "b": jnp.ones(3)})


@pytest.mark.parametrize("use", [lambda tx, x: tx.init(x), go.describe, go.memory_report])
def test_a_model_that_holds_functions_is_refused_with_the_leaf_and_the_way_to_its_arrays(use):
    model = {"kernel": jnp.ones((3, 4)), "activation": jnp.tanh}
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(TypeError, match=r"its leaf \['activation'\] is <.*>; pass .* eqx\.filter\(model"),
    ):
        use(go.gum(1e-3), model)


def test_a_mask_of_other_leaves_is_refused_at_init():
    tx = go.gum(1e-3, weight_decay=0.1, weight_decay_mask={"a": True})
    with pytest.raises(
        ValueError, match=r"weight_decay_mask must be .* like the parameters, .*'b'.*, got .*'a'"
    ):
        tx.init({"a": jnp.ones(3), "b": jnp.ones(3)})


def test_masks_of_every_kind_are_taken():
    params = {"a": jnp.ones((3, 4)), "b": {"c": jnp.ones(3)}}
    for mask in (True, {"a": np.True_, "b": False}, {"a": jnp.asarray(True), "b": {"c": False}}):
        go.gum(1e-3, weight_decay=0.1, weight_decay_mask=mask).init(params)


def test_what_holds_an_optimizer_is_refused_with_the_way_to_it():
    class TrainState:
        tx = go.gum(1e-3)

    with pytest.raises(
        TypeError, match=r"tx must be .* such as gum_optax\.gum\(1e-3\), got .*; pass its `tx`"
    ):
        go.describe(TrainState(), {})
    with pytest.raises(TypeError, match="inner must be an optax"):
        go.skip_non_finite(go.gum)


@pytest.mark.parametrize("make", [go.gum, go.muon])
def test_a_state_in_place_of_the_parameters_is_refused(make):
    tx = make(1e-3)
    state = tx.init({"kernel": jnp.ones((3, 4))})
    for wrong in (
        lambda: go.describe(tx, state),
        lambda: go.memory_report(tx, state),
        lambda: tx.init(state),
    ):
        with pytest.raises(
            TypeError, match=r"params must be the parameters, but holds an optimizer's state, \w+State"
        ):
            wrong()


def test_a_long_value_is_shown_by_its_type():
    with pytest.raises(TypeError, match=r"got a value of type dict\.$"):
        go.memory_report({"kernel": jnp.ones((30, 40))}, go.gum(1e-3))


def test_a_finder_of_another_shape_is_named():
    params = {"kernel": jnp.ones((5, 3, 4))}
    tx = go.galore_muon(1e-3, rank=2, find_subspace=lambda key, gradient, previous: gradient)
    with pytest.raises(ValueError, match=r"find_subspace must return .* \(5, 3, 2\), got \(5, 3, 4\)"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    "rule",
    [go.low_rank(optax.identity(), 2, 2), go.unbiased_low_rank(optax.identity(), 2, 2, 0.5)],
    ids=["low_rank", "unbiased_low_rank"],
)
def test_rules_without_the_view_refuse_what_is_no_matrix(rule):
    with pytest.raises(ValueError, match=r"leaf \['bias'\] of shape \(3,\) is not a matrix.*partition"):
        rule.init({"bias": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"leaf \['w'\] has dtype int32"):
        rule.init({"w": jnp.ones((3, 4), jnp.int32)})


def test_as_matrices_refuses_a_leaf_without_dimension_numbers():
    tx = go.as_matrices(optax.identity(), {"w": None})
    with pytest.raises(ValueError, match=r"leaf \['w'\] has None as its dimension numbers"):
        tx.init({"w": jnp.ones((3, 4))})


@pytest.mark.parametrize("wrap", [go.as_matrices, lambda x: go.low_rank(x, 2, 2)])
def test_an_inner_rule_must_be_a_transformation(wrap):
    with pytest.raises(TypeError, match=r"inner must be an optax.GradientTransformation"):
        wrap(go.newton_schulz)


def of_optimizers_and_rules():
    """Every optimizer gets all its numeric arguments, each exact in an eight-bit float."""
    half = {
        "momentum": 0.5,
        "consistent_rms": 0.5,
        "scale": 0.5,
        "weight_decay": 0.5,
        "ratio": 0.5,
        "eps": 0.5,
    }
    half |= {"b1": 0.5, "b2": 0.5, "norm_growth": 1.5, "radius": 2.0, "edge_radius": 2.0}
    for make, arguments in OPTIMIZERS.values():
        takes = inspect.signature(make).parameters
        yield functools.partial(make, 0.5), arguments | {k: x for k, x in half.items() if k in takes}
    inner = optax.identity()
    yield functools.partial(go.low_rank, inner), {"rank": 2, "period": 3}
    yield functools.partial(go.unbiased_low_rank, inner), {"rank": 2, "period": 3, "full_rank_fraction": 0.5}
    yield go.scale_by_trion, {"rank": 2, "momentum": 0.5}
    yield go.scale_by_dion, {"rank": 2, "momentum": 0.5}
    yield go.scale_by_cosmos, {"rank": 2} | dict.fromkeys(("ratio", "b1", "b2", "eps"), 0.5)
    yield go.limit_norm_growth, {"ratio": 1.5}
    yield go.scale_by_shape, {"consistent_rms": 0.5}


SCALARS = {
    "numpy": lambda x, dtype: np.asarray(x, dtype)[()],
    "numpy array": np.asarray,
    "jax": jnp.asarray,
}


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)
def test_every_scalar_of_numpy_jax_and_ml_dtypes_is_a_number(scalar):
    integers, floats = (np.int32, np.uint8), (np.float32, np.float16, jnp.bfloat16, jnp.float8_e4m3fn)
    for make, arguments in of_optimizers_and_rules():
        for integer, floating in itertools.product(integers, floats):
            make(
                **{k: scalar(x, floating if isinstance(x, float) else integer) for k, x in arguments.items()}
            )
    go.gum(scalar(0.5, jnp.bfloat16), key=scalar(1, np.int32))
    go.switch_subspace(scalar(3, np.int32), go.svd_subspace, go.random_subspace)
    with pytest.raises(TypeError, match="momentum must be a number"):
        go.gum(1e-3, momentum=scalar(True, np.bool_))
    with pytest.raises(TypeError, match="rank must be an integer"):
        go.gum(1e-3, rank=scalar(2.0, np.float32))


def test_a_number_of_any_dtype_gives_the_same_optimizer():
    """The argument becomes a Python number, which changes no dtype."""
    params = {"kernel": jnp.ones((3, 4, 6)), "bias": jnp.ones(3)}
    arguments = {"momentum": 0.5, "weight_decay": 0.25, "consistent_rms": 0.5}
    want, _ = run(go.muon(0.5, **arguments), [params], params)
    half = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arguments.items()}
    found, _ = run(go.muon(jnp.asarray(0.5, jnp.bfloat16), **half), [params], params)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    run(go.muon(0.5, weight_decay=np.float32(0)), [params])  # no decay, so `update` needs no parameters


BFLOAT16 = {"stack": jnp.ones((5, 4, 6), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
STATIC = ("rank", "period", "full_rank_fraction", "rounds", "random_after")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inject_hyperparams_takes_a_model_in_bfloat16_or_says_how(name):
    """`inject_hyperparams` casts numbers to the dtype of the parameters, which rounds Adam's 0.999 to 1."""
    make, arguments = OPTIMIZERS[name]
    inject = functools.partial(optax.inject_hyperparams, make, [x for x in STATIC if x in arguments])
    wide = inject(hyperparam_dtype=jnp.float32)(0.1, **arguments)
    state = jax.eval_shape(wide.init, BFLOAT16)
    updates, _ = jax.eval_shape(wide.update, BFLOAT16, state, BFLOAT16)
    assert updates["stack"].dtype == jnp.bfloat16
    tx = inject()(0.1, **arguments)
    if "b2" not in inspect.signature(make).parameters:
        state = tx.init(BFLOAT16)
        updates, after = jax.eval_shape(tx.update, BFLOAT16, state, BFLOAT16)
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
        return
    # In a compiled function, the dtype of the number is known, but not its value.
    for init in (tx.init, functools.partial(jax.eval_shape, tx.init))[name in ("cosmos", "normuon") :]:
        with pytest.raises((TypeError, ValueError), match=r"b2 must be .*hyperparam_dtype=jnp\.float32"):
            init(BFLOAT16)


def test_scion_refuses_complex_leaves_and_leaves_them_to_others():
    params = {"phase": jnp.ones(3, jnp.complex64)}
    with pytest.raises(TypeError, match=r"leaf \['phase'\] is complex, .* pass others="):
        go.scion(0.1).init(params)
    assert go.scion(0.1, others=optax.adamw(0.1)).init(params)
