"""Development commands: `nox -l` lists them. Each makes its own environment from constraints.txt."""

import shutil
import tarfile
import tempfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
# Files share fixtures that train; in their order, since those of few tests, which would come last, are the slow ones.
SPREAD = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after -- go to pytest."""
    env = install_tests(session)
    session.run("pytest", *(session.posargs or SPREAD), env=env)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests and fail where they miss more than 10% of the package's lines; lists the lines that are left."""
    env = install_tests(session)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *(session.posargs or SPREAD), env=env)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


def install_tests(session: nox.Session) -> dict[str, str]:
    """Makes the environment of the tests, and returns their variables."""
    session.install("-c", "constraints.txt", "-e", ".[medical,dev]")
    return {"OMP_NUM_THREADS": "1", **llama_converter(session), **adapters_python()}


def adapters_python() -> dict[str, str]:
    """Where the environment of the session fusion is. Without it, the tests that train with the adapters library are skipped."""
    python = Path(".nox/fusion/bin/python").absolute()
    return {"ALTER_ADAPTERS_PYTHON": str(python)} if python.is_file() else {}


def pinned(package: str) -> str:
    """The line of constraints.txt that pins a package."""
    (line,) = [line for line in Path("constraints.txt").read_text().splitlines() if line.startswith(f"{package}==")]
    return line


def llama_converter(session: nox.Session) -> dict[str, str]:
    """Where llama.cpp's converter is: PyPI has it in one source package alone. Without it, its test is skipped."""
    wanted = pinned("llama-cpp-python")
    folder = session.cache_dir.resolve() / wanted
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=session.cache_dir) as place:
            download = ["pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", place, wanted]
            session.run(*download, success_codes=range(256))
            packages = list(Path(place).glob("llama_cpp_python-*.tar.gz"))
            if not packages:
                session.warn(f"{wanted} cannot be had; the test with llama.cpp will be skipped")
                return {}
            with tarfile.open(packages[0]) as archive:
                archive.extractall(place, filter="data")
            (Path(place) / packages[0].name.removesuffix(".tar.gz") / "vendor" / "llama.cpp").rename(folder)
    return {"ALTER_LLAMA_CPP": str(folder)}


@nox.session
def package(session: nox.Session) -> None:
    """Build sdist and wheel, install the wheel into an environment without the checkout, and run the first tutorial there."""
    session.install("-c", "constraints.txt", "build", "hatchling")
    folder = Path(session.create_tmp())
    shutil.rmtree(folder)
    # The wheel is built from the sdist.
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"))
    (wheel,) = (folder / "dist").glob("*.whl")
    session.install("-c", "constraints.txt", f"{wheel}[medical]", "pytest", "pytest-timeout", "hypothesis")
    for name in ("tests", "docs"):  # what runs the page's commands, and nothing of the package
        shutil.copytree(name, folder / "away" / name, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(name, folder / "away")
    session.chdir(folder / "away")
    session.run("python", "-c", "import alter; print(alter.__file__); assert 'site-packages' in alter.__file__")
    session.run("alter", "ls")
    session.run(
        "pytest", "tests/docs/test_pages.py", "-k", "every_command and ten_minutes", env={"OMP_NUM_THREADS": "1"}
    )


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
    """Make the environment of `alter compare --methods adapter_fusion`, and run that method's tests with it, if not -- no-tests."""
    # Without the rest of constraints.txt: the adapters library pins a transformers older than ALTER's.
    session.install(pinned("torch"), "adapters>=1.3,<2")
    session.run("python", "-c", "import adapters")
    session.log(f"For alter compare in another folder: export ALTER_ADAPTERS_PYTHON={session.bin}/python")
    if "no-tests" not in session.posargs:
        session.notify("tests", ["tests/compare/test_adapter_fusion.py"])
