"""A run as a Hugging Face Space: a folder that is complete, and its upload."""
import json
import platform
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from ..errors import UserError, need, visible
from ..files import PACKAGE, ROOT, read_about, write_file
from ..log import log
from ..training.metrics import FEW

# what the page imports
NEEDED = ("fastai", "fastcore", "gradio", "matplotlib", "numpy", "pillow", "rich", "safetensors",
          "torch", "torchvision")
NEEDED_BY_LIGHT = "gradio", "numpy", "onnxruntime", "pillow", "rich"
LICENSE = "apache-2.0"
OURS = b'---\ntitle: "sifar '               # how the README.md of our Spaces begins
LFS = "".join(f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("pkl", "onnx", "png", "jpg"))


# ---- the folder ----

def write_space(run, folder, light=False):
    """Write a Space that shows the exported `run` into `folder`, which is empty, new, or an earlier Space.

    light: it computes by ONNX Runtime, and has model.onnx instead of the learner.
    Errors: UserError where something else is in it."""
    run, folder = Path(run), check_folder(folder)
    about = read_about(run / "model.json")
    need(about, f"{run} has no model.json: make it with python export.py {run}.")
    folder.mkdir(parents=True, exist_ok=True)
    # first, as it says that the folder is ours, should the rest break off
    write_file(folder / "README.md", model_card(about, light))
    # so that no module of an older sifar stays
    if (folder / "sifar").is_dir(): shutil.rmtree(folder / "sifar")
    for path, source in space_files().items():
        copy = folder / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_file(copy, source.read_bytes())
    model, other = ("model.onnx", "learner.pkl") if light else ("learner.pkl", "model.onnx")
    (folder / other).unlink(missing_ok=True)
    for name in (model, "model.json"): write_file(folder / name, (run / name).read_bytes())
    write_file(folder / "requirements.txt", requirements(about, light))
    write_file(folder / ".gitattributes", LFS)
    log.info("%s is a complete Space: python app.py starts it there", folder)


def check_folder(folder):
    "`folder`, where a Space may be written into it. Errors: UserError."
    folder = Path(folder)
    readme = folder / "README.md"
    ours = readme.is_file() and readme.read_bytes().startswith(OURS)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not ours:
        raise UserError(f"{folder} holds something else than a Space: choose a new folder.")
    for inner in (folder / "sifar", folder / "examples"):
        if inner.is_symlink(): raise UserError(f"{inner} is a link, and its files are not ours: remove it.")
    return folder


def space_files():
    "All of sifar, its templates too, and what the page shows: by the paths in the Space, the files here."
    sources = sorted(path for pattern in ("*.py", "*.j2") for path in PACKAGE.rglob(pattern))
    examples = sorted(path for path in (ROOT / "examples").iterdir() if path.is_file())
    shown = [ROOT / "app.py", ROOT / "LICENSE", *examples]
    files = {path.relative_to(PACKAGE.parent): path for path in sources}
    return files | {path.relative_to(ROOT): path for path in shown}


def requirements(about, light):
    "The exact versions that are installed here, of what the page needs and no more."
    needed = [*(NEEDED_BY_LIGHT if light else NEEDED)]
    if about["arch"].startswith("timm:") and not light: needed.append("timm")
    # of a version such as 2.15.0+cpu, registries know the first part
    return "".join(f"{package}=={version(package).split('+')[0]}\n" for package in needed)


# ---- the model card: card.md.j2 ----

def model_card(about, light=False):
    "The README.md of a Space, from the dictionary of model.json."
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    # jinja2's autoescape knows HTML alone: `finalize` sees each value as it is put into the text
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
                      finalize=plain, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    env.filters.update(yaml=yaml_text, verbatim=Verbatim)
    notes = {"test": "", "valid": ", on which the epoch was chosen"}
    text = env.get_template("card.md.j2").render(
        **{"photos": None, **about},
        light=light,
        figures=[card_row(split, about, note) for split, note in notes.items() if about[split]],
        gradio=version("gradio"),
        python=platform.python_version().rpartition(".")[0],
        license=LICENSE)
    return text.encode(errors="replace")            # the name of a folder of images need not be text


def card_row(split, about, note):
    figures = about[split]
    top1, top5 = (f"{100 * figures[k]:.2f} %" for k in ("top1", "top5"))
    if len(about["classes"]) <= FEW: top5 = "-"
    return {"split": split, "images": about["images"][split], "note": note, "top1": top1, "top5": top5}


class Verbatim(str):
    "Text on one line that `plain` leaves as it is."
    def __new__(cls, text): return super().__new__(cls, visible(" ".join(str(text).split())))


def plain(value):
    """A value as text on one line of Markdown that shows it as it is.

    An underscore within a word means nothing there."""
    if isinstance(value, Verbatim): return value
    text = visible(" ".join(str(value).split()))
    return re.sub(r"[\\`*<>\[\]|&#~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def yaml_text(text):
    """A string of YAML for any text: that of JSON, and readable.

    Characters that YAML does not allow, or takes for new lines, are escaped."""
    odd = r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]"
    readable = json.dumps(text, ensure_ascii=False)
    return Verbatim(re.sub(odd, lambda found: f"\\u{ord(found[0]):04x}", readable))


# ---- the upload ----

def check_push(repo):
    """The token of Hugging Face, from `hf auth login` or the environment variable HF_TOKEN.

    Errors: UserError where there is none, or `repo` is not USER/NAME."""
    from huggingface_hub import get_token
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"--push {repo}: it should be USER/NAME.")
    if token := get_token(): return token
    raise UserError("--push needs a token of Hugging Face that may write: "
                    "run hf auth login, or set HF_TOKEN.")


def push_space(run, repo, light=False):
    """Upload the Space of `run` to `repo`, USER/NAME on Hugging Face, which is made where it is missing.

    Errors: UserError."""
    from huggingface_hub import HfApi
    token = check_push(repo)
    with tempfile.TemporaryDirectory() as folder:
        write_space(run, folder, light)
        try:
            url = HfApi().create_repo(repo, repo_type="space", space_sdk="gradio", exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder, repo_type="space",
                                  delete_patterns=["sifar/*", "learner.pkl", "model.onnx"],
                                  commit_message="The Space of an exported run")
        # of the library, its HTTP client, its transfer library, the system: they have no common base
        except Exception as e:
            reason = " ".join(str(e).split()).replace(token, "[token]")[:200]
            raise UserError(f"Hugging Face did not take {repo} ({type(e).__name__}: {reason}): "
                            "correct that and push again.") from None
    log.info("%s is on line; its first start takes some minutes", url)
