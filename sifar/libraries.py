"The libraries that sifar works with, as pyproject.toml says, or where it is installed its metadata."
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from .errors import UserError
from .files import ROOT

OLDEST = 3, 11              # of the Pythons


def check_libraries(extra=None):
    """Raise a UserError where Python is too old, or a library missing, too old or too new.

    extra: look also at those of a part of sifar, such as page. A Space says neither, it has its own
    requirements.txt."""
    if sys.version_info < OLDEST:        # pip looks at this; a checkout is started without it
        raise UserError(f"Python {sys.version.split()[0]} is here, and sifar works with 3.11 or newer.")
    from packaging.requirements import Requirement
    for need in map(Requirement, needed(extra)):
        # as in: gradio>=6; extra == "page"
        if need.marker and not need.marker.evaluate({"extra": extra or ""}): continue
        mend = f"pip install '{need.name}{need.specifier}'"
        try: found = version(need.name)
        except PackageNotFoundError: raise UserError(f"{need.name} is missing: {mend}") from None
        if need.specifier.contains(found, prereleases=True): continue
        raise UserError(f"{need.name} {found} is here, and this sifar works with {need.specifier}: {mend}")


def needed(extra):
    "The requirements in pip's form, those of `extra` among them."
    file = ROOT / "pyproject.toml"
    if file.is_file():
        import tomllib
        project = tomllib.loads(file.read_text())["project"]
        return project["dependencies"] + project["optional-dependencies"].get(extra, [])
    try: return requires("sifar") or []
    except PackageNotFoundError: return []
