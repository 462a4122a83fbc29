"""The quick tests, and the way from training to page, with the oldest, middle and newest libraries.

    python -m bench.matrix                      # makes build/matrix/NAME: 7 GB and ten minutes each
    python -m bench.matrix oldest=PYTHON ...    # with environments that are there, and no others
    python -m bench.matrix tests/test_recipe.py ...     # these tests alone; flags of pytest go as well

A target of the Makefile: make matrix. The Pythons are looked for in the PATH. It ends with the table of
CONTRIBUTING.md, and with exit code 1 where something failed."""
import csv
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from bench.suite import WORKERS

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "matrix"
SHOWN = "torch", "fastai", "gradio", "numpy", "pandas", "pillow"
TESTS = "pytest", "pytest-xdist", "pytest-cov", "hypothesis", "hatchling"
OLD_WARNINGS = "-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"
LISTED = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]


def lowest(line):
    "A requirement with its lower bound as the only version: torch>=2.6,<3 becomes torch==2.6.*"
    need = Requirement(line)
    return next((f"{need.name}=={one.version}.*" for one in need.specifier if one.operator == ">="), line)


ENVIRONMENTS = {
    "oldest": ("python3.11", [lowest(line) for line in LISTED]),
    "middle": ("python3.12", [*LISTED, "torch==2.11.*"]),
    "newest": ("python3.13", LISTED),
}


def make(name):
    "The Python of an environment that pip makes; None where its Python is not on this machine."
    version, needs = ENVIRONMENTS[name]
    if not shutil.which(version): return print(f"{name} is left out: there is no {version}")
    python = BUILD / name / "bin" / "python"
    if not python.exists(): subprocess.run([version, "-m", "venv", BUILD / name], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *needs, *TESTS], check=True)
    return python


def works(python, *args):
    "Whether a command with this Python ends with exit code 0."
    command = [python, "-W", "ignore", *map(str, args)]
    print(*command[3:], flush=True)
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def round_trip(name, python):
    "Train, export, classify and ask the page; returns whether all of it works."
    run = BUILD / "runs" / "digits" / name
    shutil.rmtree(run, ignore_errors=True)
    ask = f"from bench.startup import first_prediction; first_prediction({str(run / 'learner.pkl')!r})"
    small = "--preset", "smoke", "--epochs", 2, "--sizes", 8
    return (
        works(python, "train.py", *small, "--runs", BUILD / "runs", "--name", name)
        and works(python, "export.py", run)
        and bool(classify(python, run, "own"))
        and works(python, "-c", ask))


def classify(python, run, name):
    "The rows that this environment gives for the examples with the learner of `run`; none where it fails."
    table = run / f"{name}.csv"
    if not works(python, "-m", "sifar.predict", run / "learner.pkl", "examples", "--csv", table): return []
    with open(table) as f: return list(csv.reader(f))


def reads(python, name, other):
    "Whether this environment gives the answers of `other` with its learner, also through stock fastai."
    run = BUILD / "runs" / "digits" / other
    with open(run / "own.csv") as f: want = list(csv.reader(f))
    stock = f"from fastai.learner import load_learner; load_learner({str(run / 'learner.pkl')!r})"
    return same(classify(python, run, name), want) and works(python, "-c", stock)


def same(rows, others):
    "Whether two tables have the same files, and as much for their likeliest classes."
    if len(rows) != len(others): return False
    return all(a[0] == b[0] and abs(float(a[2]) - float(b[2])) < 1e-3 for a, b in zip(rows[1:], others[1:]))


def versions(python):
    code = f"from importlib.metadata import version; print(*map(version, {SHOWN}))"
    code = f"import platform; print(platform.python_version(), end=' '); {code}"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def quick_tests(python, args):
    "The last line of the quick tests, or of those that `args` name."
    # libraries that are old and new side by side warn of each other
    command = [python, "-m", "pytest", *WORKERS, *OLD_WARNINGS, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-5000:])
    return done.stdout.strip().splitlines()[-1].strip("= ")


def main(args):
    given = {name: Path(python) for name, python in (arg.split("=") for arg in args if "=" in arg)}
    args = [arg for arg in args if "=" not in arg]
    pythons = given or {name: python for name in ENVIRONMENTS if (python := make(name))}
    done = {name: round_trip(name, python) for name, python in pythons.items()}
    failed = not all(done.values())
    print(f"|  | Python | {' | '.join(SHOWN)} | train to page | reads files of | quick tests |")
    print("|---" * (len(SHOWN) + 5) + "|")
    for name, python in pythons.items():
        read = [other for other in pythons if other != name and done[other] and reads(python, name, other)]
        failed |= len(read) < len(pythons) - 1
        tests = quick_tests(python, args)
        failed |= "failed" in tests or "error" in tests
        cells = name, *versions(python), "yes" if done[name] else "no", ", ".join(read), tests
        print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__": main(sys.argv[1:])
