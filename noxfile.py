"""Both ends of what is supported, and what takes long: `python -m pip install nox && nox`.

nox -s oldest            the oldest jax, optax and flax that pyproject.toml allows, on the oldest Python
nox -s newest            the newest that pip finds, on newer Pythons
nox -s long              the tests that the README's command leaves out
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False

# Lower bounds of pyproject.toml; `tests/test_docs.py` holds them against it.
OLDEST = ("jax==0.9.2", "jaxlib==0.9.2", "optax==0.2.6", "flax==0.12.6")


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The test suite with the oldest versions."""
    session.install("-e", ".[test]", *OLDEST)
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session(python=["3.12", "3.13"])
def newest(session: nox.Session) -> None:
    """The test suite with the newest versions."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session(python="3.11")
def long(session: nox.Session) -> None:
    """optax's suites over every optimizer, a hundred kills, more fuzzing."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "2", "-m", "long", *session.posargs)
