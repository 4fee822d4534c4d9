"""The update rules in float64 NumPy, one matrix at a time, directly from the formulas.

This module does not import gum_optax. Subspaces come from NumPy's SVD, and the drawn blocks are an input.
"""

import numpy as np


def jordan(x, steps=5):
    """Newton-Schulz with Jordan's coefficients, in either orientation."""
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


def normuon_steps(gradients, momentum, b2, eps=1e-8, rate=0.2):
    """NorMuon for outputs as rows (arXiv 2510.05491, Algorithm 1), with exact polar factors."""
    (m, n), v, out = gradients[0].shape, 0.0, []
    for o in muon_steps(gradients, momentum, msign):
        v = b2 * v + (1 - b2) * np.mean(o**2, axis=1, keepdims=True)
        o = o / (np.sqrt(v) + eps)
        out.append(rate * np.sqrt(m * n) / np.linalg.norm(o) * o)
    return out


def adalomo_weights(w, gradients, rate, decay=0.0, eps=(1e-30, 1e-3), threshold=1.0):
    """AdaLomo's weights after each step, by OpenLMLab/LOMO at 45d4bac; a vector has a full second moment."""
    rows = columns = full = 0.0
    out = []
    for t, g in enumerate(gradients, 1):
        beta, squares = 1 - t**-0.8, g**2 + eps[0]
        if g.ndim == 2:
            rows = beta * rows + (1 - beta) * squares.mean(1)
            columns = beta * columns + (1 - beta) * squares.mean(0)
            u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        else:
            full = beta * full + (1 - beta) * squares
            u = g / np.sqrt(full)
        u = u / max(1, np.sqrt(np.mean(u**2)) / threshold)
        relative = rate * max(eps[1], np.sqrt(np.mean(w**2)))
        w = (1 - relative * decay) * w - relative * u
        out.append(w)
    return out


def hfac_steps(gradients, b1, b2, eps=1e-30, threshold=1.0):
    """H-Fac with sums of squares, by the transcription of junaidaliop/zij at 74a271e."""
    m, n = gradients[0].shape
    u, v, r, s, out = np.zeros(m), np.zeros(n), np.zeros(m), np.zeros(n), []
    for t, g in enumerate(gradients, 1):
        c1, c2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        u = c1 * u + (1 - c1) * g.sum(1) / n
        v = c1 * v + (1 - c1) * g.sum(0) / m
        r = c2 * r + (1 - c2) * (g**2 + eps).sum(1)
        s = c2 * s + (1 - c2) * (g**2 + eps).sum(0)
        phi = c1 * (u - g.sum(1) / n)[:, None] / np.sqrt(r / n)[:, None]
        psi = c1 * (v - g.sum(0) / m)[None] / np.sqrt(s / m)[None]
        clipped = g / np.sqrt(np.outer(r, s) / r.sum())
        clipped = clipped / max(1, np.sqrt(np.mean(clipped**2)) / threshold)
        out.append((phi + psi) / 2 + clipped)
    return out


def galore_muon_steps(gradients, rank, period, momentum, step=jordan, find=top_left, rotates=False):
    """For wide matrices: projects the first axis. The momentum stays as it is, or follows the subspace."""
    r, p, out = 0.0, None, []
    for t, g in enumerate(gradients):
        if t % period == 0:
            before, p = p, find(g, rank)
            r = p.T @ before @ r if rotates and t else r
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
    """GaLore, arXiv 2403.03507, Algorithm 2; the moments do not change with the subspace."""
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
    """SinkGD for outputs as rows (arXiv 2502.06742, Algorithm 3), with whole matrices."""
    m, n = g.shape
    for _ in range(rounds):
        g = g / np.linalg.norm(g, axis=1, keepdims=True) * np.sqrt(n)
        g = g / np.linalg.norm(g, axis=0, keepdims=True) * np.sqrt(m)
    return g


def swan_step(g):
    """SWAN for outputs as rows (arXiv 2412.13148, Algorithm 1), with exact whitening."""
    g = (g - g.mean(axis=1, keepdims=True)) / g.std(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(g @ g.T)
    keep = values > 1e-9 * values[-1]
    root = (vectors[:, keep] / np.sqrt(values[keep])) @ vectors[:, keep].T
    o = root @ g
    return o * np.linalg.norm(g) / np.linalg.norm(o)


def golore_steps(gradients, projectors, period, scale=0.25, b1=0.9, b2=0.999, eps=1e-8):
    """GoLore, arXiv 2410.11289: Adam in the given subspaces; its mean rotates into each new subspace."""
    mu, nu, out = 0.0, 0.0, []
    for t, g in enumerate(gradients):
        p = projectors[t // period]
        if t and t % period == 0:
            mu = p.T @ projectors[t // period - 1] @ mu
        r = p.T @ g
        mu, nu = b1 * mu + (1 - b1) * r, b2 * nu + (1 - b2) * r**2
        out.append(scale * p @ (mu / (1 - b1 ** (t + 1)) / (np.sqrt(nu / (1 - b2 ** (t + 1))) + eps)))
    return out


def fira_steps(gradients, rank, period, scale=0.25, growth=1.01, find=top_left):
    """Fira, arXiv 2410.01623, with a limit on the norm of the residual term."""
    p, projectors, coordinates = None, [], []
    for t, g in enumerate(gradients):
        p = find(g, rank) if t % period == 0 else p
        projectors.append(p)
        coordinates.append(p.T @ g)
    out, last = [], 0.0
    for g, p, r, s in zip(gradients, projectors, coordinates, adam_steps(coordinates), strict=True):
        rest = (g - p @ r) * np.linalg.norm(s, axis=0) / np.linalg.norm(r, axis=0)
        size = np.linalg.norm(rest)
        if last and size > growth * last:
            rest *= growth * last / size
        last = np.linalg.norm(rest)
        out.append(scale * (p @ s + rest))
    return out


def frugal_steps(gradients, rank, period, outside=np.sign, find=top_left):
    """FRUGAL, arXiv 2411.07837: Adam restarts in every period, and `outside` maps the residual."""
    out = []
    for start in range(0, len(gradients), period):
        span = gradients[start : start + period]
        p = find(span[0], rank)
        steps = adam_steps([p.T @ g for g in span])
        out += [p @ s + outside(g - p @ (p.T @ g)) for g, s in zip(span, steps, strict=True)]
    return out


def dct_matrix(size):
    """A matrix whose columns are the orthonormal DCT-II basis."""
    i, j = np.arange(size)[:, None], np.arange(size)[None, :]
    d = np.cos(np.pi * j * (2 * i + 1) / (2 * size)) * np.sqrt(2 / size)
    d[:, 0] = np.sqrt(1 / size)
    return d


def trion_steps(gradients, rank, momentum, step=jordan):
    """Trion, arXiv 2505.17967."""
    m, out = 0.0, []
    d = dct_matrix(len(gradients[0]))
    for g in gradients:
        m = m + g
        p = d[:, np.argsort(-np.abs(d.T @ m).sum(axis=1))[:rank]]
        r = p.T @ m
        m = m - (1 - momentum) * p @ r
        out.append(p @ step(r))
    return out


def dion_steps(gradients, q, momentum):
    """Dion, arXiv 2504.05295, Algorithm 1, from the given Q."""
    m, out = 0.0, []
    for g in gradients:
        m = m + g
        p, upper = np.linalg.qr(m @ q)
        p = p * np.sign(np.diag(upper))  # the signs cancel in P Qᵀ; the library's are positive
        r = m.T @ p
        m = m - (1 - momentum) * p @ r.T
        q = r / np.linalg.norm(r, axis=0)
        out.append(p @ q.T)
    return out


def cosmos_steps(gradients, u, ratio=0.2, b1=0.9, b2=0.96, eps=1e-8, step=jordan):
    """COSMOS, arXiv 2502.17410, from the given U and S = 0."""
    rows, columns = gradients[0].shape
    size = np.sqrt(rows * columns)
    m, s, v, out = 0.0, np.zeros((u.shape[1],) * 2), 0.0, []
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        new, upper = np.linalg.qr(b2 * u @ s + (1 - b2) * g @ g.T @ u)
        new = new * np.sign(np.diag(upper))
        s = new.T @ (b2 * u @ s @ u.T + (1 - b2) * g @ g.T) @ new
        u = new
        v = b2 * v + (1 - b2) * (u.T @ g) ** 2
        inside = u @ (u.T @ m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
        outside = step(m - u @ (u.T @ m))
        x = inside + ratio * size * outside / np.linalg.norm(outside)
        out.append(ratio * size * x / np.linalg.norm(x))
    return out


def ema(gradients, beta):
    """D ← β D + (1 - β) G."""
    d, out = 0.0, []
    for g in gradients:
        d = beta * d + (1 - beta) * g
        out.append(d)
    return out


def oracle(rule, gradients, *args, **kwargs):
    """Apply the oracle of one wide matrix to a leaf of any orientation and stack."""
    shape = gradients[0].shape
    tall = shape[-2] > shape[-1]
    blocks = [np.reshape(g, (-1, *shape[-2:])) for g in gradients]
    out = []
    for block in range(blocks[0].shape[0]):
        wide = [np.float64(b[block].T if tall else b[block]) for b in blocks]
        per_block = {k: v[block] if isinstance(v, list) else v for k, v in kwargs.items()}
        steps = rule(wide, *args, **per_block)
        out.append([s.T if tall else s for s in steps])
    return [np.stack([steps[t] for steps in out]).reshape(shape) for t in range(len(gradients))]
