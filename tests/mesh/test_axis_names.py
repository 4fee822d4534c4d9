"""State beside named parameters, as trainers that shard by name see it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gum_optax as go

SCANNED = optax.contrib.MuonDimensionNumbers(0, 2)  # (embed, layers, mlp)
SHAPES = {"up": (6, 3, 8), "down": (8, 3, 6), "scale": (6,)}
NAMES = {"up": ("embed", "layers", "mlp"), "down": ("mlp", "layers", "embed"), "scale": ("embed",)}


def gum():
    dims = {"up": SCANNED, "down": SCANNED, "scale": None}
    return go.gum(0.1, rank=2, period=2, full_rank_fraction=0.4, weight_dimension_numbers=dims)


def variable(x, names):
    return nnx.Param(x, out_sharding=names, eager_sharding=False)


def maxtexts(x, names):
    """A scanned variable as in MaxText: the axis of the scan is separate, and two keys hold names."""
    if "layers" not in names:
        return variable(x, names)
    box = nnx.Param(x, partition_name="layers", param_scan_axis=1)
    without = tuple(name for name in names if name != "layers")
    box.set_metadata(box.get_metadata() | {"out_sharding": without, "sharding_names": without})
    return box


BOXES = {"nnx": variable, "maxtext": maxtexts, "linen": nn.Partitioned, "logical": nn.LogicallyPartitioned}


pytestmark = pytest.mark.filterwarnings("ignore:'sharding_names' is deprecated")


def is_box(x):
    return isinstance(x, nnx.Variable | nn.Partitioned)


def bare(tree):
    return jax.tree.map(lambda x: jax.tree.leaves(x)[0] if is_box(x) else x, tree, is_leaf=is_box)


def boxed_params(box):
    rng = np.random.default_rng(0)
    return {name: box(jnp.float32(rng.normal(size=shape)), NAMES[name]) for name, shape in SHAPES.items()}


def names_by_field(state):
    """Shape and names of every box with an array in the state, by the end of its path."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_box):
        if is_box(x) and jax.tree.leaves(x):
            names = x.get_metadata("out_sharding") if isinstance(x, nnx.Variable) else x.names
            found[jax.tree_util.keystr(path[-2:])] = jax.tree.leaves(x)[0].shape, names
    return found


EXPECTED = {
    ".projectors['up']": ((3, 6, 2), ("layers", "embed", None)),
    ".projectors['down']": ((3, 6, 2), ("layers", "embed", None)),
    ".trace['up']": ((3, 2, 8), ("layers", None, "mlp")),
    ".trace['down']": ((3, 2, 8), ("layers", None, "mlp")),
    ".trace['6x8']": ((2, 6, 8), (None, "embed", "mlp")),
    ".mu['scale']": ((6,), ("embed",)),
    ".nu['scale']": ((6,), ("embed",)),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_each_axis_of_the_state_has_the_name_of_the_parameters_axis_that_it_is(box):
    assert names_by_field(gum().init(boxed_params(box))) == EXPECTED


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_names_change_no_number_and_the_state_keeps_its_structure(box):
    params, tx = boxed_params(box), gum()
    state, reference = tx.init(params), tx.init(bare(params))
    update = jax.jit(tx.update)
    for _ in range(3):
        before = jax.tree.structure(state)
        steps, state = update(params, state, params)
        expected, reference = update(bare(params), reference, bare(params))
        assert jax.tree.structure(state) == before
        jax.tree.map(np.testing.assert_array_equal, bare(steps), expected)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(state), jax.tree.leaves(reference))


def test_the_variables_of_an_nnx_optimizer_have_them_too():
    class Model(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(6, 8, use_bias=False, rngs=nnx.Rngs(0), kernel_metadata=NAMED)

    optimizer = nnx.Optimizer(Model(), go.galore_muon(0.1, rank=2, period=2), wrt=nnx.Param)
    specs = jax.tree.map(
        nnx.spmd.get_var_pspec, nnx.state(optimizer), is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    low = specs["opt_state"]["inner"]["inner_states"]["matrices"]["inner_state"][0]
    assert low["projectors"]["up"]["kernel"] == jax.P("embed", None)
    assert low["low"][0]["trace"]["up"]["kernel"] == jax.P(None, "mlp")
    assert optimizer.opt_state.skipped.get_value() == 0


NAMED = {"out_sharding": ("embed", "mlp"), "eager_sharding": False}


def test_names_are_told_within_a_mesh_of_another_size_and_under_jit():
    params = boxed_params(variable)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert names_by_field(jax.jit(gum().init)(params)) == EXPECTED


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_no_box_holds_a_hole(box):
    """Tunix reads the sharding of the content of every box with names."""
    state = gum().init(boxed_params(box))
    boxes = [x for x in jax.tree.leaves(state, is_leaf=is_box) if is_box(x)]
    assert all(len(jax.tree.leaves(x)) == 1 for x in boxes)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_an_update_whose_state_has_no_box_left(box):
    """The only named parameter is the embedding, for which SGD has no state."""
    tx = go.gum(0.1, rank=2, period=2, full_rank_fraction=0.4, others=optax.sgd(0.1))
    params = {"embedding": box(jnp.ones((4, 6)), ("vocab", "embed")), "kernel": jnp.ones((3, 4, 6))}
    steps, state = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(steps) == jax.tree.structure(params)
    assert not any(map(is_box, jax.tree.leaves(state, is_leaf=is_box)))


def injected():
    dims = {"up": SCANNED, "down": SCANNED, "scale": None}
    static = ("rank", "period", "full_rank_fraction")
    return optax.inject_hyperparams(go.gum, static_args=static)(
        0.1, rank=2, period=2, full_rank_fraction=0.4, weight_dimension_numbers=lambda _: dims
    )


WRAPPED = {
    "inject_hyperparams": injected,
    "multi_steps": lambda: optax.MultiSteps(gum(), 2).gradient_transformation(),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), gum()),
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize(
    "box", [pytest.param(variable, marks=pytest.mark.long), nn.Partitioned], ids=["nnx", "linen"]
)
def test_within_wrappers_and_a_scan_names_change_no_number(box, wrapped):
    tx, params = wrapped(), boxed_params(box)

    def steps_of(params):
        def step(state, _):
            steps, state = tx.update(params, state, params)
            return state, steps

        return jax.jit(lambda params: jax.lax.scan(step, tx.init(params), length=3)[1])(params)

    jax.tree.map(np.testing.assert_array_equal, bare(steps_of(params)), steps_of(bare(params)))


def test_hooks_and_constructors_of_variables_are_for_parameters():
    class Own(nnx.Param):
        def __init__(self, rngs, **told):
            super().__init__(rngs + jnp.zeros((4, 6)), **told)

    told = {"out_sharding": ("embed", "mlp"), "eager_sharding": False}
    hooked = nnx.Param(jnp.ones((4, 6)), on_create_value=lambda _, x: 2 * x, **told)
    tx = go.galore_muon(0.1, rank=2, period=2)
    found, expected = (
        tx.init({"a": hooked, "b": Own(1.0, **told)}),
        tx.init({"a": jnp.ones((4, 6))} | {"b": jnp.ones((4, 6))}),
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("told", "names"),
    [
        (("l", ["x", "y"], None), ("l", ("x", "y"), None)),
        (("l", ("x", "y"), None), ("l", ("x", "y"), None)),
        (jax.P("l", "x"), ("l", "x", None)),
        (("l", "x", "x"), ("l", "x", None)),
        (("a", "b", "c", "d"), (None, None, None)),
    ],
    ids=["list", "tuple", "spec", "twice", "more_than_axes"],
)
def test_however_names_are_told(told, names):
    box = variable(jnp.ones((2, 4, 6)), told)
    state = go.with_axis_names(optax.trace(0.9)).init({"w": box, "other": variable(jnp.ones(2), ("l",))})
    assert state.trace["w"].get_metadata("out_sharding") == names


def test_a_named_sharding_is_its_spec():
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = jax.sharding.NamedSharding(mesh, jax.P("x", "y"))
    state = go.galore_muon(0.1, rank=2).init({"up": variable(jnp.ones((4, 6)), where)})
    assert names_by_field(state)[".trace['up']"] == ((2, 6), (None, "y"))


def test_more_names_than_one_mesh_has_axes():
    """JAX counts the devices of a mesh in 32 bits: 40 named axes of even size need two meshes."""
    params = {str(i): variable(jnp.ones((4, 6)), (f"in{i}", f"out{i}")) for i in range(20)}
    found = names_by_field(go.with_axis_names(optax.trace(0.9)).init(params))
    assert found == {f".trace['{i}']": ((4, 6), (f"in{i}", f"out{i}")) for i in range(20)}


def test_what_has_no_names_is_left_as_it_is():
    tx = go.with_axis_names(optax.trace(0.9))
    params = {"a": nnx.Param(jnp.ones((2, 3))), "b": jnp.ones(3), "c": variable(jnp.ones((2, 1)), ("x", "y"))}
    state = tx.init(params)
    assert "out_sharding" not in state.trace["a"].get_metadata()
    assert not is_box(state.trace["b"])
    # JAX may give an axis of size one no sharding in its type, and such an axis has nothing to shard.
    assert state.trace["c"].get_metadata("out_sharding") == ("x", None)
    plain = {"a": jnp.ones((2, 3))}
    assert jax.tree.structure(tx.init(plain)) == jax.tree.structure(optax.trace(0.9).init(plain))


def test_a_masked_tree_of_boxes_is_fine():
    params = boxed_params(variable)
    mask = {"up": True, "down": True, "scale": False}
    tx = optax.masked(go.with_axis_names(optax.trace(0.9)), mask)
    state = tx.init(params)
    steps, _ = tx.update(params, state, params)
    assert jax.tree.structure(steps) == jax.tree.structure(params)


def test_only_a_transformation_is_taken():
    with pytest.raises(TypeError, match="tx must be an optax"):
        go.with_axis_names("gum")
