"""The update rules again, in float64 NumPy, one matrix at a time and straight from the formulas.

Nothing here imports gum_optax. Subspaces come from NumPy's SVD; which blocks are drawn is an input.
"""

import numpy as np


def jordan(x, steps=5):
    """Newton-Schulz with Jordan's coefficients, of either orientation."""
    if not np.any(x):
        return np.zeros_like(x)
    if x.shape[0] > x.shape[1]:
        return jordan(x.T, steps).T
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def msign(x):
    """The polar factor over the numerical range of `x`."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    keep = s > s[0] * 1e-6 if s[0] > 0 else np.zeros_like(s, bool)
    return (u * keep) @ vt


def top_left(g, rank):
    return np.linalg.svd(g, full_matrices=False)[0][:, :rank]


def muon_steps(gradients, momentum, step=jordan, nesterov=False):
    r, out = 0.0, []
    for g in gradients:
        r = momentum * r + g
        out.append(step(g + momentum * r if nesterov else r))
    return out


def galore_muon_steps(gradients, rank, period, momentum, step=jordan, find=top_left):
    """Wide matrices: the first axis is projected. The momentum is kept when the subspace changes."""
    r, p, out = 0.0, None, []
    for t, g in enumerate(gradients):
        if t % period == 0:
            p = find(g, rank)
        r = momentum * r + p.T @ g
        out.append(p @ step(r))
    return out


def gum_steps(gradients, rank, period, momentum, q, sampled, weights=None, step=jordan, find=top_left):
    """One block of GUM (arXiv 2510.17802, Algorithm 2); `sampled[i]`: full rank in period `i`.

    `weights(q) -> (low, inside, outside)`; the default is the paper's.
    """
    low, inside, outside = weights(q) if weights else (1 / (1 - q), 0.0, 1 / q)
    r, p, out = 0.0, None, []
    for t, g in enumerate(gradients):
        if t % period == 0:
            p, r = find(g, rank), 0.0
        if sampled[t // period]:
            r = momentum * r + inside * (p @ p.T @ g) + outside * (g - p @ p.T @ g)
            out.append(step(r))
        else:
            r = momentum * r + low * (p.T @ g)
            out.append(p @ step(r))
    return out


def adam_steps(gradients, b1=0.9, b2=0.999, eps=1e-8):
    """Adam's step with bias correction (Kingma and Ba)."""
    mu, nu, out = 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        out.append(mu / (1 - b1**t) / (np.sqrt(nu / (1 - b2**t)) + eps))
    return out


def galore_steps(gradients, rank, period, scale=0.25, find=top_left):
    """GaLore, arXiv 2403.03507, Algorithm 2, with the moments kept when the subspace changes."""
    projectors, coordinates, p = [], [], None
    for t, g in enumerate(gradients):
        if t % period == 0:
            p = find(g, rank)
        projectors.append(p)
        coordinates.append(p.T @ g)
    return [scale * p @ s for p, s in zip(projectors, adam_steps(coordinates), strict=True)]


def sumo_steps(gradients, rank, period, momentum, step=msign, ratio=1.1, raw=True, find=top_left):
    """SUMO, arXiv 2505.24749, Algorithm 1, limiter included."""
    q, m, norm, out = None, 0.0, 0.0, []
    for t, g in enumerate(gradients):
        if t % period == 0:
            new = find(g, rank)
            m = 0.0 if q is None else (new.T @ q) @ m
            q = new
        m = momentum * m + q.T @ g
        o = step(m)
        size = np.linalg.norm(o)
        if norm and size > ratio * norm:
            o = o * ratio * norm / size
        norm = np.linalg.norm(o)
        out.append(q @ o + (g - q @ (q.T @ g) if raw else 0.0))
    return out


def sinkgd_step(g, rounds=5):
    """Of a matrix with the outputs as rows (arXiv 2502.06742, Algorithm 3), by whole matrices."""
    m, n = g.shape
    for _ in range(rounds):
        g = g / np.linalg.norm(g, axis=1, keepdims=True) * np.sqrt(n)
        g = g / np.linalg.norm(g, axis=0, keepdims=True) * np.sqrt(m)
    return g


def swan_step(g):
    """Of a matrix with the outputs as rows (arXiv 2412.13148, Algorithm 1), whitening exact."""
    g = (g - g.mean(axis=1, keepdims=True)) / g.std(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(g @ g.T)
    keep = values > 1e-9 * values[-1]
    root = (vectors[:, keep] / np.sqrt(values[keep])) @ vectors[:, keep].T
    o = root @ g
    return o * np.linalg.norm(g) / np.linalg.norm(o)
