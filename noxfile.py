"""Development commands: `nox -l` lists them. Each makes its own environment from constraints.txt."""

import tarfile
import tempfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after -- go to pytest."""
    session.install("-c", "constraints.txt", "-e", ".[medical,dev]")
    spread = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]  # files share fixtures that train
    env = {"OMP_NUM_THREADS": "1", "ALTER_LLAMA_CPP": str(llama_converter(session))}
    session.run("pytest", *(session.posargs or spread), env=env)


def llama_converter(session: nox.Session) -> Path:
    """The folder with llama.cpp's converter: PyPI has it in one source package alone, which is not compiled for it."""
    pinned = Path("constraints.txt").read_text().splitlines()
    (wanted,) = [line for line in pinned if line.startswith("llama-cpp-python==")]
    folder = session.cache_dir.resolve() / wanted
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=session.cache_dir) as place:
            source = Path(place)
            session.run("pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", place, wanted)
            (package,) = source.glob("llama_cpp_python-*.tar.gz")
            with tarfile.open(package) as archive:
                archive.extractall(source, filter="data")
            (source / package.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp").rename(folder)
    return folder


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks (half an hour or more); arguments after -- go to all, such as --data ROOT --t5 FOLDER."""
    session.install("-c", "constraints.txt", "-e", ".[medical,bench]")
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the package's types with mypy, strictly."""
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site into docs/_build/html; a warning is an error."""
    session.install("-c", "constraints.txt", "-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html")
    session.log("The site is docs/_build/html/index.html")


@nox.session
def fusion(session: nox.Session) -> None:
    """Make the environment of `alter compare --methods adapter_fusion`."""
    # Without constraints.txt: the adapters library pins a transformers older than ALTER's.
    session.install("torch", "adapters>=1.3,<2")
    session.run("python", "-c", "import adapters")
    session.log(f"For alter compare in another folder: export ALTER_ADAPTERS_PYTHON={session.bin}/python")
