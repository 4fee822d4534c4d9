"""The size of our step is that of each peer in the table of docs/muon.md; test_reductions runs optax's."""

from pathlib import Path

import jax.numpy as jnp
import pytest

import gum_optax as go

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "muon.md").read_text()
ROWS = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and "** 0.5" in line
]
FANS = [(4, 6), (6, 4), (5, 5), (3, 12)]


def rms(tx, gradient):
    updates, _ = tx.update(gradient, tx.init(gradient))
    return {name: float(jnp.sqrt(jnp.mean(u * u))) for name, u in updates.items()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:3]))
def test_the_step_is_the_peers_to_rounding(row, rng):
    *_, factor, ours = row
    gradient = {f"{i}": jnp.float32(rng.normal(size=fans)) for i, fans in enumerate(FANS)}
    found = rms(eval(ours, {"lr": 1.0, **vars(go)}), gradient)
    unscaled = rms(go.matrix_optimizer(go.scale_by_muon(), 1.0, 1.0), gradient)
    for (fan_in, fan_out), name in zip(FANS, gradient, strict=True):
        expected = eval(factor, {"fan_in": fan_in, "fan_out": fan_out, "max": max})
        assert found[name] / unscaled[name] == pytest.approx(expected, rel=1e-5)


def test_the_table_names_every_peer():
    peers = {row[0] for row in ROWS}
    assert len(ROWS) == 12
    assert {"optax.contrib.muon", "torch.optim.Muon", "Moonlight", "microsoft/dion"} < peers
