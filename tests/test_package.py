"""What pip installs: the wheel is built, unpacked and used from a folder in which no sifar lies."""

import ast
import json
import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import COLD, built

import sifar
from sifar.errors import UserError
from sifar.libraries import check_libraries

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def lines(name):
    "The requirements in a file of pip, without comments and other files."
    found = (ROOT / name).read_text().splitlines()
    return sorted(line for line in found if line[:1] not in ("#", "-"))


def test_the_files_of_requirements_say_what_the_package_needs():
    assert lines("requirements.txt") == sorted(PROJECT["dependencies"] + EXTRAS["page"])
    assert lines("requirements-dev.txt") == sorted(EXTRAS["dev"] + EXTRAS["onnx"] + EXTRAS["track"])
    assert (ROOT / "requirements-dev.txt").read_text().startswith("-r requirements.txt\n")


def test_an_image_for_containers_gets_all_that_the_wheel_is_made_of(tmp_path, site):
    for line in re.findall("^COPY (.*) /build/", (ROOT / "Dockerfile").read_text(), re.M):
        for name in line.split():
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, tmp_path / name)
    (wheel,) = built(tmp_path, tmp_path / "out")
    inside = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert set(zipfile.ZipFile(wheel).namelist()) == inside


def imported(path):
    "The files of sifar that a file of it imports, at its top or where it needs them."
    package = ROOT / "sifar"
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        found = [base.with_suffix(".py"), *(base / f"{name.name}.py" for name in node.names)]
        yield from (o.relative_to(package).as_posix() for o in found if o.is_file())


def test_no_imports_run_in_circles():
    package = ROOT / "sifar"
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    graph = {path.relative_to(package).as_posix(): set(imported(path)) for path in files}
    assert "errors.py" in graph["files.py"] and "data/folder.py" in graph["data/datasets.py"]
    TopologicalSorter(graph).prepare()          # CycleError names the files of a circle


def run(site, folder, *args, exit_code=0, first=""):
    "What a command says of a Python in which the wheel is installed, and before it what is in `first`."
    env = {"PYTHONPATH": f"{first}{os.pathsep}{site}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    words = [COLD, *map(str, args)]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == exit_code, done.stderr
    return done.stdout + done.stderr


def command(site, folder, name, *args, **kwargs):
    "What the console command `name` says, as pip would make it."
    (about,) = site.glob("*.dist-info")
    target = re.search(rf"^{name} = (\S+)$", (about / "entry_points.txt").read_text(), re.M)[1]
    module, function = target.split(":")
    code = f"import sys; sys.argv = sys.argv[1:]; from {module} import {function}; {function}()"
    return run(site, folder, "-c", code, name, *args, **kwargs)


def test_a_wheel_holds_all_of_sifar_once_and_nothing_else(site):
    (about,) = site.glob("*.dist-info")
    assert about.name == f"sifar-{sifar.__version__}.dist-info"
    assert {path.name for path in site.iterdir()} == {"sifar", "sifar_scripts", about.name}
    inside = {path.relative_to(site) for path in (site / "sifar").rglob("*") if path.is_file()}
    kinds = {path.suffix for path in inside}
    here = (path for path in (ROOT / "sifar").rglob("*") if path.suffix in kinds)
    assert inside == {path.relative_to(ROOT) for path in here}
    assert kinds == {".py", ".j2", ".typed"}
    for name in ("train.py", "export.py", "app.py", "LICENSE"):
        assert (site / "sifar_scripts" / name).read_bytes() == (ROOT / name).read_bytes()


def test_commands_of_an_installed_sifar_say_their_own_names(site, tmp_path):
    assert command(site, tmp_path, "sifar-train", "--help").startswith("usage: sifar-train [-h]")
    assert command(site, tmp_path, "sifar-export", "--help").startswith("usage: sifar-export [-h]")
    said = run(site, tmp_path, "-m", "sifar.predict", "--help")
    assert said.startswith("usage: python -m sifar.predict [-h]")
    none = command(site, tmp_path, "sifar-export", exit_code=2)
    assert none == "sifar: runs holds no finished run: train one with sifar-train, or name a run folder.\n"


WITHOUT_FASTAI = """
import sys
sys.path.insert(0, sys.argv[1])
import app, export, train, sifar.share.predict, sifar.runs.check, sifar.runs.compare, sifar.runs.report
print("fastai" in sys.modules, app.no_model())
"""


def test_commands_import_fastai_only_where_they_need_it_and_the_page_names_them_as_they_are(site, tmp_path):
    "It takes seconds, and what it imports warns until one_line_errors begins."
    said = run(site, tmp_path, "-c", WITHOUT_FASTAI, site / "sifar_scripts")
    assert said.startswith("False # No model yet\n")
    assert "\n    sifar-train --preset smoke\n    sifar-export\n    sifar-app\n" in said


@pytest.mark.slow
def test_an_installed_sifar_trains_exports_and_predicts_in_any_folder(site, tmp_path):
    small = "--arch", "resnet8", "--epochs", "1", "--sizes", "8"
    said = command(site, tmp_path, "sifar-train", "--dataset", "digits", *small, "--name", "a")
    assert "Next: sifar-train --dataset cifar100" in said
    assert json.loads((tmp_path / "runs/digits/a/config.json").read_text())["git_commit"] is None
    learner = "runs/digits/a/learner.pkl"
    said = command(site, tmp_path, "sifar-export", "runs/digits/a", "--space", "space")
    assert f"Next: sifar-app --model {learner}" in said
    scripts = {str(path.relative_to(tmp_path / "space")) for path in (tmp_path / "space").rglob("*.py")}
    assert {"app.py", "sifar/__init__.py", "sifar/share/predictor.py"} <= scripts
    assert not any("sifar_scripts" in path for path in scripts)
    run(site, tmp_path, "-m", "sifar.predict", learner, ROOT / "examples", "--csv", "out.csv")
    assert len((tmp_path / "out.csv").read_text().splitlines()) > 10
    code = f"import sifar; print(sifar.__file__, len(sifar.load_learner({learner!r}).dls.vocab))"
    said = run(site, tmp_path, "-W", "ignore", "-c", code)
    assert said.split() == [str(site / "sifar" / "__init__.py"), "10"]


@pytest.mark.parametrize("found", ["2.5.1", "3.0.0"])
def test_a_library_of_another_time_is_one_line(found, site, tmp_path):
    about = tmp_path / f"torch-{found}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {found}\n")
    want = f"sifar: torch {found} is here, and this sifar works with <3,>=2.6: pip install 'torch<3,>=2.6'\n"
    assert command(site, tmp_path, "sifar-train", "--dataset", "digits", exit_code=2, first=tmp_path) == want
    here = run("", ROOT, "train.py", "--dataset", "digits", exit_code=2, first=tmp_path)
    assert here == want


def test_a_python_that_is_too_old_is_one_line(monkeypatch):
    check_libraries()
    monkeypatch.setattr("sys.version_info", (3, 10, 13))
    with pytest.raises(UserError, match=r"^Python \S+ is here, and sifar works with 3.11 or newer.$"):
        check_libraries()


@pytest.mark.parametrize(
    ("library", "args"),
    [("rich", ["train.py", "--help"]), ("numpy", ["app.py"]), ("numpy", ["-m", "sifar.report"])],
)
def test_a_core_library_that_is_missing_is_one_line_wherever_it_is_imported(library, args, tmp_path):
    gone = f'raise ModuleNotFoundError("No module named {library!r}", name="{library}")'
    (tmp_path / f"{library}.py").write_text(gone)
    said = run("", ROOT, *args, exit_code=1 if args == ["app.py"] else 2, first=tmp_path)
    assert said.count("\n") == 1 and said.startswith("sifar: ") and library in said and "pip install" in said


def test_a_library_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sifar.libraries.ROOT", tmp_path)
    extras = '[project.optional-dependencies]\npage = ["no-such-library>=1"]\n'
    (tmp_path / "pyproject.toml").write_text(f'[project]\ndependencies = ["pip"]\n{extras}')
    check_libraries()
    with pytest.raises(UserError, match="^no-such-library is missing: pip install 'no-such-library>=1'$"):
        check_libraries("page")
